"""Image sets that fit in memory: decoded once to uint8, kept on the device, augmented there in batches."""

from fastprune.data import cifar, folder, toy
from fastprune.data.loader import Loader
from fastprune.data.sets import DATASETS, ImageSet, Loaders, load, register

__all__ = ["DATASETS", "ImageSet", "Loader", "Loaders", "cifar", "folder", "load", "register", "toy"]
