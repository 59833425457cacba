"""Batch norm modules, the conversion of models to them, gates, and convolutions with masks."""

from fastprune.nn.batch_norm import BatchNormAct2d, SigmoidBatchNorm2d, SyncBatchNormAct2d
from fastprune.nn.convert import convert_batchnorm, convert_sync_batchnorm
from fastprune.nn.fuse import unfuse
from fastprune.nn.gate import Gate
from fastprune.nn.masked_conv import MaskedConv2d

__all__ = [
    "BatchNormAct2d",
    "Gate",
    "MaskedConv2d",
    "SigmoidBatchNorm2d",
    "SyncBatchNormAct2d",
    "convert_batchnorm",
    "convert_sync_batchnorm",
    "unfuse",
]
