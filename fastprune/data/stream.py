"""Images read while the network trains: worker processes decode, crop and resize them, the device normalises."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from fastprune import parallel
from fastprune.data.folder import decode, images_in, layout
from fastprune.data.loader import normalisation, share
from fastprune.data.sets import Loaders, register
from fastprune.errors import DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@register
def imagenet(
    root: Path | None = None,
    *,
    size: int = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    workers: int | None = None,
    start_method: str = "forkserver",
) -> StreamSet:
    """ImageNet as folders, or any set laid out like it: ROOT/train/<class>/<image> and ROOT/val (or ROOT/test).

    Training images are cropped at random, resized to ``size`` and mirrored, as torchvision's ``RandomResizedCrop`` and
    ``RandomHorizontalFlip`` do it; test images get their shorter side scaled to 8/7 ``size`` and the centre cut out.

    Args:
        root: The tree.  Classes are the sub-folders of ``train`` in sorted order.
        size: Pixels of the square images that the network gets.
        scale: Least and largest share of its area that a random crop has of a training image.
        workers: Processes that decode; None: one per CPU of this machine, shared by the training processes on it.  With
            0 this process does it itself.
        start_method: Of the workers.  All but ``"fork"``, which may hang behind threads, ask of a script that it does
            its work under ``if __name__ == "__main__"``.

    Raises:
        DataError: A folder is missing or empty; later, while batches are read: an image is damaged.
    """
    classes, test = layout("imagenet", root)
    if size < 1 or not 0 < scale[0] <= scale[1]:
        raise ValueError(f"imagenet: expected size >= 1 and 0 < scale[0] <= scale[1], got {size} and {scale}")
    if start_method not in (known := torch.multiprocessing.get_all_start_methods()):
        raise ValueError(f"imagenet: start_method must be one of {', '.join(known)}, got {start_method!r}")
    parts: dict[str, Any] = {}
    for split, folder in (("train", root / "train"), ("test", root / test)):
        entries, labels = images_in("imagenet", folder, classes)
        # one array: a million strings would be pickled, and counted, one by one in each worker
        parts[f"{split}_files"] = np.array([os.fsencode(entry.path) for entry in entries])
        parts[f"{split}_labels"] = torch.tensor(labels)
    if workers is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", parallel.processes())))
    return StreamSet("imagenet", classes, **parts, size=size, scale=scale, workers=workers, start_method=start_method)


@dataclass(frozen=True)
class StreamSet:
    """A training and a test set on disk; used like an :class:`fastprune.data.ImageSet`.

    Files are (N,) arrays of paths as bytes, labels (N,) int64 on the CPU; ``mean`` and ``std`` are on the scale 0 to 1.
    """

    name: str
    classes: tuple[str, ...]
    train_files: np.ndarray
    train_labels: Tensor
    test_files: np.ndarray
    test_labels: Tensor
    size: int
    scale: tuple[float, float]
    workers: int
    start_method: str
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    flip: bool = True
    device: torch.device | str = "cpu"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return 3, self.size, self.size

    def to(self, device: torch.device | str) -> StreamSet:
        """The same files; batches come to ``device``."""
        return replace(self, device=device)

    def limit(self, n: int) -> StreamSet:
        """At most ``n`` training and ``n`` test images, the same random ones each time: for trials and tests."""
        part: dict[str, Any] = {}
        for split in ("train", "test"):
            files, labels = getattr(self, f"{split}_files"), getattr(self, f"{split}_labels")
            pick = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:n]
            part |= {f"{split}_files": files[pick.numpy()], f"{split}_labels": labels[pick]}
        return replace(self, **part)

    def loaders(self, batch_size: int, seed: int = 0) -> Loaders:
        """Shuffled and augmented training batches, and test batches in order as they are.

        Under ``torch.distributed`` each process gets its share of every batch of ``batch_size``.
        """
        return Loaders(StreamLoader(self, True, batch_size, seed), StreamLoader(self, False, batch_size, seed))


class StreamLoader:
    """Iterate over (images, labels) batches of a :class:`StreamSet`, float32 (B, 3, size, size), in channels_last.

    Order and crops depend on seed, epoch and image alone, not on the number of workers or processes, and the global
    random state is left alone; a loader that is resumed reads none of the images before.
    """

    def __init__(self, data: StreamSet, train: bool, batch_size: int, seed: int = 0) -> None:
        self.processes, self.rank, self.even = parallel.processes(), parallel.rank(), train
        if batch_size < 1 or (train and batch_size % self.processes):
            raise ValueError(
                f"StreamLoader: expected a batch_size that {self.processes} processes share evenly, got {batch_size}"
            )
        self.batch_size, self.shuffle, self.seed, self.device = batch_size, train, seed, torch.device(data.device)
        files, labels = (data.train_files, data.train_labels) if train else (data.test_files, data.test_labels)
        self._n = len(files)
        self._scale, self._shift = normalisation(data.mean, data.std, self.device)
        self._epoch, self._batch, self._resume = 0, 0, False
        workers = min(data.workers, max(0, len(self) - 1))  # none for a single batch
        context = torch.multiprocessing.get_context(data.start_method) if workers else None
        if workers and data.start_method == "forkserver":
            context.set_forkserver_preload([__name__])  # once, not in each worker
        self._loader = DataLoader(
            _Batches(data.name, files, labels, _transform(data, train), seed),
            batch_size=None,  # a key is a whole batch
            sampler=_Plan(self),
            num_workers=workers,
            multiprocessing_context=context,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the global one
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        whole, rest = divmod(self._n, self.batch_size)
        return whole + (rest >= (self.processes if self.even else 1))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first, self._resume = self._batch if self._resume else 0, False
        epoch, self._batch = self._epoch, first
        for number, batch in enumerate(self._read(), first):
            if isinstance(batch, str):
                raise DataError(batch)
            # Before the yield, so that a state saved while the caller holds this batch continues with the next one.
            last = number + 1 == len(self)
            self._epoch, self._batch = (epoch + self.shuffle, 0) if last else (epoch, number + 1)
            if len(batch[1]):
                images, labels = (t.to(self.device, non_blocking=True) for t in batch)
                yield images.permute(0, 3, 1, 2).float().mul_(self._scale).add_(self._shift), labels

    def _read(self) -> Iterator[Any]:
        try:
            yield from self._loader
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise DataError(f"imagenet: a worker died ({' '.join(str(error).split())}); try fewer workers") from error
        except (ConnectionError, EOFError) as error:  # it died while it handed a batch over
            raise DataError(f"imagenet: a worker died ({type(error).__name__}); try fewer workers") from error

    def keys(self) -> Iterator[tuple[int, list[int]]]:
        """(epoch, numbers of images) for each batch that is left of this epoch."""
        order = torch.arange(self._n)
        if self.shuffle:
            order = torch.randperm(self._n, generator=torch.Generator().manual_seed(_mixed(self.seed, self._epoch)))
        for batch in range(self._batch, len(self)):
            part = share(self._n, batch, self.batch_size, self.rank, self.processes, self.even)
            yield self._epoch, order[part].tolist()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; saved after any batch, the next one follows from it."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was saved; takes effect at the next ``iter()``."""
        self._epoch, self._batch, self._resume = state["epoch"], state["batch"], True

    def end_epoch(self) -> None:
        """Leave out what is left of the epoch."""
        if self._batch:
            self._epoch, self._batch = self._epoch + self.shuffle, 0


