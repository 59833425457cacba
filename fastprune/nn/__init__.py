"""Modules and conversions."""

from fastprune.nn.batch_norm import BatchNormAct2d, SigmoidBatchNorm2d, SyncBatchNormAct2d

__all__ = ["BatchNormAct2d", "SigmoidBatchNorm2d", "SyncBatchNormAct2d"]
