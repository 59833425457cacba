"""The table of data sets, and what :func:`load` returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprune import parallel
from fastprune.data.loader import Loader
from fastprune.errors import did_you_mean

DATASETS: dict[str, Callable[..., ImageSet]] = {}


class Loaders(NamedTuple):
    """What ``fastprune.train.fit`` takes: two iterables of (images, labels) batches."""

    train: Loader
    test: Loader


@dataclass(frozen=True)
class ImageSet:
    """A training and a test set in memory.

    Images are (N, C, H, W) uint8, labels (N,) int64; ``mean`` and ``std`` have C numbers on the scale 0 to 1; ``pad``
    and ``flip`` say how :class:`Loader` augments the training set.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    flip: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return tuple(self.train_images.shape[1:])

    def to(self, device: torch.device | str) -> ImageSet:
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def limit(self, n: int) -> ImageSet:
        """At most ``n`` training and ``n`` test images, the same random ones each time: for trials and tests."""
        part = {}
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            pick = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:n].to(labels.device)
            part |= {f"{split}_images": images[pick], f"{split}_labels": labels[pick]}
        return replace(self, **part)

    def loaders(self, batch_size: int, seed: int = 0) -> Loaders:
        """Shuffled and augmented training batches, and test batches in order as they are.

        Under ``torch.distributed`` each process gets its share of every batch of ``batch_size``.
        """
        norm = {"mean": self.mean, "std": self.std}
        train = Loader(
            self.train_images,
            self.train_labels,
            batch_size=batch_size,
            pad=self.pad,
            flip=self.flip,
            shuffle=True,
            seed=seed,
            even=True,
            **norm,
        )
        return Loaders(train, Loader(self.test_images, self.test_labels, batch_size=max(batch_size, 250), **norm))


def example_of(data: Any) -> Tensor:
    """Two test images of an :class:`ImageSet` or a stream, normalised, the same in all processes."""
    test = data.limit(2).loaders(2 * parallel.processes()).test
    test.rank, test.processes = 0, 1  # not a share of them
    return next(iter(test))[0]


def register(fn: Callable[..., ImageSet]) -> Callable[..., ImageSet]:
    """Make ``fn(root: Path | None, **options) -> ImageSet`` known to :func:`load` by its own name."""
    if fn.__name__ in DATASETS:
        raise ValueError(f"data.register: {fn.__name__!r} is already taken by {DATASETS[fn.__name__].__module__}")
    DATASETS[fn.__name__] = fn
    return fn


def load(
    name: str,
    root: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    pad: int | None = None,
    flip: bool | None = None,
    **options: Any,
) -> Any:
    """Read a data set into memory, onto ``device``; ``imagenet`` is read from the disk while it is used.

    Args:
        name: ``digits`` (scikit-learn, nothing to download), ``cifar10``, ``cifar100``, ``imagefolder``,
            ``imagenet``, ``synthetic``.
        root: Folder that holds the data; ``digits`` and ``synthetic`` need none.
        limit: At most so many training and test images (:meth:`ImageSet.limit`).
        mean, std, pad, flip: Instead of the data set's own normalisation and augmentation.
        options: Of the data set, e.g. ``image_size`` of ``imagefolder``: see its function in this package.

    Returns: An :class:`ImageSet`; for ``imagenet`` a :class:`fastprune.data.StreamSet`.

    Raises:
        ValueError: No such data set or option.
        DataError: The data is missing or damaged.
    """
    if name not in DATASETS:
        raise ValueError(f"data.load: unknown data set {name!r}{did_you_mean(name, DATASETS)}")
    known = [p for p in inspect.signature(DATASETS[name]).parameters if p != "root"]
    for option in options:
        if option not in known:
            raise ValueError(f"data.load: {name} has no option {option!r}{did_you_mean(option, known)}")
    data = DATASETS[name](Path(root) if root is not None else None, **options)
    own = {"mean": mean, "std": std, "pad": pad, "flip": flip}
    own = {key: value for key, value in own.items() if value is not None}
    if odd := [key for key in own if not hasattr(data, key)]:
        raise ValueError(f"data.load: {name} has no {odd[0]}; leave it out")
    data = replace(data, **own)
    return (data if limit is None else data.limit(limit)).to(device)
