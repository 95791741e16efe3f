# SPDX-License-Identifier: MIT
"""ksmctl, the command line of ksmalloc: one module a subcommand.

A subcommand's module has HELP (a line for the list), USAGE, DESCRIPTION, add_arguments(parser) and run(args),
which returns the exit code: 0 done, 1 it did not work out, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import ksmalloc
from ksmalloc.ctl import clean, demo, doctor, info, start, stop

COMMANDS = {"start": start, "stop": stop, "info": info, "demo": demo, "doctor": doctor, "clean": clean}

USAGE = """\
usage: {prog} {{start npages sleep | stop | info}}
       {prog} start npages_to_scan npages_max_merge sleep
       {prog} demo [FILE ...]
       {prog} doctor
       {prog} clean
"""

EPILOG = """\
Settings belong to a domain (--domain NAME, "default" unless said otherwise), and hold for workers that start
later. ksmctl COMMAND --help says more about one.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line of its own, below the usage line."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\n")


def _program() -> str:
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return "python -m ksmalloc" if name in ("__main__.py", "-m") else "ksmctl"


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage=USAGE.format(prog=prog).removeprefix("usage: ").rstrip(),
        description="Control and see the merging of identical memory pages among processes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ksmctl {ksmalloc.__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", prog=prog, dest="command", required=True
    )
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            usage=f"{prog} {module.USAGE}",
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    prog = _program()
    if not arguments:
        sys.stderr.write(USAGE.format(prog=prog))
        return 2
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        sys.stderr.write(f"unknown command {arguments[0]}\n{USAGE.format(prog=prog)}")
        return 2
    try:
        args, rest = _parser(prog).parse_known_args(arguments)
        if rest:
            args.parser.error(f"what is {' '.join(rest)}?")
    except SystemExit as exit:  # argparse has printed what there was to say
        return exit.code if isinstance(exit.code, int) else 0
    try:
        code: int = COMMANDS[args.command].run(args)
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read our output has had enough
        return 1
    except (ksmalloc.Error, OSError, ValueError, MemoryError) as error:
        sys.stderr.write(f"{prog}: {error or type(error).__name__}\n")
        return 1
