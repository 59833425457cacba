"""The log of a run: one JSON object per line, readable while the run goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Append rows to a ``metrics.jsonl``.  Each row is one write, so a killed run leaves no half line behind others.

    Args:
        path: The file; its folder is made if need be, and what it already holds is kept.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, separators=(", ", ": ")) + "\n"
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(fd, line.encode())
        finally:
            os.close(fd)

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """All rows; a last line cut off by a full disk is left out."""
        rows = []
        for line in Path(path).read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
        return rows
