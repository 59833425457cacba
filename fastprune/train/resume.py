"""What a resumed run needs, in one file that is replaced in one step."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastprune import parallel
from fastprune.errors import CheckpointError, TrainingError
from fastprune.train.metrics import MetricsLog

KIND = b"fastprune training state "
MAGIC = KIND + b"2\n"  # the layout's number; then the SHA-256 of what follows, in hex, and a newline


def replace_file(path: Path, *parts: bytes | memoryview) -> None:
    """Put a file at ``path``, whole and on the disk, or leave the old one.

    Raises:
        OSError: Anything went wrong; the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name
    finally:
        os.close(folder)


def remedy(error: OSError) -> str:
    """What to do about a file that cannot be written."""
    return "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "make it writable"


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Raises: OSError, as :func:`replace_file`."""
    buffer = io.BytesIO()  # so that the disk meets one write, and the file has a hash: torch.load sees no flipped bit
    torch.save(state, buffer)
    data = buffer.getbuffer()
    replace_file(path, MAGIC, hashlib.sha256(data).hexdigest().encode() + b"\n", data)


def read_state(path: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: It cannot be read, is no file of ours, or is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"fit: cannot read {path} ({error.strerror})") from error
    head = len(MAGIC) + 65
    if data.startswith(KIND) and not data.startswith(MAGIC):
        raise CheckpointError(f"fit: {path} is of another version of fastprune; end the run with that, or start anew")
    if data[: len(MAGIC)] != MAGIC:
        raise CheckpointError(f"fit: expected a checkpoint of fit in {path}, found another kind of file; name another")
    body = memoryview(data)[head:]
    if hashlib.sha256(body).hexdigest().encode() + b"\n" != data[len(MAGIC) : head]:
        raise CheckpointError(f"fit: {path} is damaged; delete it to start anew, or put a copy of it back")
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        what = str(error).partition("GLOBAL ")[2].partition(" was not")[0] or type(error).__name__
        raise CheckpointError(
            f"fit: {path} holds more than tensors, numbers, strings, lists and dicts ({what}); give states that do not"
        ) from error


class Checkpoints:
    """Saves all parts of a run together, and brings them back.

    Args:
        path: None: nothing is saved.
        parts: By name; those with a ``state_dict`` are saved, and loaded in this order.
        about: What a file must agree with to be this run's.
        log: Its position is saved as ``"log"``.
        minutes: Between two files within an epoch; None: none.
        keep_going: Only warn if a file cannot be written.
    """

    def __init__(
        self,
        path: Path | None,
        parts: dict[str, Any],
        about: dict[str, str],
        log: MetricsLog | None = None,
        minutes: float | None = None,
        keep_going: bool = False,
    ) -> None:
        self.path, self.about, self.log, self.keep_going = path, about, log, keep_going
        self.parts = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
        self.seconds = None if minutes is None else 60 * minutes
        self.last: str | None = None  # where the run stood in the file that is there
        self._saved_at = time.monotonic()
        self._not_before = 0.0  # time.monotonic() of the next save at the end of an epoch

    def due(self) -> bool:
        """Whether one within the epoch is.  Under ``torch.distributed`` all processes must ask."""
        if self.path is None or self.seconds is None:
            return False
        return parallel.as_first_says(time.monotonic() - self._saved_at >= self.seconds)

    def save(self, state: dict[str, Any], where: str, must: bool = True) -> None:
        """Write it.  Under ``torch.distributed`` all processes must call it; the first one writes.

        Args:
            state: To be saved besides the parts, the same in all processes but for ``state["local"]``.
            where: The run stands, in words.
            must: Even if writing then takes more than a twentieth of the time.

        Raises:
            TrainingError: It cannot be written, or the weights are not finite.
            CheckpointError: A part has a state that could not be read back.
        """
        start = time.monotonic()
        if self.path is None or not parallel.as_first_says(must or start >= self._not_before):
            return
        state = {name: part.state_dict() for name, part in self.parts.items()} | state
        state["local"] = parallel.gathered(state["local"] | {"rng": _random_state(self.parts["model"])})
        self._check_finite(where)
        if parallel.rank() == 0:
            try:
                position = 0 if self.log is None else self.log.position()
                write_state(self.path, {"about": self.about, "where": where, "log": position} | state)
                if self.last is None:
                    read_state(self.path)  # what cannot be read back shows at once, and not after a kill
                self.last = where
            except OSError as error:
                self._failed(error, where)
        end = time.monotonic()
        self._saved_at, self._not_before = end, end + 20 * (end - start)

    def _check_finite(self, where: str) -> None:
        parameters = [p.detach() for p in self.parts["model"].parameters() if p.numel()]
        if not torch.stack([p.isfinite().all() for p in parameters]).all():
            raise TrainingError(f"fit: the weights are not finite {where}; lower the learning rate{self.kept()}")

    def _failed(self, error: OSError, where: str) -> None:
        text = f"fit: cannot write {self.path} ({error.strerror}), {where}{self.kept()}"
        if not self.keep_going:
            raise TrainingError(f"{text}; {remedy(error)} and resume, or go on without: keep_going=True") from error
        warnings.warn(f"{text}; going on without", stacklevel=4)

    def kept(self) -> str:
        """Where the last good file is, as the tail of an error."""
        return "" if self.last is None else f"; {self.path} holds the run {self.last}"

    def load(self) -> dict[str, Any] | None:
        """Bring the parts and this process's random state back; all that was saved, None without a file.

        Raises:
            ValueError: There is no path.
            CheckpointError: The file is damaged, or another run's; nothing was changed, unless a part refuses a state
                that should fit.
        """
        if self.path is None:
            raise ValueError("fit: resume=True needs checkpoint, the file to continue from")
        if not parallel.as_first_says(self.path.exists()):
            return None
        state = read_state(self.path)
        for key in sorted(self.about.keys() | state["about"].keys()):
            here, there = (about.get(key, "nothing") for about in (self.about, state["about"]))
            if here != there:
                raise CheckpointError(
                    f"fit: {self.path} is of another run: {key} is {there} there, {here} here; name another file, or "
                    "make everything as it was"
                )
        for name, part in self.parts.items():
            try:
                part.load_state_dict(state[name])
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                text = " ".join(str(error).split())
                raise CheckpointError(f"fit: {self.path} does not fit: its {name} is refused ({text})") from error
        self.last = state["where"]
        state["local"] = state["local"][parallel.rank()]
        _set_random_state(state["local"]["rng"], self.parts["model"])
        return state


def _random_state(model: nn.Module) -> dict[str, Any]:
    """Of Python, NumPy, PyTorch and the GPU of ``model``."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": _listed(np.random.get_state())}
    device = next(model.parameters()).device
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: dict[str, Any], model: nn.Module) -> None:
    """Of those generators that ``state`` has."""
    device = next(model.parameters()).device
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "python" in state:
        random.setstate(state["python"])
    if "numpy" in state:
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _listed(numpy_state: Any) -> list[Any]:
    """With a tensor in place of the array."""
    kind, keys, *rest = numpy_state
    return [kind, torch.from_numpy(keys.astype(np.int64)), *rest]


