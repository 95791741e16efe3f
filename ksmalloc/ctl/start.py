# SPDX-License-Identifier: MIT
"""ksmctl start npages_to_scan npages_max_merge sleep"""

from __future__ import annotations

import argparse

from ksmalloc import domain
from ksmalloc.ctl.options import add_domain, whole_number

HELP = "merge, now and in later workers"
USAGE = "start npages_to_scan npages_max_merge sleep"
DESCRIPTION = "Let all workers of the domain merge, those of now and those to come."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pages = whole_number(1, 1_000_000)
    parser.add_argument("npages_to_scan", type=pages, help="pages to look at in a batch")
    parser.add_argument("npages_max_merge", type=pages, help="pages to merge in a batch at most")
    parser.add_argument("sleep", type=whole_number(0, 60_000), help="milliseconds between batches")
    add_domain(parser)


def run(args: argparse.Namespace) -> int:
    settings = {
        "run": 1,
        "pages_to_scan": args.npages_to_scan,
        "max_pages_to_merge": args.npages_max_merge,
        "sleep_millisecs": args.sleep,
        "advisor_mode": 0,
    }
    domain.write_settings(settings, args.domain, args.path)
    print("created scanner")
    return 0
