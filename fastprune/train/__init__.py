"""Training: one loop, its optimizer and log, and RNI's two calls ``train`` and ``prune_finetune`` on top."""

from fastprune.train.loop import History, evaluate, fit
from fastprune.train.metrics import MetricsLog
from fastprune.train.oneshot import prune_finetune, train
from fastprune.train.optim import multistep, param_groups, sgd
from fastprune.train.scratch import from_scratch

__all__ = [
    "History",
    "MetricsLog",
    "evaluate",
    "fit",
    "from_scratch",
    "multistep",
    "param_groups",
    "prune_finetune",
    "sgd",
    "train",
]
