"""``fastprune oracle``: how well do the criteria know what a channel is worth?

A network is trained; each channel is removed by itself and the loss taken anew, which is the oracle; every criterion
scores the channels on the same images; and rank correlations with the oracle are reported, by layer and over all.
Source: Molchanov et al., CVPR 2019, arXiv:1906.10771, table 1.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune import data as datasets
from fastprune.errors import DataError, did_you_mean
from fastprune.gates import GateSpec, find_gates
from fastprune.graph import trace
from fastprune.methods import METHODS, create
from fastprune.methods.base import IDS
from fastprune.methods.taylor import Curvature, TaylorOptions
from fastprune.oracle import correlations, loss_without
from fastprune.quickstart import aligned, environment
from fastprune.train import train

NUMBERS = {name: number for number, name in IDS.items()}
CRITERIA = tuple(name for _, name in sorted(IDS.items()) if name != "oracle")
MEASURES = {"spearman": "Spearman", "kendall": "Kendall", "pearson": "Pearson"}


class Comparison(NamedTuple):
    """What :func:`compare` found.

    gates: The gates by name, in order.
    loss: With all channels.
    changes: Gate to (C,) float64: the loss without a channel minus ``loss``.
    scores: Criterion to gate to (C,) float64.
    agreement: Criterion to gate, or ``"all"``, to ``{"spearman", "kendall", "pearson"}`` with the squared changes; NaN
        where either side is constant.  A gate of one channel is only in ``"all"``.
    """

    gates: dict[str, GateSpec]
    loss: float
    changes: dict[str, Tensor]
    scores: dict[str, dict[str, Tensor]]
    agreement: dict[str, dict[str, dict[str, float]]]


def criterion_name(text: str | int) -> str:
    """Name of a criterion of gates given by name or number, such as ``"taylor-gate"`` or 22.

    Raises:
        ValueError: There is none.
    """
    known = [name for name, cls in METHODS.items() if issubclass(cls.Options, TaylorOptions) and name != "oracle"]
    if str(text).isdecimal():
        if IDS.get(int(text)) not in known:
            raise ValueError(f"unknown criterion {text}; known numbers: {sorted(NUMBERS[name] for name in CRITERIA)}")
        return IDS[int(text)]
    if text not in known:
        raise ValueError(f"unknown criterion {text!r}{did_you_mean(text, known)}")
    return text


def compare(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    criteria: Sequence[str | int] = CRITERIA,
    *,
    variant: str = "paper",
    seed: int = 0,
) -> Comparison:
    """Score every channel by each criterion, and compare with the loss without that channel.

    All see one function: the model in eval mode, cross-entropy, the same batches.  Criteria made step by step get a
    forward and a backward per batch, and are averaged over the batches; no step is made.

    Args:
        model: Left as it is, bit for bit: copies are measured.
        batches: (inputs, labels) on the model's device.
        criteria: Names or numbers, see :mod:`fastprune.methods.taylor`; by default all but the oracle itself.
        variant: ``"paper"`` or ``"code"``, as the criteria take it.
        seed: Of ``taylor-random``.

    Raises:
        ValueError: An unknown criterion, or one that does not fit the model.
        DataError: There are no batches.
    """
    names, batches = [criterion_name(c) for c in criteria], list(batches)
    if not batches:
        raise DataError("compare: expected batches of (inputs, labels), got none")
    model, example = copy.deepcopy(model).eval(), batches[0][0][:2]
    gates = find_gates(model, trace(model, example))
    with torch.no_grad():
        loss = sum(F.cross_entropy(model(x), y, reduction="sum").item() for x, y in batches)
    changes = loss_without(model, list(gates), batches, example_inputs=example).mean
    truth = {name: change.square() for name, change in changes.items()}
    options = {"variant": variant, "seed": seed, "data": batches}
    scores, agreement, derivatives = {}, {}, []
    for name in names:
        taken = {f.name for f in fields(METHODS[name].Options)}
        mine = {key: value for key, value in options.items() if key in taken}
        scores[name] = _scores(name, copy.deepcopy(model), batches, mine, derivatives)
        agreement[name] = correlations(scores[name], {group: truth[group] for group in scores[name]})
    return Comparison(gates, loss / sum(len(x) for x, _ in batches), changes, scores, agreement)


class _Still(torch.optim.Optimizer):
    """Makes no step, so that every batch sees the same weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})

    def step(self, closure: Any = None) -> None:
        return None