@contextmanager
def own_random_numbers(model: nn.Module) -> Iterator[None]:
    """Let each process draw random numbers of its own, such as its dropout masks, where all would draw the same.

    Python's, NumPy's and PyTorch's generators are looked at one by one; one whose state is not the same in all
    processes was seeded on purpose and is left alone.  Process 0 goes on with its own numbers, the others get streams
    that follow from the common state and their rank.  Behind the block all have the state of process 0, after an
    exception the one from before, which needs no talk between processes that may be gone.
    """
    if parallel.processes() == 1:
        yield
        return
    before = _random_state(model)
    digests = {name: _digest(state) for name, state in before.items()}
    everybodys = parallel.gathered(digests)
    alike = [name for name, digest in digests.items() if all(theirs.get(name) == digest for theirs in everybodys)]
    if rank := parallel.rank():
        device = next(model.parameters()).device
        _set_random_state({name: _stream(name, digests[name], rank, device) for name in alike}, model)
    try:
        yield
    except BaseException:
        _set_random_state({name: before[name] for name in alike}, model)
        raise
    now = _random_state(model)
    _set_random_state(parallel.as_first_says({name: now[name] for name in alike}), model)


def _digest(state: Any) -> bytes:
    items = state if isinstance(state, list | tuple) else [state]
    return hashlib.sha256(repr([t.tolist() if isinstance(t, Tensor) else t for t in items]).encode()).digest()


def _stream(name: str, digest: bytes, rank: int, device: torch.device) -> Any:
    """A state of the generator ``name``."""
    seed = int.from_bytes(hashlib.sha256(digest + rank.to_bytes(4, "little")).digest()[:4], "little")
    if name == "python":
        return random.Random(seed).getstate()
    if name == "numpy":
        return _listed(np.random.RandomState(seed).get_state())
    return torch.Generator(device if name == "cuda" else "cpu").manual_seed(seed).get_state()
