"""Train, prune in one shot, fine-tune: the two calls of RNI's authors (arXiv:2204.06404), same names and meaning."""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune import data as datasets
from fastprune import methods, models, parallel
from fastprune import nn as fpnn
from fastprune.compact import compact
from fastprune.errors import TrainingError, did_you_mean
from fastprune.flops import flops
from fastprune.train.loop import History, evaluate, fit
from fastprune.train.metrics import MetricsLog
from fastprune.train.optim import multistep, sgd
from fastprune.train.step import Settings
from fastprune.version import __version__

RECORDED = ("channels_last", "clip_norm", "accumulate", "ema", "cuda_graph", "deterministic")  # in the log's first row
METHODS = {"rni": "rni", "ucs": "ucs", "l1": "slimming"}  # the authors' names to ours
ARCHS = {"vgg16": "vgg16-rni", "resnet56": "resnet56-rni"}


def train(
    dataset: str | datasets.ImageSet | datasets.StreamSet = "cifar10",
    arch: str = "vgg16",
    method: str = "rni",
    reg_weight: float = 1e-4,
    b: float = 3,
    epochs: int = 160,
    lr: float = 0.1,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    *,
    arch_options: Mapping[str, Any] | None = None,
    root: str | Path | None = None,
    out_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_minutes: float | None = 10.0,
    precision: str = "fp32",
    channels_last: bool = False,
    compile: bool | str | Mapping[str, Any] = False,
    clip_norm: float | None = None,
    accumulate: int = 1,
    ema: float | None = None,
    cuda_graph: bool = False,
    keep_going: bool = False,
    sync_batchnorm: bool = False,
    deterministic: bool = False,
    tensorboard: bool = False,
    fuse: bool = True,
    progress: bool = True,
    limit: int | None = None,
) -> tuple[nn.Module, History]:
    """Train a network that can be pruned later.

    Args:
        dataset: Name for :func:`fastprune.data.load`, or a set already loaded.
        arch: ``"vgg16"`` and ``"resnet56"`` are the authors' networks; else a name for ``fastprune.models.create``.
        method: ``"rni"`` (bounded scales), ``"l1"`` (network slimming) or ``"ucs"`` (no penalty).
        reg_weight: Strength of the sparsity penalty; ``ucs`` has none.
        b: Shift of RNI's penalty; nothing to the others.
        lr: Divided by 10 after 50 % and 75 % of the epochs.
        seed: Of initialisation, order and augmentation; sets PyTorch's global seed.
        device: None: the first GPU if there is one, else the CPU.  Under ``torchrun`` the processes train together,
            each on its share of every batch, with ``"cuda"`` or None each on its own GPU.
        arch_options: Further arguments of the network, e.g. ``{"width": 0.25}`` for ``"vgg16"``.
        root: Folder of the data set.
        out_dir: For ``metrics.jsonl`` and ``last.pt``; None: ``runs/train-<dataset>-<arch>-<method>/seed<seed>``.
        resume: Continue from ``out_dir/last.pt``, if it exists.
        sync_batchnorm: Under ``torchrun``: norms look at the batches of all processes.
        tensorboard: Write the log for TensorBoard, too, to ``out_dir``; needs its package.
        checkpoint_minutes, precision, channels_last, compile, clip_norm, accumulate, cuda_graph, keep_going: As in
            :func:`fit`; also ``deterministic`` and ``progress``.
        ema: As in :func:`fit`; the averaged weights are those that are returned.
        fuse: Run each norm and the ReLU behind it as one kernel; the results differ in rounding only.
        limit: At most so many training and test images, for trials.

    Returns: The model with the weights of the best epoch (on the test set, as the authors choose it), and the log:
        ``logs[-1]`` is the last epoch, ``logs.best`` the number of the best one.

    Raises:
        ValueError: An unknown name, or a value out of range.
        DataError: The data set is missing or damaged.
        TrainingError: The loss is not finite.
    """
    name = _method(method)
    fitting = {"resume": resume, "checkpoint_minutes": checkpoint_minutes, "progress": progress}
    fitting |= {"precision": precision, "channels_last": channels_last, "compile": compile, "clip_norm": clip_norm}
    fitting |= {"accumulate": accumulate, "ema": ema, "deterministic": deterministic, "cuda_graph": cuda_graph}
    fitting |= {"keep_going": keep_going}
    device = parallel.start(device)
    data = _load(dataset, root, device, limit)
    torch.manual_seed(seed)  # before the model is made; the authors seed after, so theirs fixes only the order
    model = _build(arch, arch_options or {}, data, "sigmoid" if method == "rni" else None).to(device)
    if fuse:
        model = fpnn.convert_batchnorm(model, fuse=True)
    if sync_batchnorm:
        model = fpnn.convert_sync_batchnorm(model)
    options = {"rni": {"reg_weight": reg_weight, "b": b}, "slimming": {"reg_weight": reg_weight}, "ucs": {}}[name]
    pruner = methods.create(name, model, datasets.example_of(data), **options)
    what = {"call": "train", "dataset": data.name, "arch": arch, "method": method, **options}
    what |= {"arch_options": dict(arch_options or {})}
    what |= {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "precision": precision}
    out = Path(out_dir or f"runs/train-{data.name}-{arch}-{method}/seed{seed}")
    return _fit(model, data, pruner, what, out, tensorboard, fitting)


