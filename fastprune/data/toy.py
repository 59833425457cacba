"""Data sets that need no download."""

from __future__ import annotations

from pathlib import Path

import torch

from fastprune.data.sets import ImageSet, register
from fastprune.errors import DataError


@register
def digits(root: Path | None = None) -> ImageSet:
    """scikit-learn's 1,797 real handwritten digits (UCI ML repository): 1x8x8, 1,437 to train on and 360 to test on.

    Training images are moved by up to one pixel and never mirrored.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: scikit-learn is not installed; pip install scikit-learn") from error
    raw = load_digits()
    images = torch.from_numpy(raw.images * 15).round().to(torch.uint8).unsqueeze(1)  # 0..16 to 0..240
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    mean, std = (0.2876,), (0.3539,)  # of the training images
    classes = tuple(str(i) for i in range(10))
    return ImageSet("digits", classes, images[train], labels[train], images[test], labels[test], mean, std, pad=1)


@register
def synthetic(
    root: Path | None = None,
    *,
    classes: int = 10,
    size: int = 32,
    channels: int = 3,
    n_train: int = 2048,
    n_test: int = 512,
    seed: int = 0,
) -> ImageSet:
    """One random picture per class under heavy noise: any size, learnable, the same for the same seed."""
    sizes = {"classes": classes, "size": size, "channels": channels, "n_train": n_train, "n_test": n_test}
    for key, value in sizes.items():
        if value < 1:
            raise ValueError(f"synthetic: expected {key} >= 1, got {value}")
    draw = torch.Generator().manual_seed(seed)
    pictures = torch.randint(256, (classes, channels, size, size), generator=draw).float()

    def split(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(n) % classes
        noise = torch.randint(256, (n, channels, size, size), generator=draw, dtype=torch.uint8)
        return noise.float().lerp_(pictures[labels], 0.35).to(torch.uint8), labels

    names = tuple(str(i) for i in range(classes))
    half, quarter = (0.5,) * channels, (0.25,) * channels
    return ImageSet("synthetic", names, *split(n_train), *split(n_test), half, quarter)
