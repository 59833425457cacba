"""``fastprune quickstart``: train, prune, fine-tune and compare three methods on handwritten digits, on the CPU."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastprune
from fastprune import backends, data, methods
from fastprune.errors import DataError
from fastprune.train import prune_finetune, train

ARCH = "vgg-small"
EPOCHS = 40
RATIOS = (0.5, 0.9)
CHANCE = 0.1  # ten digits
SETTINGS = {"lr": 0.1, "batch_size": 64}
PENALTY = {  # the strengths that did best of those tried on other seeds, see docs/results/quickstart.md
    "rni": {"reg_weight": 0.1, "b": 3},
    "l1": {"reg_weight": 3e-3},
    "ucs": {},
}


def run(out: Path, *, seed: int = 0, epochs: int | None = None) -> int:
    """Run it all and print the table; ``importances.png``, ``results.json``, ``results.md`` and logs go to ``out``.

    Args:
        out: Folder, made if need be.
        seed: Of initialisation and batch order.
        epochs: Of each training and each fine-tuning; None is 40.

    Returns: 0, the exit code.

    Raises:
        DataError: scikit-learn or matplotlib is missing.
        OSError: ``out`` cannot be written.
    """
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    if missing := [package for module, package in packages.items() if not find_spec(module)]:
        names = " ".join(missing)
        raise DataError(f"quickstart: {names.replace(' ', ' and ')} not installed; pip install {names}")
    out.mkdir(parents=True, exist_ok=True)
    start, epochs = time.perf_counter(), epochs or EPOCHS
    digits = data.load("digits")
    shared = {"epochs": epochs, **SETTINGS, "seed": seed, "device": "cpu"}
    print(
        f"{len(digits.train_labels)} handwritten digits to train on, {len(digits.test_labels)} to test on; "
        f"network {ARCH}, {epochs} epochs each time"
    )
    total = len(PENALTY) * (1 + len(RATIOS))
    rows, models, scores = [], {}, {}
    for method, penalty in PENALTY.items():
        strength = ", ".join(f"{key} {value:g}" for key, value in penalty.items())
        print(f"[{len(models) + 1}/{total}] {method}: train" + (f" with {strength}" if strength else ""), flush=True)
        dense, _ = train(digits, ARCH, method, **penalty, **shared, out_dir=out / method / "train")
        models[method, 0.0] = dense
        scores[method] = _scores(dense, digits)
        for ratio in RATIOS:
            print(f"[{len(models) + 1}/{total}] {method}: remove {ratio:.0%} of the channels, fine-tune", flush=True)
            where = out / method / f"prune-{ratio:g}"
            models[method, ratio], logs = prune_finetune(dense, digits, method, ratio, **shared, out_dir=where)
            rows.append({"method": method, "ratio": ratio} | _result(logs))
    latency_ms = _latency_ms(models, _batch(digits))
    for row in rows:
        row["dense"]["latency_ms"] = latency_ms[row["method"], 0.0]
        row["pruned"]["latency_ms"] = latency_ms[row["method"], row["ratio"]]
    seconds = time.perf_counter() - start
    setup = {"arch": ARCH, **shared, "penalty": PENALTY, "seconds": round(seconds), "environment": environment()}
    (out / "results.json").write_text(json.dumps({"setup": setup, "rows": rows}, indent=2) + "\n")
    (out / "results.md").write_text(table(rows) + "\n")
    picture(scores, out / "importances.png")
    print(f"\n{table(rows)}\n\n{verdict(rows)}\n")
    print(f"Done in {seconds:.0f} s. How the methods spread importance over the channels: {out / 'importances.png'}")
    print("Next: the same in your own training loop, see docs/plug-into-your-loop.md")
    return 0


def _result(logs: Any) -> dict[str, Any]:
    """What the log of :func:`prune_finetune` says about one cut."""
    costs = {when: {key: logs.summary[when][key] for key in ("acc", "macs", "params")} for when in ("dense", "pruned")}
    return {**costs, "acc_best": logs[logs.best]["test_acc"], "acc_last": logs[-1]["test_acc"]}


def _batch(digits: data.ImageSet) -> Tensor:
    return next(iter(digits.loaders(SETTINGS["batch_size"]).test))[0][: SETTINGS["batch_size"]]


def _scores(model: nn.Module, digits: data.ImageSet) -> Tensor:
    """Importance of every channel, all layers together."""
    name = "rni" if any(getattr(m, "bound", None) for m in model.modules()) else "slimming"
    return torch.cat(list(methods.create(name, model, _batch(digits)).scores().values()))


def _latency_ms(models: dict[Any, nn.Module], x: Tensor, rounds: int = 101) -> dict[Any, float]:
    """Median milliseconds of a forward in eval mode.  The models take turns, so that a busy moment hits them alike."""
    times: dict[Any, list[float]] = {key: [] for key in models}
    with torch.no_grad():
        for _ in range(rounds + 3):
            for key, model in models.items():
                model.eval()
                start = time.perf_counter()
                model(x)
                times[key].append(1e3 * (time.perf_counter() - start))
    return {key: statistics.median(ms[3:]) for key, ms in times.items()}  # the first three warm up


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    return {
        "fastprune": fastprune.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cpp": backends.report()["cpp"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, aligned so that it reads well in a terminal too."""
    header = [
        *("method", "removed", "acc. trained", "pruned", "tuned: best", "last"),
        *("MACs (M)", "parameters (k)", f"ms / {SETTINGS['batch_size']} images"),
    ]
    cells = [
        [
            row["method"],
            f"{row['ratio']:.0%}",
            *(f"{acc:.1%}" for acc in (row["dense"]["acc"], row["pruned"]["acc"], row["acc_best"], row["acc_last"])),
            *(
                f"{row['dense'][key] / unit:{style}} → {row['pruned'][key] / unit:{style}}"
                for key, unit, style in (("macs", 1e6, ".2f"), ("params", 1e3, ".0f"), ("latency_ms", 1, ".2f"))
            ),
        ]
        for row in rows
    ]
    return aligned(header, cells)


