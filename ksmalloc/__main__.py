# SPDX-License-Identifier: MIT
"""``python -m ksmalloc`` is ``ksmctl``."""

import sys

from ksmalloc.ctl import main

if __name__ == "__main__":
    sys.exit(main())
