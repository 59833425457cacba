"""Data parallelism."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """Number of processes that train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(t: Tensor) -> Tensor:
    """The mean over all processes, the same bits in each; ``t`` itself if there is one."""
    if (world := processes()) == 1:
        return t
    total = t.clone()
    dist.all_reduce(total)
    return total / world


def same_in_all_processes(t: Tensor) -> bool:
    """Whether all processes have the same numbers in ``t``."""
    least, most = t.clone(), t.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return torch.equal(least, most)