class _Plan:
    """What the DataLoader asks for the batches of an epoch."""

    def __init__(self, loader: StreamLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return iter(list(self.loader.keys()))  # at once: the loader's position moves on while batches are read


class _Batches(Dataset):
    """(epoch, numbers of images) to uint8 (B, size, size, 3) and labels (B,), or to what is wrong, in words."""

    def __init__(self, name: str, files: np.ndarray, labels: Tensor, transform: v2.Transform, seed: int) -> None:
        self.name, self.files, self.labels, self.transform, self.seed = name, files, labels, transform, seed

    def __getitem__(self, key: tuple[int, list[int]]) -> tuple[Tensor, Tensor] | str:
        epoch, numbers = key
        try:
            images = [self._image(epoch, number) for number in numbers]
        except DataError as error:
            return str(error)  # an exception would come back as a page of text
        return torch.from_numpy(np.stack(images) if images else np.empty(0)), self.labels[numbers]

    def _image(self, epoch: int, number: int) -> np.ndarray:
        image = decode(self.name, os.fsdecode(self.files[number]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mixed(self.seed, epoch, number))
            return np.asarray(self.transform(image))


def _transform(data: StreamSet, train: bool) -> v2.Transform:
    if train:
        steps: list[Any] = [v2.RandomResizedCrop(data.size, data.scale)]
        return v2.Compose([*steps, v2.RandomHorizontalFlip()] if data.flip else steps)
    return v2.Compose([v2.Resize(round(data.size * 8 / 7), InterpolationMode.BILINEAR), v2.CenterCrop(data.size)])


def _mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)[0])