def _scores(
    name: str,
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    options: dict[str, Any],
    derivatives: list[tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """``derivatives`` carries the exact Hessian, by far the dearest part, from one criterion to the next."""
    method = create(name, model, batches[0][0][:2], **options)
    if isinstance(method, Curvature):
        if not derivatives:
            derivatives.append(method.derivatives())
        method.derivatives = lambda: derivatives[0]
    if method.per_step:
        still = _Still(model)
        for x, y in batches:
            model.zero_grad()
            (F.cross_entropy(model(x), y) + method.penalty()).backward()
            method.step(still)
    return {group: score.double().cpu() for group, score in method.scores().items()}


def run(
    out: Path,
    *,
    dataset: str = "digits",
    root: Path | None = None,
    name: str | None = None,
    arch: str = "resnet20",
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 0.1,
    limit: int | None = None,
    images: int = 512,
    criteria: Sequence[str] = CRITERIA,
    variant: str = "paper",
    seed: int = 0,
    device: str | None = None,
    resume: bool = False,
) -> int:
    """Train, compare, print the summary; ``oracle.md``, ``oracle.json``, ``scores.json`` and ``train/`` go to ``out``.

    Args:
        out: Folder, made if need be.
        dataset, root, arch, epochs, batch_size, lr, limit, seed, device: As :func:`fastprune.train`, without a penalty.
        name: What the report calls the data; None: the folder's name, or else the data set's.
        images: Training images, without augmentation, on which oracle and criteria are taken, in batches of
            ``batch_size``.
        criteria, variant: As in :func:`compare`.
        resume: Continue, or use again, the training that an earlier run left in ``out``.

    Returns: 0, the exit code.

    Raises:
        ValueError, DataError: As :func:`fastprune.train` and :func:`compare`.
        OSError: ``out`` cannot be written.
    """
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    data = datasets.load(dataset, root, device=device, limit=limit)
    if not isinstance(data, datasets.ImageSet):
        raise ValueError(f"oracle: expected a data set that fits in memory, got {dataset}; take imagefolder")
    print(f"Train {arch} on {len(data.train_labels)} images of {dataset}, {epochs} epochs", flush=True)
    if resume and (log := out / "train" / "metrics.jsonl").exists():
        before = json.loads(log.read_text().partition("\n")[0])
        if (before["dataset"], before["arch"]) != (data.name, arch):
            had = f"{before['arch']} on {before['dataset']}"
            raise ValueError(f"oracle: --resume: {out} holds {had}, not {arch} on {data.name}; name another --out")
    shared = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "device": device}
    model, logs = train(data, arch, "ucs", **shared, out_dir=out / "train", resume=resume)
    trained = time.perf_counter()
    part = data.limit(images)
    batches = datasets.Loader(part.train_images, part.train_labels, batch_size=batch_size, mean=data.mean, std=data.std)
    print(f"Loss without each channel, and {len(criteria)} criteria, on {len(part.train_labels)} images", flush=True)
    found = compare(model, batches, criteria, variant=variant, seed=seed)
    now = time.perf_counter()
    setup = {
        "dataset": dataset, "data": name or (root.name if root else dataset), "arch": arch, **shared,
        "train_images": len(data.train_labels), "image_shape": list(data.image_shape),
        "images": len(part.train_labels), "variant": variant,
        "seconds": {"train": round(sum(row["seconds"] for row in logs), 1), "compare": round(now - trained, 1)},
        "environment": environment(),
    }  # fmt: skip
    network = {
        "test_acc": logs[logs.best]["test_acc"], "loss": found.loss,
        "layers": len(found.gates), "channels": sum(gate.size for gate in found.gates.values()),
    }  # fmt: skip
    result = {"setup": setup, "network": network} | as_json(found)
    scores = {"oracle change of the loss": found.changes, **found.scores}
    _write(out / "scores.json", {name: {g: t.tolist() for g, t in by.items()} for name, by in scores.items()})
    _write(out / "oracle.json", result)
    (out / "oracle.md").write_text(page(result))
    print(f"\n{summary(result)}\n\nDone in {now - start:.0f} s. By layer: {out / 'oracle.md'}")
    return 0


def _write(path: Path, thing: Any) -> None:
    path.write_text(json.dumps(thing, indent=1, allow_nan=False) + "\n")


def as_json(found: Comparison) -> dict[str, Any]:
    """Layers, and by criterion the correlations and their mean and median over layers; None where undefined."""
    layers = [{"name": g.name, "kind": g.kind, "channels": g.size} for g in found.gates.values()]
    rows = []
    for name, by_group in found.agreement.items():
        row = {"criterion": name, "id": NUMBERS.get(name), "channels": sum(map(len, found.scores[name].values()))}
        for measure in MEASURES:
            by_layer = {group: _or_none(values[measure]) for group, values in by_group.items()}
            over_all = by_layer.pop("all")
            defined = [value for value in by_layer.values() if value is not None]
            row[measure] = {
                "all": over_all,
                "mean": statistics.fmean(defined) if defined else None,
                "median": statistics.median(defined) if defined else None,
                "layers": by_layer,
            }
        rows.append(row)
    return {"layers": layers, "criteria": rows}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def summary(result: dict[str, Any]) -> str:
    """Markdown table, the criterion that agrees best over all layers first."""
    first = lambda row: -2.0 if row["spearman"]["all"] is None else row["spearman"]["all"]  # noqa: E731
    columns = [
        *((measure, over) for measure in ("spearman", "kendall") for over in ("all", "mean", "median")),
        ("pearson", "all"),
    ]
    header = ["criterion", "id", "channels", *(f"{MEASURES[m]} {over}" for m, over in columns)]
    cells = [
        [row["criterion"], "-" if row["id"] is None else str(row["id"]), str(row["channels"])]
        + [_cell(row[measure][over]) for measure, over in columns]
        for row in sorted(result["criteria"], key=first, reverse=True)
    ]
    return aligned(header, cells)


def page(result: dict[str, Any]) -> str:
    """The report, in Markdown."""
    setup, network = result["setup"], result["network"]
    versions = ", ".join(f"{key} {setup['environment'][key]}" for key in ("fastprune", "torch", "machine", "threads"))
    size, seconds = "x".join(map(str, setup["image_shape"])), setup["seconds"]
    lines = [
        f"# Criteria against the oracle: {setup['arch']} on {setup['data']}",
        "",
        "Written by `fastprune oracle`; all numbers are in `oracle.json` beside this page.",
        "",
        f"Network: {setup['arch']}, trained on {setup['train_images']} images of {size} for {setup['epochs']} epochs "
        f"(SGD, learning rate {setup['lr']:g}, batch {setup['batch_size']}, seed {setup['seed']}) to "
        f"{network['test_acc']:.1%} test accuracy.",
        "",
        f"Oracle: in eval mode on {setup['images']} training images without augmentation (loss "
        f"{network['loss']:.3g}), each of the {network['channels']} channels in {network['layers']} layers was removed "
        "by itself. The square of the loss's change is what the criteria are compared with; they saw the same images, "
        f"in batches of {setup['batch_size']}, variant `{setup['variant']}`.",
        "",
        "Correlations run from -1 to 1; 0 is chance. *all*: the channels of all layers in one ranking, so a criterion "
        "must also compare layers. *mean*, *median*: over the layers, each ranked within itself. A dash: undefined, as "
        "the scores or the oracle are constant or the criterion leaves the layer out.",
        "",
        summary(result),
    ]
    for measure in ("spearman", "kendall"):
        rows = result["criteria"]
        header = ["layer", "gate", "channels", *(str(r["criterion"] if r["id"] is None else r["id"]) for r in rows)]
        cells = [
            [layer["name"], layer["kind"], str(layer["channels"])]
            + [_cell(row[measure]["layers"].get(layer["name"])) for row in rows]
            for layer in result["layers"]
        ]
        lines += ["", f"## {MEASURES[measure]} within each layer, by criterion's id", "", aligned(header, cells)]
    took = f"Training took {seconds['train']:g} s, oracle and criteria {seconds['compare']:g} s"
    return "\n".join([*lines, "", f"{took}; {versions}.", ""])
