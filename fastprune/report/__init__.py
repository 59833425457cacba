"""``fastprune report``: one self-contained page of HTML about one or more runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastprune.report.page import build
from fastprune.report.runs import Run, find, read

__all__ = ["Run", "build", "find", "read", "run"]


def run(folders: Sequence[str | os.PathLike], out: str | os.PathLike, *, title: str | None = None) -> int:
    """Write a page about all runs at and below ``folders``; print where it is.

    Args:
        folders: Run folders, or folders with run folders somewhere below.
        out: The file; replaced when the new page is whole.
        title: Headline; None: made of the runs' names.

    Returns: 0, the exit code.

    Raises:
        ValueError: None of the folders holds a run.
        OSError: ``out`` cannot be written.
    """
    out, paths, left_out = Path(out), [], []
    if out.is_dir():
        raise ValueError(f"report: expected a file to write, such as report.html, got {out}, which is a folder")
    if not out.parent.is_dir():
        raise ValueError(f"report: expected a file to write, but there is no folder {out.parent}")
    for folder in map(Path, folders):
        found = find(folder)
        paths += found
        if not found:
            why = "no such folder" if not folder.exists() else "is no folder" if not folder.is_dir() else "holds no run"
            left_out.append(f"{folder}: {why}")
    if not paths:
        raise ValueError(
            f"report: expected run folders (with metrics.jsonl or run.json), got {'; '.join(left_out)}; "
            "name the folder that --out or out_dir of a training pointed to"
        )
    for line in left_out:
        print(f"fastprune: report: left out {line}", file=sys.stderr)
    runs = [read(path) for path in dict.fromkeys(p.resolve() for p in paths)]
    page = build(runs, title=title, left_out=left_out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(page.encode()) / 1e3:.0f} kB; open it in any browser")
    for r in runs:
        for problem in r.problems:
            print(f"  {r.path.name}: {problem}")
    return 0
