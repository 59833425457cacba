"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the original Python archives, unpacked where torchvision puts them."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from fastprune.data.sets import ImageSet, register
from fastprune.errors import DataError


@register
def cifar10(root: Path | None = None) -> ImageSet:
    """50,000 + 10,000 images, 3x32x32, 10 classes; ROOT/cifar-10-batches-py.  Mean and std as RNI's."""
    return _load("cifar10", CIFAR10, root, "labels", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@register
def cifar100(root: Path | None = None) -> ImageSet:
    """50,000 + 10,000 images, 3x32x32, 100 classes; ROOT/cifar-100-python."""
    return _load("cifar100", CIFAR100, root, "fine_labels", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


def _load(
    name: str, spec: type[CIFAR10], root: Path | None, key: str, mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageSet:
    if root is None:
        raise DataError(f"{name}: root is missing; name the folder that holds {spec.base_folder}")

    def read(file: str, md5: str) -> dict[str, Any]:
        path = root / spec.base_folder / file
        get = f'python -c "from torchvision.datasets import {spec.__name__} as C; C({str(root)!r}, download=True)"'
        if not path.is_file():
            raise DataError(f"{name}: {path} is missing; get it with: {get}")
        blob = path.read_bytes()
        # Unpickling can run code: only the published files get that far.
        if (got := hashlib.md5(blob, usedforsecurity=False).hexdigest()) != md5:
            raise DataError(f"{name}: {path} is damaged (md5 {got}, expected {md5}); delete it and run: {get}")
        return pickle.loads(blob, encoding="latin1")

    def split(files: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [read(*file) for file in files]
        images = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
        return torch.from_numpy(images), torch.tensor([label for part in parts for label in part[key]])

    classes = tuple(read(spec.meta["filename"], spec.meta["md5"])[spec.meta["key"]])
    return ImageSet(name, classes, *split(spec.train_list), *split(spec.test_list), mean, std, pad=4, flip=True)
