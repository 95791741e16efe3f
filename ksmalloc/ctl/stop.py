# SPDX-License-Identifier: MIT
"""ksmctl stop"""

from __future__ import annotations

import argparse

from ksmalloc import domain
from ksmalloc.ctl.options import add_domain

HELP = "stop merging; what is merged stays merged"
USAGE = "stop"
DESCRIPTION = "Let no worker of the domain merge any more until the next start. What is merged stays merged."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_domain(parser)


def run(args: argparse.Namespace) -> int:
    domain.write_settings({"run": 0}, args.domain, args.path)
    print("stopped scanner")
    return 0
