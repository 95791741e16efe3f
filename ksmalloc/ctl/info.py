# SPDX-License-Identifier: MIT
"""ksmctl info"""

from __future__ import annotations

import argparse

from ksmalloc import domain
from ksmalloc.ctl.options import add_domain

HELP = "whether workers are merging, and the settings"
USAGE = "info"
DESCRIPTION = "Print the settings; running is 1 if they say so and at least one worker lives."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_domain(parser)


def run(args: argparse.Namespace) -> int:
    settings, peers = domain.read_settings(args.domain, args.path)
    running = 1 if settings["run"] and peers else 0
    print(
        f"running {running}, pages_to_scan {settings['pages_to_scan']} "
        f"pages_max_merge {settings['max_pages_to_merge']} sleep_time {settings['sleep_millisecs']}"
    )
    return 0
