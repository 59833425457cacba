"""Batches from a uint8 image set that lies on the device, augmented there: no Python per image, no worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprune import parallel


class Loader:
    """Iterate over (images, labels) batches, shuffled and augmented anew each time.

    Augmentation is torchvision's ``RandomCrop((H, W), padding=pad)`` (zeros, before normalisation) and
    ``RandomHorizontalFlip()``, in distribution.  All random numbers of an epoch are drawn at its start on the CPU, so
    every device sees the same batches and a resumed loader continues with the very next one.

    Under ``torch.distributed`` each process gets its share of every batch: together they see what one process would.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), int64, on the device of ``images``.
        batch_size: Of all processes together.  The last batch of an epoch is smaller if N is no multiple.
        mean, std: C numbers each, on the scale 0 to 1: the batch is ``(images / 255 - mean) / std``.
        pad: Zero pixels added to each side before the random crop; 0 = no crop.
        flip: Mirror each image left to right with probability 1/2.
        shuffle: New order each epoch.
        seed: Of the loader's own generator; the global random state is left alone.
        even: All processes get equally many images, so that a mean of their means is the mean of all; of the last batch
            up to ``processes - 1`` images may then be left out.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        pad: int = 0,
        flip: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        even: bool = False,
    ) -> None:
        if images.dim() != 4 or images.dtype != torch.uint8 or labels.shape != images.shape[:1]:
            raise ValueError(
                "Loader: expected images (N, C, H, W) uint8 and labels (N,), "
                f"got {tuple(images.shape)} {images.dtype} and {tuple(labels.shape)}"
            )
        channels = images.shape[1]
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise ValueError(f"Loader: expected {channels} means and positive stds, got mean {mean} and std {std}")
        if batch_size < 1 or pad < 0:
            raise ValueError(f"Loader: expected batch_size >= 1 and pad >= 0, got {batch_size} and {pad}")
        if pad > max(images.shape[2:]):
            raise ValueError(f"Loader: expected a pad of at most {max(images.shape[2:])}, the images' size, got {pad}")
        self.rank, self.processes, self.even = parallel.rank(), parallel.processes(), even
        if even and batch_size % self.processes:
            raise ValueError(
                f"Loader: expected a batch_size that {self.processes} processes can share evenly, got {batch_size}"
            )
        self.images, self.labels = images, labels
        self.batch_size, self.pad, self.flip, self.shuffle = batch_size, pad, flip, shuffle
        self._scale, self._shift = normalisation(mean, std, images.device)
        self._generator = torch.Generator().manual_seed(seed)
        self._position = (self._generator.get_state(), 0)  # generator at the start of the epoch, batches handed out
        self._resume = False

    def __len__(self) -> int:
        """Batches of an epoch."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole + (rest >= (self.processes if self.even else 1))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, device = len(self.images), self.images.device
        first = 0
        if self._resume:
            epoch_start, first = self._position
            self._generator.set_state(epoch_start)
            self._resume = False
        epoch_start = self._generator.get_state()
        order = torch.randperm(n, generator=self._generator) if self.shuffle else torch.arange(n)
        row, column = torch.randint(2 * self.pad + 1, (2, n), generator=self._generator)
        flip = torch.rand(n, generator=self._generator) < 0.5
        order, row, column, flip = (t.to(device) for t in (order, row, column, flip))
        for batch in range(first, len(self)):
            part = share(n, batch, self.batch_size, self.rank, self.processes, self.even)
            index = order[part]
            x = self.images[index]
            if self.pad:
                x = _crop(x, self.pad, row[part], column[part])
            if self.flip:
                x = torch.where(flip[part, None, None, None], x.flip(3), x)
            # Before the yield, so that a state saved while the caller holds this batch continues with the next one.
            last = batch + 1 == len(self)
            self._position = (self._generator.get_state(), 0) if last else (epoch_start, batch + 1)
            if not len(index):
                continue  # the last batch has fewer images than there are processes
            yield x.float().mul_(self._scale).add_(self._shift), self.labels[index]

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; saved after any batch, the next one follows from it."""
        epoch_start, batch = self._position
        return {"epoch_start": epoch_start, "batch": batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was saved; takes effect at the next ``iter()``."""
        self._position, self._resume = (state["epoch_start"], state["batch"]), True

    def end_epoch(self) -> None:
        """Leave out what is left of the epoch."""
        self._position = (self._generator.get_state(), 0)


def normalisation(mean: Sequence[float], std: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift, (C, 1, 1) float32 each, so that ``uint8 * scale + shift`` is ``(uint8 / 255 - mean) / std``."""
    scale = torch.tensor(std, dtype=torch.float64).mul(255).reciprocal()
    shift = torch.tensor(mean, dtype=torch.float64).mul(-255) * scale
    return tuple(t.float().view(-1, 1, 1).to(device) for t in (scale, shift))


def share(n: int, batch: int, batch_size: int, rank: int, processes: int, even: bool) -> slice:
    """Of ``n`` images in batches, what process ``rank`` gets of batch number ``batch``."""
    first = batch * batch_size
    size = min(batch_size, n - first)
    if even:
        size -= size % processes
    return slice(first + size * rank // processes, first + size * (rank + 1) // processes)


def _crop(x: Tensor, pad: int, row: Tensor, column: Tensor) -> Tensor:
    """Of each zero-padded image in (B, C, H, W) the window that starts at ``row``, ``column``, both (B,)."""
    height, width = x.shape[2:]
    windows = F.pad(x, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)  # views; nothing is copied
    return windows[torch.arange(len(x), device=x.device), :, row, column]
