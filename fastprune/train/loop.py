"""The training loop."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastprune.errors import DataError, TrainingError
from fastprune.methods import Method
from fastprune.train.metrics import MetricsLog

Batches = Iterable[tuple[Tensor, Tensor]]  # (images, labels)
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
CHECK_EVERY = 50  # steps between two looks at the loss: each look waits for the GPU


class History(list):
    """One dict per epoch, and the weights of the best one.

    Attributes:
        best: Epoch of the highest test accuracy, the first of equals; None before the first epoch.
        best_state: The model's state_dict after that epoch.
        summary: What the caller has to say about the run as a whole.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(rows)
        self.best: int | None = None
        self.best_state: dict[str, Tensor] = {}
        self.summary: dict[str, Any] = {}

    def add(self, row: dict[str, Any], model: nn.Module) -> None:
        self.append(row)
        if self.best is None or row["test_acc"] > self[self.best]["test_acc"]:
            self.best = len(self) - 1
            self.best_state = {key: value.detach().clone() for key, value in model.state_dict().items()}


def fit(
    model: nn.Module,
    data: tuple[Batches, Batches],
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    method: Method | None = None,
    log: MetricsLog | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    precision: str = "fp32",
    channels_last: bool = False,
    progress: bool = True,
) -> History:
    """Train a classifier; at the end ``model`` holds the last weights, the result also the best ones.

    Args:
        model: On the device of the data.
        data: Training and test batches of (images, labels), e.g. ``ImageSet.loaders(64)``.
        epochs: In all, those before a resumption included.
        optimizer: Over the parameters of ``model``.
        schedule: Stepped after each epoch.
        method: Its penalty is added to the loss and its ``step`` stands for the optimizer's.
        log: Gets a row per epoch.
        checkpoint: File with all that a resumed run needs, replaced after the first and the last epoch, and after those
            between unless writing would take more than a twentieth of the time.  A whole one is always there.
        resume: Continue from ``checkpoint``, if it exists; on a CPU bit for bit as if uninterrupted.
        precision: ``"fp32"``, or ``"bf16"`` for autocast.
        channels_last: Bring model and images to this memory format.
        progress: Show a bar, if stderr is a terminal.

    Returns: Rows of epoch, step, lr, train_loss (cross-entropy), penalty, train_acc, test_loss, test_acc (shares from 0
        to 1), seconds, images_per_s (training only).

    Raises:
        TrainingError: The loss is not finite; the message names step and learning rate.
        DataError: There are no training or no test images.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"fit: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    train, test = data
    if channels_last:
        model.to(memory_format=torch.channels_last)
    state = _State(model, optimizer, schedule, train, method, Path(checkpoint) if checkpoint else None)
    history = state.load() if resume else History()
    with tqdm(total=epochs, initial=len(history), unit="epoch", disable=None if progress else True) as bar:
        for epoch in range(len(history), epochs):
            row = {"epoch": epoch, "step": 0, "lr": optimizer.param_groups[0]["lr"]}
            row |= _train_epoch(model, train, optimizer, method, epoch, precision, channels_last)
            row |= {f"test_{key}": v for key, v in evaluate(model, test, precision, channels_last).items()}
            row["step"] = row.pop("steps") + (history[-1]["step"] if history else 0)
            history.add(row, model)
            if schedule is not None:
                schedule.step()
            if log is not None:
                log.write(row)
            state.save(history, must=epoch + 1 == epochs)
            bar.update()
            bar.set_postfix_str(f"loss {row['train_loss']:.3f}, test accuracy {row['test_acc']:.2%}")
    return history


def _train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    method: Method | None,
    epoch: int,
    precision: str,
    channels_last: bool,
) -> dict[str, Any]:
    model.train()
    start, images, steps = time.perf_counter(), 0, 0
    losses: list[Tensor] = []  # since the last check
    totals: Tensor | None = None  # cross-entropy over images, penalty over steps, correct answers; on the device

    def check() -> None:
        for i, loss in enumerate(torch.stack(losses).tolist(), steps - len(losses)):
            if not math.isfinite(loss):
                lr = optimizer.param_groups[0]["lr"]
                raise TrainingError(
                    f"fit: the loss is {loss} at step {i} of epoch {epoch}, learning rate {lr:g}; "
                    "lower the learning rate, or look for damaged images or labels"
                )
        losses.clear()

    for x, y in batches:
        logits = _forward(model, x, precision, channels_last)
        loss = F.cross_entropy(logits, y)
        penalty = method.penalty() if method is not None else torch.zeros_like(loss)
        optimizer.zero_grad()
        (loss + penalty).backward()
        if method is not None:
            method.step(optimizer, loss.detach())
        else:
            optimizer.step()
        with torch.no_grad():
            seen = torch.stack([loss * len(y), penalty, (logits.argmax(1) == y).sum()])
            totals = seen if totals is None else totals + seen
            losses.append(loss.detach() + penalty.detach())
        images, steps = images + len(y), steps + 1
        if len(losses) == CHECK_EVERY:
            check()
    if totals is None:
        raise DataError("fit: there are no training images")
    if losses:
        check()
    loss_sum, penalty_sum, correct = totals.tolist()
    seconds = time.perf_counter() - start
    return {
        "steps": steps,
        "train_loss": loss_sum / images,
        "penalty": penalty_sum / steps,
        "train_acc": correct / images,
        "seconds": seconds,
        "images_per_s": images / seconds,
    }


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, precision: str = "fp32", channels_last: bool = False
) -> dict[str, float]:
    """Mean cross-entropy ``loss`` and share of right answers ``acc`` over all images, in eval mode."""
    was_training = model.training
    model.eval()
    totals, images = None, 0
    for x, y in batches:
        logits = _forward(model, x, precision, channels_last)
        seen = torch.stack([F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()])
        totals = seen if totals is None else totals + seen
        images += len(y)
    model.train(was_training)
    if totals is None:
        raise DataError("evaluate: there are no test images")
    loss, correct = totals.tolist()
    return {"loss": loss / images, "acc": correct / images}


def _forward(model: nn.Module, x: Tensor, precision: str, channels_last: bool) -> Tensor:
    """Logits in float32."""
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    dtype = PRECISIONS[precision]
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        return model(x).float()


class _State:
    """All that a resumed run needs, in one file, so that its parts always belong together."""

    def __init__(self, model, optimizer, schedule, train, method, path: Path | None) -> None:
        # the method first: it makes the model as small as it was, before the weights come
        parts = {"method": method, "model": model, "optimizer": optimizer, "schedule": schedule, "train": train}
        self.parts = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
        self.path = path
        self.not_before = 0.0  # time.monotonic() of the next save

    def save(self, history: History, must: bool) -> None:
        start = time.monotonic()
        if self.path is None or (start < self.not_before and not must):
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"rows": list(history), "best": history.best, "best_state": history.best_state}
        state["rng"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            state["cuda_rng"] = torch.cuda.get_rng_state_all()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        end = time.monotonic()
        self.not_before = end + 20 * (end - start)

    def load(self) -> History:
        if self.path is None:
            raise ValueError("fit: resume=True needs checkpoint, the file to continue from")
        if not self.path.exists():
            return History()
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        history = History(state["rows"])
        history.best, history.best_state = state["best"], state["best_state"]
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        return history
