"""Write docs/results/index.md, the list of what is measured and what is not yet, from the pages beside it.

python scripts/results_index.py
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "results"
INDEX = FOLDER / "index.md"
HEAD = """# Results

Written by `python scripts/results_index.py` from the pages themselves; a test compares. Every page says what was run, \
on what, and with which command; numbers that its table calls missed stay in it. *Not yet*: cells that say "not yet \
measured"; nothing is estimated in their place.

| page | made by | not yet |
|---|---|--:|
"""


def index() -> str:
    """The page."""
    return HEAD + "".join(_row(path) for path in sorted(FOLDER.glob("*.md")) if path != INDEX)


def _row(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    title = re.search(r"^# (.+)$", text, re.MULTILINE)[1]
    commands = re.findall(r"Written by `([^`]+)`", text)[:1]
    if not commands:  # a page by hand names its commands in an indented block
        commands = list(dict.fromkeys(re.findall(r"^    (python -m bench\.[\w.]+)", text, re.MULTILINE)))
    made = ", ".join(f"`{command}`" for command in commands) or "by hand"
    stated = re.search(r"(\d+) not yet measured, of \d+", text)
    missing = int(stated[1]) if stated else len(re.findall(r"\|\s*not yet measured\s*(?=\|)", text))
    return f"| [{title}]({path.name}) | {made} | {missing or ''} |\n"


if __name__ == "__main__":
    INDEX.write_text(index(), encoding="utf-8")
    print(INDEX.relative_to(Path.cwd()) if INDEX.is_relative_to(Path.cwd()) else INDEX)
