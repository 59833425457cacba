"""Tables of addresses and numbers that kernels read: made on the host, kept, and copied without waiting.

A table is made once per key.  Its copy starts in pinned memory, so the host goes on.  While a CUDA graph is captured no
copy may come from the host: the table then gets a place in an arena that was there before, and is filled when the
capture is over.  A graph reads its tables in every replay: whoever captures keeps the session, and with it the tables.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ALIGN = 256  # bytes
AOT_DTYPES = ()  # no kernels here

copies = 0  # tables made and copied so far


class Session:
    """What the launches inside :func:`session` read.

    Attributes:
        bytes: Size of an arena that holds all of it.
        kept: The tables, or what they are part of.
    """

    def __init__(self, arena: Tensor | None) -> None:
        self.bytes, self.kept = 0, [arena]
        self._arena, self._used, self._later = arena, 0, []

    def place(self, host: Tensor) -> Tensor:
        """Room for a table, filled by :meth:`fill`."""
        size = host.numel() * host.element_size()
        if self._arena is None or self._used + size > self._arena.numel():
            raise RuntimeError("fastprune.kernels: more tables in the captured step than in the one before; report it")
        table = self._arena[self._used : self._used + size].view(host.dtype).view(host.shape)
        self._used += -(-size // ALIGN) * ALIGN
        self._later.append((table, host))
        return table

    def fill(self) -> None:
        """After the capture: copy what it asked for."""
        for table, host in self._later:
            table.copy_(host)
        self._later = []


_session: Session | None = None


@contextmanager
def session(arena: Tensor | None = None) -> Iterator[Session]:
    """Note and keep all tables that launches in the block read; inside a capture they are made in ``arena``, uint8."""
    global _session
    before, _session = _session, Session(arena)
    try:
        yield _session
    finally:
        _session = before


def capturing(device: torch.device) -> bool:
    """Whether launches on ``device`` are being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def put(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on ``device``, without waiting for either."""
    global copies
    copies += 1
    if not capturing(device):
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
    if _session is None:
        raise RuntimeError(
            "fastprune.kernels: a CUDA graph capture met tensors at new addresses; capture with "
            "fastprune.capture_step, or run the step before on the same tensors (zero_grad(set_to_none=False))"
        )
    return _session.place(host)


class Cache:
    """The last ``maxsize`` results of a function of hashable arguments, the last of which is a device.

    Only the key goes into a table, so a hit is right whatever lives at its addresses by now.  What is made during a
    capture is that graph's, and not kept here.
    """

    def __init__(self, make: Callable[..., Any], maxsize: int) -> None:
        self._make, self._maxsize = make, maxsize
        self.clear()

    def clear(self) -> None:
        self._kept: OrderedDict[tuple, Any] = OrderedDict()
        self.misses = 0

    def __call__(self, *key: Any) -> Any:
        found = self._kept.get(key)
        if found is not None:
            self._kept.move_to_end(key)
        else:
            self.misses += 1
            found = self._make(*key)
            if not capturing(key[-1]):
                self._kept[key] = found
                if len(self._kept) > self._maxsize:
                    self._kept.popitem(last=False)
        if _session is not None:
            _session.kept.append(found)
            parts = found if isinstance(found, tuple) else (found,)
            _session.bytes += sum(t.nbytes + ALIGN for t in parts if isinstance(t, Tensor))
        return found


def cached(maxsize: int) -> Callable[[Callable[..., Any]], Cache]:
    """Decorator: :class:`Cache`."""
    return lambda make: Cache(make, maxsize)


def aot(dtype: str) -> list[tuple]:
    return []
