"""The log of a run: one JSON object per line, readable while the run goes on."""

from __future__ import annotations

import errno
import json
import os
from numbers import Real
from pathlib import Path
from typing import Any

from fastprune.errors import TrainingError


class MetricsLog:
    """Append rows to a ``metrics.jsonl``.  Each row is one write: a killed run leaves no half line, a full disk none.

    Args:
        path: The file; its folder is made if need be, and what it already holds is kept.
        tensorboard: Folder that gets the numbers of all rows with a ``step`` as TensorBoard events, too.

    Raises:
        TrainingError: TensorBoard is asked for and not installed.
    """

    def __init__(self, path: str | Path, tensorboard: str | Path | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._board = None if tensorboard is None else summary_writer()(str(tensorboard))

    def write(self, row: dict[str, Any]) -> None:
        """Append a row.

        Raises:
            OSError: It cannot be written, and none of it was.
        """
        line = (json.dumps(row, separators=(", ", ": ")) + "\n").encode()
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(fd).st_size
            try:
                if os.write(fd, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)
        if self._board is not None and "step" in row:
            for key, value in row.items():
                if isinstance(value, Real) and key != "step":
                    self._board.add_scalar(key, value, row["step"])
            self._board.flush()

    def start(self, what: dict[str, Any]) -> None:
        """Write the row that says what the run is; it replaces one with the same keys that a killed run ended with."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if lines and (not lines[-1].endswith(b"\n") or json.loads(lines[-1]).keys() == what.keys()):
            self.rewind(sum(map(len, lines[:-1])))
        self.write(what)

    def position(self) -> int:
        """Bytes so far, all of them on the disk."""
        if not self.path.exists():
            return 0
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def rewind(self, position: int) -> None:
        """Forget what was written after a :meth:`position`.

        Raises:
            TrainingError: The file is shorter than that.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < position:
            raise TrainingError(
                f"{self.path}: expected the log of the run to be resumed, {position} bytes or more, got {size}; put it "
                "back, or start anew in another folder"
            )
        if size > position:
            os.truncate(self.path, position)

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """All rows; a last line cut off by a full disk is left out."""
        rows = []
        for line in Path(path).read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
        return rows


def summary_writer() -> type:
    """PyTorch's ``SummaryWriter``.

    Raises:
        TrainingError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError("tensorboard: TensorBoard is not installed; pip install tensorboard") from error
    return SummaryWriter
