"""Image sets: in memory, decoded once and augmented on the device in batches, or read from the disk by workers."""

from fastprune.data import cifar, folder, stream, toy
from fastprune.data.loader import Loader
from fastprune.data.sets import DATASETS, ImageSet, Loaders, example_of, load, register
from fastprune.data.stream import StreamLoader, StreamSet

__all__ = [
    "DATASETS",
    "ImageSet",
    "Loader",
    "Loaders",
    "StreamLoader",
    "StreamSet",
    "cifar",
    "example_of",
    "folder",
    "load",
    "register",
    "stream",
    "toy",
]