def prune_finetune(
    model: nn.Module,
    dataset: str | datasets.ImageSet | datasets.StreamSet = "cifar10",
    method: str = "rni",
    prune_pc: float = 0.5,
    epochs: int = 160,
    lr: float = 0.1,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    *,
    coupled: bool = False,
    target_macs: float | None = None,
    target_params: float | None = None,
    root: str | Path | None = None,
    out_dir: str | Path | None = None,
    resume: bool = False,
    checkpoint_minutes: float | None = 10.0,
    precision: str = "fp32",
    channels_last: bool = False,
    compile: bool | str | Mapping[str, Any] = False,
    clip_norm: float | None = None,
    accumulate: int = 1,
    ema: float | None = None,
    cuda_graph: bool = False,
    keep_going: bool = False,
    sync_batchnorm: bool = False,
    deterministic: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
    limit: int | None = None,
) -> tuple[nn.Module, History]:
    """Remove the least important channels at once and fine-tune what is left, without a sparsity penalty.

    Args:
        model: Trained with the same ``method``; left as it is, a copy is pruned.
        method: ``"rni"`` and ``"l1"`` rank all channels together, ``"ucs"`` those of each layer.
        prune_pc: Share of the prunable channels to remove, 0 <= prune_pc < 1; at least 3 stay in each layer.
        coupled: Also prune channels that several convolutions write (residual streams); the authors do not.
        target_macs, target_params: In place of ``prune_pc``: what the pruned model may have at most; a share of the
            model's if at most 1, else a number.
        dataset, epochs, lr, batch_size, seed, device, root, out_dir, resume, limit and the others: As in :func:`train`.

    Returns: The pruned model, physically smaller, with the weights of its best epoch, and the log.  ``logs.summary``
        holds accuracy before and after the cut (no fine-tuning), and MACs, parameters and latency of both models.

    Raises:
        ValueError: As :func:`train`, or a model the method does not fit.
        GraphError: The shrunk model does not compute what the masked one does.
    """
    name = _method(method)
    fitting = {"resume": resume, "checkpoint_minutes": checkpoint_minutes, "progress": progress}
    fitting |= {"precision": precision, "channels_last": channels_last, "compile": compile, "clip_norm": clip_norm}
    fitting |= {"accumulate": accumulate, "ema": ema, "deterministic": deterministic, "cuda_graph": cuda_graph}
    fitting |= {"keep_going": keep_going}
    device = parallel.start(device)
    data = _load(dataset, root, device, limit)
    targets = {"target_macs": target_macs, "target_params": target_params}
    targets = {key: value for key, value in targets.items() if value is not None}
    if targets and prune_pc != 0.5:
        raise ValueError(f"prune_finetune: expected prune_pc or a target, got {prune_pc:g} and {next(iter(targets))}")
    ratio = None if targets else prune_pc
    model = copy.deepcopy(model).to(device)
    test, example = data.loaders(batch_size).test, datasets.example_of(data)
    before = {"acc": evaluate(model, test, precision)["acc"], **_cost(model, example, batch_size)}
    keep = methods.create(name, model, example, ratio, coupled=coupled, **targets).keep_masks()
    if not parallel.same_masks(keep.values(), device):
        raise TrainingError("prune_finetune: the processes were given different models, and chose different channels")
    model = compact(model, keep, example)
    if sync_batchnorm:
        model = fpnn.convert_sync_batchnorm(model)
    after = {"acc": evaluate(model, test, precision)["acc"], **_cost(model, example, batch_size)}
    kept = {group: [int(mask.sum()), len(mask)] for group, mask in keep.items()}
    torch.manual_seed(seed)
    what = {"call": "prune_finetune", "dataset": data.name, "method": method, "prune_pc": ratio}
    what |= targets
    what |= {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "precision": precision}
    what |= {"dense": before, "pruned": after, "kept": kept}
    cut = "-".join(f"{key.removeprefix('target_')}{value:g}" for key, value in targets.items()) or f"{prune_pc:g}"
    out = Path(out_dir or f"runs/prune-{data.name}-{type(model).__name__}-{method}-{cut}/seed{seed}")
    return _fit(model, data, None, what, out, tensorboard, fitting)


