"""Data parallelism: processes that ``torchrun`` started, or others that share a ``torch.distributed`` group."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """Number of processes that train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; 0 is the one that writes files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def start(device: torch.device | str | None = None) -> torch.device:
    """Join the processes that ``torchrun`` started, if it did, and say which device is this process's.

    NCCL between GPUs, gloo between CPUs.  A group that is there already stays; one that is made here is left when
    Python exits.

    Args:
        device: ``"cpu"``, ``"cuda"``, or one GPU for a process on its own.  None: GPUs if there are any.

    Raises:
        ValueError: A GPU by number for several processes, or fewer GPUs than processes on this machine.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and {"RANK", "MASTER_ADDR"} <= os.environ.keys()
    if device.type == "cuda" and (several or processes() > 1):
        local = int(os.environ.get("LOCAL_RANK", rank()))
        if device.index not in (None, local):
            raise ValueError(f"expected device 'cuda' under torchrun, where each process has its own, got {device}")
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"expected a GPU for each process, got {torch.cuda.device_count()}; lower --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    if several and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(stop)
    return device


def stop() -> None:
    """Leave the group, if this process is in one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(t: Tensor) -> Tensor:
    """The sum over all processes, the same bits in each; ``t`` itself if there is one."""
    if processes() == 1:
        return t
    total = t.clone()
    dist.all_reduce(total)
    return total


def mean_over_processes(t: Tensor) -> Tensor:
    """The mean over all processes, the same bits in each; ``t`` itself if there is one."""
    return t if (world := processes()) == 1 else sum_over_processes(t) / world


def same_in_all_processes(t: Tensor) -> bool:
    """Whether all processes have the same numbers in ``t``."""
    if processes() == 1:
        return True
    least, most = t.clone(), t.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return torch.equal(least, most)


def same_masks(masks: Iterable[Tensor], device: torch.device) -> bool:
    """Whether all processes have the same bool tensors; ``device`` is one that the group can talk about."""
    if processes() == 1:
        return True
    flat = [mask.flatten().to(device, torch.uint8) for mask in masks]
    return same_in_all_processes(torch.cat(flat)) if flat else True


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors with those of process 0."""
    if processes() > 1:
        for t in tensors:
            whole = t.detach().contiguous()  # the very tensor, unless it is channels_last
            dist.broadcast(whole, 0)
            t.detach().copy_(whole)


def as_first_says(value: Any) -> Any:
    """``value`` as process 0 has it; anything that can be pickled."""
    if processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """Everybody's ``value``, by rank; anything that can be pickled."""
    if processes() == 1:
        return [value]
    values = [None] * processes()
    dist.all_gather_object(values, value)
    return values
