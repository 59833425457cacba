"""Sphinx reads the pages of this folder; ``make docs`` builds them and fails on any warning or dead link."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGES = (  # in the order of the sidebar; others follow by name
    "install", "quickstart", "your-own-network", "plug-into-your-loop", "commands", "recipes", "reports", "methods",
    "ratios", "budgets", "surgery", "checkpoints", "export", "oracle", "trainability", "ops", "architecture",
    "adding-a-method", "adding-an-op", "gpu-checks", "results/index",
)  # fmt: skip

project = "fastprune"
release = re.search(r'__version__ = "(.+)"', (HERE.parent / "fastprune" / "version.py").read_text())[1]
copyright = "the fastprune authors, Apache-2.0"
extensions = ["myst_parser"]
root_doc = "index"
html_theme = "furo"
html_title = f"fastprune {release}"
html_copy_source = False
myst_heading_anchors = 4  # links to headings, page.md#heading, are checked too


def contents(app, page, source):
    """Add to two pages what the sidebar lists; on GitHub they read better without."""
    if page == "index":
        found = sorted(path.stem for path in HERE.glob("*.md") if path.stem not in ("index", *PAGES))
        listed = [*PAGES, *found]
    elif page == "results/index":
        listed = sorted(path.stem for path in HERE.glob("results/*.md") if path.stem != "index")
    else:
        return
    source[0] += "\n\n```{toctree}\n:hidden:\n\n" + "\n".join(listed) + "\n```\n"


def setup(app):
    app.connect("source-read", contents)
