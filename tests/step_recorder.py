"""A CUDA graph on the CPU: records what a step hands to the dispatcher, and replays that on the same memory.

What a real graph would freeze is frozen here: numbers, addresses, the order of the calls, whatever Python decided.
What would break a capture raises: a look at a value, a tensor whose shape depends on one, a tensor made of host data.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

LOOKS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select", "unique",
    "_unique2", "unique_consecutive", "unique_dim", "lift_fresh", "bincount", "_assert_async",
}  # fmt: skip
HOST = {"cpu", "numpy", "tolist", "item", "pin_memory", "from_numpy", "tensor", "as_tensor", "__bool__", "__float__"}
HOST |= {"__int__", "__index__", "cuda"}


class HostSync(RuntimeError):
    """Something that a CUDA graph cannot hold."""


class NoHost(TorchFunctionMode):
    """Calls of Python's interface that leave the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in HOST:
            raise HostSync(f"{func.__name__} in a step")
        return func(*args, **(kwargs or {}))


def looks(func, args) -> bool:
    name = func._schema.name.removeprefix("aten::")
    by_mask = name in ("index", "index_put_", "index_put") and any(
        isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]
    )
    return name in LOOKS or by_mask


class NoLook(TorchDispatchMode):
    """Calls of the dispatcher that wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if looks(func, args):
            raise HostSync(f"{func} in a step")
        return func(*args, **(kwargs or {}))


class _Record(NoLook):
    def __init__(self, calls: list) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        frozen = tree_map(lambda leaf: leaf, (args, kwargs))  # the caller may change its lists
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not func._schema.name.startswith("profiler::"):
            self.calls.append((func, *frozen, out))
        return out


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


class Recorder:
    """What ``CapturedStep`` asks of a graph.  A capture also runs, so the first replay after it does nothing."""

    def __init__(self) -> None:
        self.calls: list | None = None
        self.replays = 0
        self._ran = False

    def run(self, work):
        return work()

    def capture(self, work):
        calls: list = []
        with NoHost(), _Record(calls):
            result = work()
        self.calls, self._ran = calls, True
        return result

    @torch.no_grad()
    def replay(self):
        if self._ran:
            self._ran = False
            return
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            outputs, inputs = tensors(out), {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            fresh = [t.untyped_storage().data_ptr() not in inputs for t in outputs]
            if outputs and not any(fresh) and not func._schema.is_mutable:
                continue  # a view
            for new, old, is_fresh in zip(tensors(func(*args, **kwargs)), outputs, fresh, strict=True):
                if is_fresh:
                    old.copy_(new)

    def reset(self):
        self.calls = None