def _fit(
    model: nn.Module,
    data: datasets.ImageSet | datasets.StreamSet,
    method: methods.Method | None,
    what: dict[str, Any],
    out: Path,
    tensorboard: bool,
    fitting: dict[str, Any],
) -> tuple[nn.Module, History]:
    epochs, lr = what["epochs"], what["lr"]
    if epochs < 1 or lr <= 0:
        raise ValueError(f"{what['call']}: expected epochs >= 1 and lr > 0, got {epochs} and {lr}")
    device = next(model.parameters()).device
    Settings.of(fitting).check(device, method)  # before there is a folder
    what |= {key: value for key, value in fitting.items() if key in RECORDED and value}
    what |= {"fastprune": __version__, "torch": str(torch.__version__), "device": str(device)}
    log = MetricsLog(out / "metrics.jsonl", out if tensorboard and parallel.rank() == 0 else None)
    if parallel.rank() == 0 and not (fitting["resume"] and (out / "last.pt").exists()):
        log.start(what)
    optimizer = sgd(model, lr)
    logs = fit(
        model,
        data.loaders(what["batch_size"], what["seed"]),
        epochs=epochs,
        optimizer=optimizer,
        schedule=multistep(optimizer, epochs),
        method=method,
        log=log,
        checkpoint=out / "last.pt",
        **fitting,
    )
    model.load_state_dict(logs.best_state)
    logs.summary = what
    return model, logs


def _method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{did_you_mean(name, METHODS)}")
    return METHODS[name]


def _load(
    dataset: str | datasets.ImageSet | datasets.StreamSet,
    root: str | Path | None,
    device: torch.device,
    limit: int | None,
) -> datasets.ImageSet | datasets.StreamSet:
    if isinstance(dataset, str):
        return datasets.load(dataset, root, device=device, limit=limit)
    return (dataset if limit is None else dataset.limit(limit)).to(device)


def _build(
    arch: str, options: Mapping[str, Any], data: datasets.ImageSet | datasets.StreamSet, bound: str | None
) -> nn.Module:
    name, channels = ARCHS.get(arch, arch), data.image_shape[0]
    if fn := models.MODELS.get(name):
        taken = inspect.signature(fn).parameters
        ours = {"in_channels": channels, "bound": bound}
        ours = {key: value for key, value in ours.items() if key in taken}
        return models.create(name, len(data.classes), **(ours | dict(options)))
    model = models.create(name, len(data.classes), **options)
    return fpnn.convert_batchnorm(model, bound=bound, fuse=False) if bound else model


def _cost(model: nn.Module, example: Tensor, batch_size: int) -> dict[str, float]:
    """MACs and parameters, and the milliseconds of a forward of ``batch_size`` images: median of 7."""
    count = flops(model, example[:1])
    x = example[:1].expand(batch_size, -1, -1, -1).contiguous()

    def run_ms() -> float:
        start = time.perf_counter()
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return 1e3 * (time.perf_counter() - start)

    was_training = model.training
    model.eval()
    with torch.no_grad():
        latency_ms = statistics.median([run_ms() for _ in range(9)][2:])  # the first ones warm up
    model.train(was_training)
    return {"macs": count["macs"], "params": count["params"], "latency_ms": latency_ms}
