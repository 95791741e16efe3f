"""Build ksmalloc: one extension module, `ksmalloc._core`, with the whole C core linked into it.

Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from glob import glob
from pathlib import Path
from typing import Any

if not sys.platform.startswith("linux"):
    sys.exit("ksmalloc works on Linux only: it is made of memfd, userfaultfd and pagemap.")

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WARNINGS = ["-Wall", "-Wextra"] + (["-Werror"] if os.environ.get("KSMALLOC_WERROR") == "1" else [])
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-g", "-fvisibility=hidden", "-pthread", "-iquote", "csrc"]
MORE = shlex.split(os.environ.get("KSMALLOC_CFLAGS", ""))  # for tests: sanitizers, system calls that fail


def is_core(path: str) -> bool:
    """Whether a C file is part of the core: not the preload library, not a program of its own."""
    has_main = re.search(r"^int\s+main\s*\(", Path(path).read_text(encoding="utf-8"), re.MULTILINE)
    return os.path.basename(path) != "preload.c" and not has_main


class BuildExt(build_ext):
    """Warnings are for our C, not for the C that Cython writes."""

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler._compile

        def compile_with_warnings(
            obj: str, src: str, extension: str, cc: list[str], extra: list[str], pp: list[str]
        ) -> None:
            compile_one(obj, src, extension, cc, extra + (WARNINGS if src.startswith("csrc") else []), pp)

        self.compiler._compile = compile_with_warnings
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one


def core() -> Any:
    # The core keeps the state of the process, so exactly one module may contain it.
    return cythonize(
        Extension(
            "ksmalloc._core",
            sources=["ksmalloc/_core.pyx", *sorted(filter(is_core, glob("csrc/*.c")))],
            depends=sorted(glob("csrc/*.h")),
            extra_compile_args=FLAGS + MORE,
            extra_link_args=["-pthread", "-Wl,-z,now", *MORE],  # nothing is looked up while threads are held
        ),
        build_dir="build",
        language_level=3,
    )


setup(ext_modules=core(), cmdclass={"build_ext": BuildExt})
