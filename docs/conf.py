"""Sphinx configuration. The package must be installed; the quick start is executed at every build."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "ksmalloc"
author = "The ksmalloc developers"
copyright = "The ksmalloc developers"
version = release = version_of("ksmalloc")

extensions = [
    "csrcdoc",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = f"ksmalloc {release}"
html_static_path = ["_static"]

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"

csrcdoc_path = "../csrc"
