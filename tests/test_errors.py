"""Codes and exceptions: one table, complete, and types that say what a program can do about it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

import ksmalloc
from ksmalloc import _core, errors

ERROR_H = Path(__file__).resolve().parent.parent / "csrc" / "error.h"

CODES = {
    symbol: (int(value), sentence)
    for symbol, value, sentence in re.findall(
        r'X\((KSM_E\w+), (-\d+), "([^"]+)"\)', ERROR_H.read_text(encoding="utf-8")
    )
}
ONLY_REASONS = {
    "KSM_EBUDGET",
    "KSM_EDUMPABLE",
    "KSM_ESTOPPED",
    "KSM_EUSER",
}  # they occur in why_not, no call raises them

EXPECTED = {
    "KSM_EUNSUPPORTED": ksmalloc.Unsupported,
    "KSM_ELAYOUT": ksmalloc.LayoutError,
    "KSM_EOWNER": ksmalloc.OwnerError,
    "KSM_ENOPEER": ksmalloc.PeerError,
    "KSM_EPEERS": ksmalloc.PeerError,
    "KSM_ELOST": ksmalloc.PeerError,
    "KSM_EBARRIER": ksmalloc.BarrierError,
    "KSM_EUNSTOPPABLE": ksmalloc.BarrierError,
    "KSM_EDEVICES": ksmalloc.BarrierError,
    "KSM_EDISPLACED": ksmalloc.HandlerError,
    "KSM_EMASKED": ksmalloc.HandlerError,
    "KSM_EBACKING": ksmalloc.BackingError,
    "KSM_ECLOSED": ksmalloc.ClosedError,
    "KSM_EMEMORY": ksmalloc.RegisterError,
    "KSM_EOVERLAP": ksmalloc.RegisterError,
    "KSM_ESMALL": ksmalloc.RegisterError,
    "KSM_ECORRUPT": ksmalloc.CorruptError,
    "KSM_EHEADROOM": ksmalloc.HeadroomError,
    "KSM_ENOPROC": ksmalloc.Unsupported,
}


def raised(symbol: str, code: int, asked: str = "what was asked") -> Exception:
    return errors.from_code(code, symbol, "a sentence", asked)


def test_every_private_code_has_a_decision() -> None:
    assert len(CODES) >= 21
    assert set(CODES) == set(EXPECTED) | ONLY_REASONS


@pytest.mark.parametrize("symbol", sorted(CODES))
def test_private_code(symbol: str) -> None:
    error = raised(symbol, CODES[symbol][0])
    assert type(error) is EXPECTED.get(symbol, ksmalloc.Error)
    assert isinstance(error, ksmalloc.Error)
    assert "a sentence: what was asked" in str(error)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOENT, FileNotFoundError),
        (errno.EACCES, PermissionError),
        (errno.EEXIST, FileExistsError),
        (errno.ENOTDIR, NotADirectoryError),
        (errno.ELOOP, OSError),
        (errno.EBUSY, OSError),
        (errno.ENOSPC, OSError),
    ],
)
def test_kernel_code_is_the_matching_oserror(code: int, kind: type[OSError]) -> None:
    error = raised(errno.errorcode[code], -code)
    assert type(error) is kind
    assert isinstance(error, OSError)
    assert error.errno == code
    assert "what was asked" in str(error)


def test_memory_and_misuse() -> None:
    assert type(raised("ENOMEM", -errno.ENOMEM)) is MemoryError
    assert type(raised("EINVAL", -errno.EINVAL)) is ValueError


def test_an_unknown_private_code_is_an_error() -> None:
    assert type(raised("UNKNOWN", -6000)) is ksmalloc.Error


def test_types_fit_the_handlers_programs_have() -> None:
    assert issubclass(ksmalloc.Unsupported, ImportError)
    assert issubclass(ksmalloc.OwnerError, PermissionError)
    assert issubclass(ksmalloc.ClosedError, ValueError)
    assert issubclass(ksmalloc.RegisterError, ValueError)
    assert issubclass(ksmalloc.AlignmentWarning, UserWarning)
    owner = raised("KSM_EOWNER", CODES["KSM_EOWNER"][0])
    assert isinstance(owner, OSError)
    assert owner.errno == errno.EACCES


def test_the_core_knows_its_codes() -> None:
    assert _core.describe(0) is None
    for symbol, (code, sentence) in CODES.items():
        assert _core.describe(code) == f"{sentence} ({symbol})"
    assert _core.describe(-errno.ENOMEM) == f"{os.strerror(errno.ENOMEM)} (ENOMEM)"


def test_all_names_exist() -> None:
    for name in ksmalloc.__all__:
        assert hasattr(ksmalloc, name)
