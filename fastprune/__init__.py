"""fastprune: pruning convolutional networks in PyTorch, as cheap as training them."""

from __future__ import annotations

__version__ = "0.1.0"

from fastprune import backends, data, graph, methods, models, nn, ops, optim
from fastprune.compact import compact
from fastprune.errors import BackendError, DataError, FastpruneError, GraphError, TrainingError
from fastprune.flops import flops
from fastprune.memory import tune_cpu_memory
from fastprune.methods import create
from fastprune.select import keep_masks
from fastprune.train import prune_finetune, train  # functions; modules behind stay importable

__all__ = [
    "BackendError",
    "DataError",
    "FastpruneError",
    "GraphError",
    "TrainingError",
    "backends",
    "compact",
    "create",
    "data",
    "flops",
    "graph",
    "keep_masks",
    "methods",
    "models",
    "nn",
    "ops",
    "optim",
    "prune_finetune",
    "train",
    "tune_cpu_memory",
]
