"""Batch norm modules and the conversion of models to them."""

from fastprune.nn.batch_norm import BatchNormAct2d, SigmoidBatchNorm2d, SyncBatchNormAct2d
from fastprune.nn.convert import convert_batchnorm, convert_sync_batchnorm
from fastprune.nn.fuse import unfuse

__all__ = [
    "BatchNormAct2d",
    "SigmoidBatchNorm2d",
    "SyncBatchNormAct2d",
    "convert_batchnorm",
    "convert_sync_batchnorm",
    "unfuse",
]
