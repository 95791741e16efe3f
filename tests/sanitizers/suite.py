# SPDX-License-Identifier: MIT
"""The Python tests with a module that is watched by the address and the undefined-behaviour sanitizer.

suite.py [arguments of pytest]. The module is built apart, in build/asan, with assertions on. First a control:
bugs in a library that is made and loaded in the same way are reported. Ends with status 1 if they are not, if
a test fails, or if anything is reported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))

import sankit  # noqa: E402

USED = sankit.ASAN
BASE = ROOT / "build" / "asan"
COMPILER = os.environ.get("CC", "cc")

# The undefined-behaviour sanitizer is a library beside the other, with an idea of its own where reports go.
AT_START = """
import ctypes, os
ctypes.CDLL("libubsan.so.1").__sanitizer_set_report_path(os.environ["KSMALLOC_REPORTS"].encode())
"""

BUGS = """
#include <stdlib.h>
int outside(int at) { char *bytes = malloc(8); int found = bytes[at]; free(bytes); return found; }
unsigned too_far(unsigned width) { return 1u << width; }
"""
CONTROL = (
    "import ctypes, os, sys, ksmalloc; os.close(2); ctypes.CDLL(sys.argv[1])[sys.argv[2]](int(sys.argv[3]))"
)

NOT_LOADED = "nothing of the module runs"
PROGRAMS = "programs of their own, compiled for them; the core in them is what `make asan` watches"
MEASURES = (
    "memory is measured, and the sanitizer takes its share: shadow, red zones, blocks kept after their end"
)
LIMITS = "there is too little memory, or too few addresses or mappings: the sanitizer ends the process first"
LEFT_OUT = {
    **dict.fromkeys(("test_aarch64.py", "test_floors.py", "test_model.py"), NOT_LOADED),
    **dict.fromkeys(("test_csrc.py", "test_sanitizers.py", "test_fuzz.py", "test_soak.py"), PROGRAMS),
    **dict.fromkeys(("test_chaos.py", "test_crash.py", "test_faults.py", "test_mad.py"), PROGRAMS),
    **dict.fromkeys(("test_hostile_memory.py", "test_kernels.py"), PROGRAMS),
    **dict.fromkeys(("test_measure.py", "test_measure_group.py", "test_metadata.py"), MEASURES),
    **dict.fromkeys(("test_change_of_user.py", "test_nobody.py", "test_real.py"), MEASURES),
    "test_death.py::test_different_data_leaves_nothing": MEASURES,
    **dict.fromkeys(("test_demo.py::test_without_a_file", "test_demo.py::test_every_kind_of_file"), MEASURES),
    **dict.fromkeys(
        ("test_demo.py::test_one_worker_and_zeros", "test_demo.py::test_without_numpy"), MEASURES
    ),
    **dict.fromkeys(("test_limits_mappings.py", "test_limits_memory.py", "test_limits_group.py"), LIMITS),
    **dict.fromkeys(("test_limits_storm.py", "test_limits_swap.py"), LIMITS),
}


def build() -> Path:
    """The package with its module, under build/."""
    flags = " ".join((*USED.cflags, "-DKSM_ASSERT_LEVEL=2", "-O1"))
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", f"--build-base={BASE}"],
        cwd=ROOT,
        env=os.environ | {"KSMALLOC_CFLAGS": flags},
        check=True,
    )
    [module] = BASE.glob("lib*/ksmalloc/_core.*.so")
    if b"__asan_report" not in module.read_bytes():
        sys.exit(f"{module} was built without the sanitizer")
    package = module.parent.parent
    (package / "sitecustomize.py").write_text(AT_START, encoding="utf-8")
    return package


def library(name: str) -> str:
    """One that has to be there before the interpreter's."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def environment(package: Path, reports: sankit.Reports) -> dict[str, str]:
    return reports.environment() | {
        "PYTHONPATH": str(package),
        "PYTHONMALLOC": "malloc",
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        "KSMALLOC_REPORTS": reports.log,
    }


def control(package: Path) -> None:
    bugs = BASE / "bugs.so"
    source = bugs.with_suffix(".c")
    source.write_text(BUGS, encoding="utf-8")
    subprocess.run([COMPILER, *USED.cflags, "-shared", "-fPIC", source, "-o", bugs], check=True)
    for function, argument, said in (
        ("outside", 8, "heap-buffer-overflow"),
        ("too_far", 32, "shift exponent 32"),
        ("too_far", 31, None),
    ):
        reports = sankit.Reports(USED)
        subprocess.run(
            [sys.executable, "-c", CONTROL, bugs, function, str(argument)],
            cwd=package,
            env=environment(package, reports),
            check=False,
        )
        found = reports.collect()
        if found if said is None else said not in found:
            sys.exit(f"control: {function}({argument}) was reported as: {found or 'nothing'}")


def main() -> int:
    package = build()
    control(package)
    left_out = [
        f"--deselect=tests/{name}" if "::" in name else f"--ignore={TESTS / name}" for name in LEFT_OUT
    ]
    reports = sankit.Reports(USED)
    # Not in the checkout: a process that is started there would import the package from it.
    done = subprocess.run(
        [Path(sys.executable).with_name("pytest"), "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
        + ["-p", "no:cacheprovider", f"--timeout={300 * USED.slower}", *left_out]
        + (sys.argv[1:] or [TESTS]),
        cwd=package,
        env=environment(package, reports),
        check=False,
    )
    said = reports.collect()
    print(said or "nothing to report")
    return done.returncode or bool(said)


if __name__ == "__main__":
    sys.exit(main())
