"""Files into an arena: every format as its own library reads it, nothing malformed accepted."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ksmalloc

PAGE = 4096
DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "u2",
    "I16": "i2",
    "U32": "u4",
    "I32": "i4",
    "U64": "u8",
    "I64": "i8",
    "F16": "f2",
    "F32": "f4",
    "F64": "f8",
    "C64": "c8",
    "BF16": "u2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
}


@pytest.fixture
def arena(rendezvous: str) -> Iterator[ksmalloc.Arena]:
    with ksmalloc.Domain(path=rendezvous) as domain, ksmalloc.Arena(domain=domain) as arena:
        yield arena


def safetensors(tensors: dict[str, Any], data: bytes, padding: int = 0) -> bytes:
    header = json.dumps(tensors).encode() + b" " * padding
    return len(header).to_bytes(8, "little") + header + data


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def load(arena: ksmalloc.Arena, data: bytes, format: str) -> Any:
    return ksmalloc.load(io.BytesIO(data), arena=arena, format=format)


# ---- safetensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(arena: ksmalloc.Arena, dtype: str) -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2 if dtype == "BOOL" else 100, (3, 5)).astype(DTYPES[dtype])
    entry = {"x": tensor(dtype, [3, 5], 0, values.nbytes)}
    [array] = load(arena, safetensors(entry, values.tobytes()), "safetensors").values()
    assert array.dtype == values.dtype
    assert (array == values).all()
    assert array.flags.writeable


def test_many_tensors(arena: ksmalloc.Arena, tmp_path: Path) -> None:
    weights = np.arange(3000, dtype="f4").reshape(30, 100)
    bias = np.arange(7, dtype="i8")
    header = {
        "__metadata__": {"format": "pt"},
        "bias": tensor("I64", [7], 12_000, 12_056),
        "nothing": tensor("F32", [0, 4], 12_000, 12_000),
        "scalar": tensor("I64", [], 12_056, 12_064),
        "weights": tensor("F32", [30, 100], 0, 12_000),
    }
    path = tmp_path / "model.SafeTensors"
    path.write_bytes(
        safetensors(header, weights.tobytes() + bias.tobytes() + bytes([5] + [0] * 7), padding=3)
    )
    arrays = ksmalloc.load(path, arena=arena)
    assert list(arrays) == ["bias", "nothing", "scalar", "weights"]
    assert (arrays["weights"] == weights).all()
    assert (arrays["bias"] == bias).all()
    assert arrays["scalar"].shape == ()
    assert arrays["scalar"] == 5
    assert arrays["nothing"].shape == (0, 4)
    assert arrays["weights"].ctypes.data % PAGE == 0
    assert arena.stats().blocks == 3
    arrays["weights"][0] = -1
    assert (ksmalloc.load(str(path), arena=arena)["weights"] == weights).all()
    assert load(arena, safetensors({}, b""), "safetensors") == {}


def test_a_real_model(arena: ksmalloc.Arena, minilm: Path) -> None:
    arrays = ksmalloc.load(minilm, arena=arena)
    raw = minilm.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    assert arrays.keys() == header.keys()
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert list(arrays[name].shape) == entry["shape"]
        assert arrays[name].tobytes() == raw[start + begin : start + end]


GOOD = {"x": tensor("U8", [4], 0, 4)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (100).to_bytes(8, "little") + b"{}",
        (1 << 63).to_bytes(8, "little") + b"{}",
        (200_000_000).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"\xff\xfe{}",
        (2).to_bytes(8, "little") + b"[]",
        (3).to_bytes(8, "little") + b"{]}",
        (20_000).to_bytes(8, "little") + b'{"x":' + b"[" * 9_995 + b"]" * 9_999 + b"}",
        safetensors(GOOD, b"123"),
        safetensors(GOOD, b"12345"),
        safetensors({"x": tensor("U8", [4], 1, 5)}, b"12345"),
        safetensors({"x": tensor("U8", [4], 4, 0)}, b"1234"),
        safetensors({"x": tensor("U8", [5], 0, 4)}, b"1234"),
        safetensors({"x": tensor("U8", [-4], 0, 4)}, b"1234"),
        safetensors({"x": tensor("U8", [2.0, 2], 0, 4)}, b"1234"),  # type: ignore[list-item]
        safetensors({"x": tensor("U8", [True, 4], 0, 4)}, b"1234"),
        safetensors({"x": tensor("U8", [1 << 62, 1 << 62], 0, 4)}, b"1234"),
        safetensors({"x": tensor("U8", [4], -4, 0)}, b"1234"),
        safetensors({"x": tensor("F4", [8], 0, 4)}, b"1234"),
        safetensors({"x": tensor(["U8"], [4], 0, 4)}, b"1234"),  # type: ignore[arg-type]
        safetensors({"x": GOOD["x"] | {"more": 1}}, b"1234"),
        safetensors({"x": {"dtype": "U8", "shape": [4]}}, b"1234"),
        safetensors({"x": 7}, b"1234"),
        safetensors({"x": GOOD["x"] | {"data_offsets": [0, 4, 4]}}, b"1234"),
        safetensors({"x": GOOD["x"], "y": tensor("U8", [4], 2, 6)}, b"123456"),
        safetensors({"x": GOOD["x"], "y": GOOD["x"]}, b"1234"),
        safetensors({"x": GOOD["x"], "y": tensor("U8", [4], 5, 9)}, b"123456789"),
        safetensors(GOOD | {"__metadata__": {"n": 1}}, b"1234"),
        safetensors(GOOD | {"__metadata__": []}, b"1234"),
        b"\x2e\0\0\0\0\0\0\0" + b'{"x":1,"x":2}'.ljust(46),
    ],
)
def test_malformed_safetensors(arena: ksmalloc.Arena, data: bytes) -> None:
    with pytest.raises(ValueError):
        load(arena, data, "safetensors")
    assert arena.stats().blocks == 0


ARRAYS = [
    np.arange(10_000, dtype="f8").reshape(100, 100),
    np.asfortranarray(np.arange(10_000, dtype=">i4").reshape(100, 100)),
    np.array(5, "u1"),
    np.empty((0, 3), "f4"),
    np.array(["abc", "d"], "U3"),
    np.array([(1, 2.5)], [("a", "<i4"), ("b", "<f8")]),
    np.array([(1, 2.5)], [("ä", "<i4"), ("b", "<f8")]),
    np.array(["2020-01-01"], "M8[D]"),
]


@pytest.mark.parametrize("source", ARRAYS, ids=lambda array: str(array.dtype))
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0:UserWarning")
def test_npy(arena: ksmalloc.Arena, tmp_path: Path, source: Any) -> None:
    path = tmp_path / "array.npy"
    np.save(path, source)
    array = ksmalloc.load(path, arena=arena)
    assert array.dtype == source.dtype
    assert array.strides == source.strides
    assert np.array_equal(array, source)
    assert array.flags.writeable


def test_npy_versions_and_rest(arena: ksmalloc.Arena) -> None:
    file = io.BytesIO()
    source = np.arange(5)
    for version in ((1, 0), (2, 0), (3, 0)):
        np.lib.format.write_array(file, source, version)
    file.seek(0)
    for _ in range(3):
        assert np.array_equal(ksmalloc.load(file, arena=arena, format="npy"), source)
    with pytest.raises(ValueError):
        ksmalloc.load(file, arena=arena, format="npy")


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"not numpy at all",
        npy(np.arange(5))[:-1],
        npy(np.arange(5)).replace(b"\x93NUMPY\x01", b"\x93NUMPY\x09"),
        npy(np.arange(5)).replace(b"(5,)", b"(-5)"),
        npy(np.arange(5)).replace(b"(5,), ", b"[5], {"),
        npy(np.arange(5)).replace(b"(5,)", b"(9,)"),
        npy(np.arange(5)).replace(b"'<i8'", b"'<i9'"),
        npy(np.arange(5)).replace(b"False", b"0    "),
        npy(np.arange(5)).replace(b"descr", b"other"),
        npy(np.array([None])),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100),
    ],
)
def test_malformed_npy(arena: ksmalloc.Arena, data: bytes) -> None:
    with pytest.raises(ValueError):
        load(arena, data, "npy")
    assert arena.stats().blocks == 0


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(arena: ksmalloc.Arena, tmp_path: Path, save: Any) -> None:
    path = tmp_path / "arrays.npz"
    sources = {"weights": np.arange(300_000.0), "bias": np.arange(3, dtype="i2"), "nothing": np.empty(0)}
    save(path, **sources)
    arrays = ksmalloc.load(path, arena=arena)
    assert list(arrays) == list(sources)
    for name, source in sources.items():
        assert np.array_equal(arrays[name], source)


def test_malformed_npz(arena: ksmalloc.Arena) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, x=np.arange(100_000))
    good = file.getvalue()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0xFF
    archives: list[bytes] = [b"", good[: len(good) // 2], bytes(flipped)]
    for name, content in (("x.txt", b"text"), ("x.npy", b"text"), ("x.npy", npy(np.arange(5)) + b"rest")):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, content)
        archives.append(file.getvalue())
    for data in archives:
        with pytest.raises(ValueError):
            load(arena, data, "npz")
    assert arena.stats().blocks == 0
