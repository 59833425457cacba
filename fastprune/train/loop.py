"""The training loop."""

from __future__ import annotations

import gc
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fastprune import parallel
from fastprune.checkpoint import about_method
from fastprune.errors import DataError, TrainingError
from fastprune.methods import Method
from fastprune.train.metrics import MetricsLog
from fastprune.train.resume import Checkpoints, own_random_numbers, remedy
from fastprune.train.step import Settings, Step

Batches = Iterable[tuple[Tensor, Tensor]]  # (images, labels)
CHECK_EVERY = 50  # steps between two looks at the loss: each look waits for the GPU


class History(list):
    """One dict per epoch, and the weights of the best one.

    Attributes:
        best: Epoch of the highest test accuracy (of the averaged weights, if there are), the first of equals; None
            before the first epoch.  Epochs before the model got smaller do not count.
        best_state: The state_dict after that epoch, of the averaged weights if there are.
        ema: The averaged weights at the end, a copy of the model; None without.
        summary: What the caller has to say about the run as a whole.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(rows)
        self.best: int | None = None
        self.best_state: dict[str, Tensor] = {}
        self.ema: nn.Module | None = None
        self.summary: dict[str, Any] = {}

    def add(self, row: dict[str, Any], model: nn.Module) -> None:
        self.append(row)
        state = model.state_dict()
        outdated = any(self.best_state[key].shape != value.shape for key, value in state.items() if self.best_state)
        if self.best is None or outdated or _score(row) > _score(self[self.best]):
            self.best = len(self) - 1
            self.best_state = {key: value.detach().clone() for key, value in state.items()}


def _score(row: dict[str, Any]) -> float:
    return row.get("ema_test_acc", row["test_acc"])


def fit(
    model: nn.Module,
    data: tuple[Batches, Batches],
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    schedule_every: str = "epoch",
    method: Method | None = None,
    until: Callable[[], bool] | None = None,
    log: MetricsLog | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float | None = 10.0,
    keep_going: bool = False,
    resume: bool = False,
    precision: str = "fp32",
    channels_last: bool = False,
    compile: bool | str | Mapping[str, Any] = False,
    clip_norm: float | None = None,
    accumulate: int = 1,
    ema: float | None = None,
    cuda_graph: bool = False,
    deterministic: bool = False,
    progress: bool = True,
) -> History:
    """Train a classifier; at the end ``model`` holds the last weights, the result also the best ones.

    With several processes (:mod:`fastprune.parallel`), all call ``fit`` alike.  Each trains on its share of every
    batch, gradients and criteria are averaged, so that all keep the same weights and cut the same channels; only the
    first one writes.  Where all were seeded alike, each draws random numbers of its own in here, such as the masks of
    its dropout layers, and all go on with those of the first one afterwards.  A model with batch norms equals that of
    one process if these look at all shares: convert it with :func:`fastprune.nn.convert_sync_batchnorm` before the
    method is made.

    Args:
        model: On the device of the data.
        data: Training and test batches of (images, labels), e.g. ``ImageSet.loaders(64)``.  To resume, the training
            batches need ``state_dict`` and ``load_state_dict``, within an epoch also a length.
        epochs: In all, those before a resumption included.
        optimizer: Over the parameters of ``model``.
        schedule: Of the learning rate.
        schedule_every: When it is stepped: after each ``"epoch"`` or ``"step"``.
        method: Its penalty is added to the loss and its ``step`` stands for the optimizer's.
        until: Asked after each step, the same in all processes; True ends the training there, after the test of a last,
            shorter epoch.  Such as ``lambda: method.finished``.
        log: Gets a row per epoch.  A resumed run first removes what was written behind the checkpoint.
        checkpoint: File with all that a resumed run needs, replaced before the first epoch, after the last one, and
            after those between unless writing would take more than a twentieth of the time.  A whole one is always
            there.
        checkpoint_minutes: Time after which it is replaced within an epoch; None: never.
        keep_going: If a checkpoint or a row cannot be written, warn and train on, instead of stopping.
        resume: Continue from ``checkpoint``, if it exists; on a CPU bit for bit as if uninterrupted.  With an optimizer
            of other learning rates than then, by these: the schedule goes on where it was.
        precision: ``"fp32"``, or for autocast ``"bf16"`` or ``"fp16"``.  The latter scales the loss, which methods that
            score by gradients refuse.
        channels_last: Bring model and images to this memory format.
        compile: Compile the forward, for each size of batch on its own: True, a mode such as ``"max-autotune"``, or
            keyword arguments of ``torch.compile``.  Evaluation runs eagerly.
        clip_norm: Scale the gradients of all parameters down to this norm, before the method reads them.
        accumulate: Batches whose gradients make one step together, as one large batch would but for the norms.
        ema: Decay per step of an exponential average of the weights, such as 0.999, which is evaluated as well and
            follows cuts; None: no average.
        cuda_graph: Replay each step as one launch, see :func:`fastprune.capture_step`; on a GPU, one process, without
            ``accumulate``.
        deterministic: Let PyTorch take deterministic algorithms only, and fail where there is none.
        progress: Show a bar, if stderr is a terminal.

    Returns: Rows of epoch, step, lr, train_loss (cross-entropy), penalty, train_acc, test_loss, test_acc (shares from 0
        to 1), seconds, images_per_s (training only); with ``ema`` also ema_test_loss and ema_test_acc.

    Raises:
        ValueError: An option out of range, fp16 with a method that refuses it, or a step that no CUDA graph can hold.
        TrainingError: The loss is not finite, or a file cannot be written; the message names step and learning rate,
            and the last good checkpoint, which is kept.
        CheckpointError: The file to resume from is damaged, or another run's.
        DataError: There are no training or no test images.
    """
    if schedule_every not in ("epoch", "step"):
        raise ValueError(f"fit: schedule_every must be 'epoch' or 'step', got {schedule_every!r}")
    settings = Settings(precision, channels_last, compile, clip_norm, accumulate, ema, cuda_graph)
    until = until or (lambda: False)
    run = _Run(model, data, optimizer, schedule, schedule_every, method, settings)
    run.files(log, Path(checkpoint) if checkpoint else None, checkpoint_minutes, keep_going)
    with _deterministic(deterministic), own_random_numbers(model):
        run.begin(resume, lambda: len(run.history) >= epochs or until())
        with _bar(progress, run, epochs) as bar:
            while not (len(run.history) >= epochs or until()):
                row = run.epoch(until, bar)
                run.save(must=len(run.history) == epochs or until() or run.checkpoints.due())
                bar.set_postfix_str(f"loss {row['train_loss']:.3f}, test accuracy {row['test_acc']:.2%}")
        return run.end()


class _Run:
    """What takes part in a run, and where it stands."""

    def __init__(
        self,
        model: nn.Module,
        data: tuple[Batches, Batches],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None,
        schedule_every: str,
        method: Method | None,
        settings: Settings,
    ) -> None:
        settings.check(next(model.parameters()).device, method)
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)
        self.model, self.optimizer, self.schedule, self.method = model, optimizer, schedule, method
        self.train, self.test = data
        self.schedule_every, self.settings = schedule_every, settings
        self.rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]  # the caller's
        self.history = History()
        self.tally = _Tally()  # of the epoch that is going on

    def files(self, log: MetricsLog | None, path: Path | None, minutes: float | None, keep_going: bool) -> None:
        """Say where the run is written down."""
        self.log = log if parallel.rank() == 0 else None
        self.unlogged: list[dict[str, Any]] = []  # rows that the disk had no room for
        # the method first: it makes the model as small as it was, before the weights come
        parts = {"method": self.method, "model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        self.checkpoints = Checkpoints(
            path, parts | {"train": self.train}, self._about(), self.log, minutes, keep_going
        )

    def _about(self) -> dict[str, str]:
        """What this run and a file to resume from must have in common, as the caller made it."""
        s, sizes = self.settings, [len(group["params"]) for group in self.optimizer.param_groups]
        about = {"optimizer": f"{type(self.optimizer).__name__} of {sizes} parameters"}
        about |= {"schedule": f"{type(self.schedule).__name__} by {self.schedule_every}"} if self.schedule else {}
        about |= {"method": str(about_method(self.method))} if self.method else {}
        about |= {"precision": s.precision, "accumulate": str(s.accumulate), "ema": str(s.ema)}
        about |= {"processes": str(parallel.processes())}
        about["training data"] = type(self.train).__name__
        if hasattr(self.train, "__len__"):
            about["training data"] += f" of {len(self.train)} batches"
        return about | {name: f"{tuple(t.shape)}" for name, t in self.model.state_dict().items()}

    def begin(self, resume: bool, over: Callable[[], bool]) -> None:
        """Go back to where the file stands, or write the first one."""
        lengths = parallel.gathered(len(self.train) if hasattr(self.train, "__len__") else None)
        if len(set(lengths)) > 1:  # those with more would wait for the others for ever
            raise ValueError(f"fit: expected as many training batches in each process, got {lengths}")
        parallel.copy_from_first([*self.model.parameters(), *self.model.buffers()])
        saved = self.checkpoints.load() if resume else None
        ema = None
        if self.settings.ema is not None:  # a copy of the model as small as it is by now
            ema = AveragedModel(self.model, multi_avg_fn=_averaging(self.settings.ema), use_buffers=True)
        self.step = Step(self.model, self.optimizer, self.method, ema, self.settings)
        later = {"ema": ema, "scaler": self.step.scaler}
        self.checkpoints.parts |= {name: part for name, part in later.items() if part is not None}
        if saved is None:
            self.save(must=True)
            return
        for name in later.keys() & saved.keys():
            self.checkpoints.parts[name].load_state_dict(saved[name])
        self.history = History(saved["rows"])
        self.history.best, self.history.best_state = saved["best"], saved["best_state"]
        self.unlogged = self.history[len(self.history) - saved["unlogged"] :]
        self._rescale(saved["rates"])
        self.tally.load_state_dict(saved["local"]["tally"])
        if self.log is not None and not over():  # what a run that is over has logged, others may have added to
            self.log.rewind(saved["log"])

    def _rescale(self, then: list[float]) -> None:
        """The file has brought its learning rates back; make them as much higher or lower as the caller's are now."""
        ratios = [now / old if old else 1.0 for now, old in zip(self.rates, then, strict=True)]
        if set(ratios) == {1.0}:
            return
        for group, ratio in zip(self.optimizer.param_groups, ratios, strict=True):
            for key in ("lr", "initial_lr", "max_lr", "min_lr"):  # the last two are OneCycleLR's
                if isinstance(group.get(key), Tensor):
                    group[key].mul_(ratio)
                elif key in group:
                    group[key] *= ratio
        _scale_schedule(self.schedule, ratios)

    def save(self, must: bool) -> None:
        h = self.history
        state = {"rows": list(h), "best": h.best, "best_state": h.best_state, "unlogged": len(self.unlogged)}
        state["rates"] = self.rates
        state |= {"local": {"tally": self.tally.state_dict()}}
        self.checkpoints.save(state, f"at step {self.tally.steps} of epoch {len(h)}", must)

    def epoch(self, until: Callable[[], bool], bar: tqdm) -> dict[str, Any]:
        """Train, or go on training, to the end of an epoch and test; the row of it."""
        row = {"epoch": len(self.history), "step": 0} | self._train(until, bar)
        row["step"] = row.pop("steps") + (self.history[-1]["step"] if self.history else 0)
        row |= {f"test_{key}": value for key, value in self._evaluate(self.model).items()}
        judged, ema = self.model, self.step.ema
        if ema is not None:
            judged = ema.module
            row |= {f"ema_test_{key}": value for key, value in self._evaluate(judged).items()}
        self.history.add(row, judged)
        if self.schedule is not None and self.schedule_every == "epoch":
            self.schedule.step()
        self._write(row)
        return row

    def _train(self, until: Callable[[], bool], bar: tqdm) -> dict[str, Any]:
        self.model.train()
        tally, checkpoints = self.tally, self.checkpoints
        tally.go(self.optimizer.param_groups[0]["lr"])
        for batches in _grouped(self.train, self.settings.accumulate):
            tally.add(self.step(batches), batches)
            if self.schedule is not None and self.schedule_every == "step":
                self.schedule.step()
            bar.update(len(batches))
            looked = tally.steps % CHECK_EVERY == 0
            if looked:
                self._check()
            if until():
                if hasattr(self.train, "end_epoch"):
                    self.train.end_epoch()
                break
            if (looked or parallel.processes() == 1) and self._within_epoch() and checkpoints.due():
                self._check()
                self.save(must=True)
        self._check()
        self.tally = _Tally()
        return tally.row()

    def _within_epoch(self) -> bool:
        """Whether a file written now could bring the training batches back to where they are."""
        known = hasattr(self.train, "state_dict") and hasattr(self.train, "__len__")
        return known and self.tally.batches < len(self.train)

    def _check(self) -> None:
        """Look at the losses since the last look; all processes see a loss that one of them has."""
        for i, loss in self.tally.losses():
            if not math.isfinite(loss):
                lr = self.optimizer.param_groups[0]["lr"]
                raise TrainingError(
                    f"fit: the loss is {loss} at step {i} of epoch {len(self.history)}, learning rate {lr:g}; lower "
                    f"the learning rate, or look for damaged images or labels{self.checkpoints.kept()}"
                )

    def _evaluate(self, model: nn.Module) -> dict[str, float]:
        parallel.copy_from_first(model.buffers())  # each process has seen its own batches
        return evaluate(model, self.test, self.settings.precision, self.settings.channels_last)

    def _write(self, row: dict[str, Any]) -> None:
        if self.log is None:
            return
        self.unlogged.append(row)
        try:
            while self.unlogged:
                self.log.write(self.unlogged[0])
                del self.unlogged[0]
        except OSError as error:
            text = f"fit: cannot write {self.log.path} ({error.strerror}){self.checkpoints.kept()}"
            if not self.checkpoints.keep_going:
                raise TrainingError(f"{text}; {remedy(error)} and resume") from error
            warnings.warn(f"{text}; going on", stacklevel=4)

    def end(self) -> History:
        if self.step.ema is not None:
            self.history.ema = self.step.ema.module
        del self.step
        if parallel.processes() > 1:
            gc.collect()  # a DistributedDataParallel that outlives its process group may hang
        return self.history