def aligned(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [header, rule, *cells]
    return "\n".join(
        "| " + " | ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(line)) + " |"
        for line in lines
    )


def verdict(rows: list[dict[str, Any]]) -> str:
    """Accuracy lost by each cut alone: RNI's claim, checked on this run, whichever way it falls."""
    said = []
    for ratio in RATIOS:
        cut = {row["method"]: row for row in rows if row["ratio"] == ratio}
        lost = {method: 100 * (row["dense"]["acc"] - row["pruned"]["acc"]) for method, row in cut.items()}
        text = f"{ratio:.0%} removed: " + ", ".join(f"{method} {points:.1f}" for method, points in lost.items())
        if all(row["pruned"]["acc"] < 2 * CHANCE for row in cut.values()):
            text += f" (all near chance, {CHANCE:.0%} right: this cut needs fine-tuning)"
        said.append(text)
    return "Points of accuracy lost by the cut alone, before fine-tuning. " + "; ".join(said) + "."


def picture(scores: dict[str, Tensor], path: Path) -> None:
    """Histograms of the importances, RNI's beside L1's, same bins and axes; lines: what each cut removes."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    panels = {"rni": "RNI: sigmoid(w)", "l1": "L1, network slimming: |w|"}
    highest = max(1.0, *(scores[method].max().item() for method in panels))
    bins = torch.linspace(0, highest, 41).tolist()
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (method, title) in zip(figure.subplots(1, 2, sharex=True, sharey=True), panels.items(), strict=True):
        axes.hist(scores[method].tolist(), bins, color="#4269d0")
        for ratio in RATIOS:
            cut = scores[method].double().quantile(ratio).item()
            axes.axvline(cut, color="#d9480f", linestyle="--", linewidth=1.2)
            above = axes.get_xaxis_transform()  # x in data, y in axes
            axes.text(cut, 1.01, f"{ratio:.0%}", transform=above, ha="center", va="bottom", color="#d9480f")
        axes.set_yscale("log")
        axes.set_title(title, pad=22)
        axes.set_xlabel("importance of a channel")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("channels (log scale)")
    figure.suptitle(f"{ARCH} on digits after training; a cut removes what lies left of its dashed line")
    figure.savefig(path, dpi=120)
