"""fastprune: pruning convolutional networks in PyTorch, as cheap as training them."""

from __future__ import annotations

from fastprune import backends, budget, checkpoint, data, graph, methods, models, nn, ops, optim, parallel
from fastprune.capture import capture_step
from fastprune.checkpoint import load, save
from fastprune.compact import compact
from fastprune.errors import (
    BackendError,
    CheckpointError,
    DataError,
    ExportError,
    FastpruneError,
    GraphError,
    TrainingError,
)
from fastprune.export import export
from fastprune.flops import flops
from fastprune.latency import latency
from fastprune.memory import tune_cpu_memory
from fastprune.methods import create
from fastprune.plain import fold, to_plain
from fastprune.select import keep_masks
from fastprune.train import prune_finetune, train  # functions; modules behind stay importable
from fastprune.version import __version__ as __version__

__all__ = [
    "BackendError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "FastpruneError",
    "GraphError",
    "TrainingError",
    "backends",
    "budget",
    "capture_step",
    "checkpoint",
    "compact",
    "create",
    "data",
    "export",
    "flops",
    "fold",
    "graph",
    "keep_masks",
    "latency",
    "load",
    "methods",
    "models",
    "nn",
    "ops",
    "optim",
    "parallel",
    "prune_finetune",
    "save",
    "to_plain",
    "train",
    "tune_cpu_memory",
]