class _Tally:
    """Counts and sums of an epoch so far."""

    def __init__(self) -> None:
        self.batches = self.steps = self.images = 0
        self.seconds = self.lr = 0.0  # before the interruption; at the beginning
        self.totals = torch.zeros(3, dtype=torch.float64)  # cross-entropy of images, penalty of steps, right answers
        self._images, self._weights = -1, self.totals  # images of a step, and what it counts for in the totals
        self._losses: list[Tensor] = []  # (3,) each, since the last look
        self._start = time.perf_counter()

    def go(self, lr: float) -> None:
        """Begin, or go on after an interruption."""
        self._start = time.perf_counter()
        self.lr = self.lr if self.steps else float(lr)

    def add(self, seen: Tensor, batches: list[tuple[Tensor, Tensor]]) -> None:
        images = sum(len(y) for _, y in batches)
        if images != self._images:  # a tensor made in each step would make the host wait for the device
            self._images, self._weights = images, self.totals.new_tensor([images, 1, 1]).to(seen.device)
            self.totals = self.totals.to(seen.device)
        self.totals += seen * self._weights
        self._losses.append(seen)
        self.batches, self.steps, self.images = self.batches + len(batches), self.steps + 1, self.images + images

    def losses(self) -> list[tuple[int, float]]:
        """(step, mean over the processes of loss and penalty) since the last call."""
        if not self._losses:
            return []
        mean = parallel.mean_over_processes(torch.stack(self._losses)[:, :2]).sum(1).tolist()
        self._losses.clear()
        return list(enumerate(mean, self.steps - len(mean)))

    def row(self) -> dict[str, Any]:
        if not self.steps:
            raise DataError("fit: there are no training images")
        seconds = self.seconds + time.perf_counter() - self._start
        counts = self.totals.new_tensor([self.images, self.steps])
        loss, penalty, right, images, steps = parallel.sum_over_processes(torch.cat([self.totals, counts])).tolist()
        return {
            "steps": self.steps,
            "lr": self.lr,
            "train_loss": loss / images,
            "penalty": penalty / steps,
            "train_acc": right / images,
            "seconds": seconds,
            "images_per_s": images / seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        seconds = self.seconds + (time.perf_counter() - self._start if self.steps else 0.0)
        counts = {"batches": self.batches, "steps": self.steps, "images": self.images, "seconds": seconds}
        return counts | {"lr": self.lr, "totals": self.totals.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches, self.steps, self.images = state["batches"], state["steps"], state["images"]
        self.seconds, self.lr, self.totals = state["seconds"], state["lr"], state["totals"]


def _grouped(batches: Batches, size: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def _scale_schedule(schedule: Any, ratios: list[float]) -> None:
    """The rates that a schedule of PyTorch starts from, those inside SequentialLR and ChainedScheduler too."""
    for key in ("base_lrs", "max_lrs"):
        if hasattr(schedule, key):
            setattr(schedule, key, [lr * ratio for lr, ratio in zip(getattr(schedule, key), ratios, strict=True)])
    for inner in getattr(schedule, "_schedulers", ()):
        _scale_schedule(inner, ratios)


def _averaging(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """PyTorch's, but what is no float is copied: an index that is averaged is cut off to the one below."""
    average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        if averaged[0].is_floating_point() or averaged[0].is_complex():
            average(averaged, current, count)
        else:
            torch._foreach_copy_(averaged, current)

    return update


def _bar(progress: bool, run: _Run, epochs: int) -> tqdm:
    """Over batches where their number is known; in the first process only."""
    known = len(run.train) if hasattr(run.train, "__len__") else None
    return tqdm(
        total=known and known * epochs,
        initial=(known or 0) * len(run.history) + run.tally.batches,
        unit="batch",
        disable=None if progress and parallel.rank() == 0 else True,
    )


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms only, while it is on."""
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    unchanged = dict.fromkeys(("enabled", "benchmark_limit", "deterministic", "allow_tf32", "fp32_precision"))
    torch.use_deterministic_algorithms(True)
    try:
        with torch.backends.cudnn.flags(benchmark=False, **unchanged):  # plain assignment may be frozen
            yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, precision: str = "fp32", channels_last: bool = False
) -> dict[str, float]:
    """Mean cross-entropy ``loss`` and share of right answers ``acc`` over all images, in eval mode.

    Several processes must call it together, each with its share of the images, or each with all of them.
    """
    settings, was_training = Settings(precision, channels_last), model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
    images = 0
    for x, y in batches:
        logits = settings.forward(model, x)
        loss, right = F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()
        totals += torch.stack([loss, right])
        images += len(y)
    model.train(was_training)
    totals = torch.cat([totals, totals.new_tensor([images])])
    loss, right, images = parallel.sum_over_processes(totals).tolist()
    if not images:
        raise DataError("evaluate: there are no test images")
    return {"loss": loss / images, "acc": right / images}
