# SPDX-License-Identifier: MIT
"""How patient the tests are. Imports nothing of theirs, for it is also copied to where others can read it."""

from __future__ import annotations

import os

SLOWER = max(1.0, float(os.environ.get("KSMALLOC_TEST_SLOWER", "1")))  # than others is this machine
