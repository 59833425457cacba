"""Pruning while training, with and without making the network smaller on the way: time, masks and accuracy of both.

    python -m bench.e2e.iterative --root CIFAR10_FOLDER --name "CIFAR-10 (JPEG q75)" --epochs 20 --steps 6000

A base network is trained once; then each method cuts for ``--steps`` steps from the same weights on the same batches,
with ``shrink_every`` as given ("on") and with 0 ("off": what is cut is masked).  A long run cannot be interleaved with
another, so the runs alternate, on off off on, and medians are reported.  Without ``--root``: scikit-learn's digits.

Appends one row per method to docs/results/iterative/rows.jsonl and renders docs/results/iterative.md from the newest
rows (``--render``: only that).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from bench.harness import ROOT, append, provenance
from fastprune.train import evaluate, fit, from_scratch, multistep, sgd
from fastprune.train.step import PRECISIONS

OUT = ROOT / "docs" / "results" / "iterative"


def make_model(args: argparse.Namespace, data: fp.data.ImageSet) -> nn.Module:
    """Freshly initialised from the seed, norms fused."""
    sizes = {"depth": args.depth, "width": args.width}
    options = {name: value for name, value in sizes.items() if value is not None}
    torch.manual_seed(args.seed)
    model = fp.models.create(args.arch, len(data.classes), in_channels=data.image_shape[0], **options)
    model = fp.nn.convert_batchnorm(model.to(args.device), fuse=True)
    if args.precision == "fp64":
        model.double().register_forward_pre_hook(_double)
    return model


def _double(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].double(),)


def autocast_of(args: argparse.Namespace) -> str:
    return "fp32" if args.precision == "fp64" else args.precision


def train_epochs(args: argparse.Namespace, model: nn.Module, data: fp.data.ImageSet, epochs: int) -> None:
    """RNI's schedule; the last weights stay."""
    optimizer = sgd(model, args.base_lr)
    loaders = data.loaders(args.batch_size, args.seed)
    fit(
        model, loaders, epochs=epochs, optimizer=optimizer, schedule=multistep(optimizer, epochs),
        precision=autocast_of(args),
    )  # fmt: skip


def prune(
    args: argparse.Namespace, base: nn.Module, data: fp.data.ImageSet, name: str, shrink_every: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One run of ``--steps`` steps: what it left, as by ``method.survivors()``, and what it was like."""
    model, example = copy.deepcopy(base), example_of(data)
    method = fp.create(
        name, model, example, ratio=args.ratio, per_cut=args.per_cut, frequency=args.frequency,
        shrink_every=shrink_every,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, foreach=True)
    loaders, dtype = data.loaders(args.batch_size, args.seed), PRECISIONS[autocast_of(args)]
    batches = itertools.chain.from_iterable(itertools.repeat(loaders.train))
    history: list[dict[str, torch.Tensor]] = []  # masks after each cut
    losses, marks, every = [], [], max(1, args.steps // args.points)
    model.train()
    start = last = now(args.device)
    for step in range(1, args.steps + 1):
        x, y = next(batches)
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        (loss + method.penalty()).backward()
        method.step(optimizer, loss.detach())
        losses.append(loss.detach())
        if method.cuts.cuts > len(history):
            history.append(method.survivors())
        if step % every == 0:
            reached = now(args.device)
            marks.append({"step": step, "steps_per_s": round(every / (reached - last), 3), "removed": removed(method)})
            last = reached
    seconds = now(args.device) - start
    if not torch.stack(losses).isfinite().all():
        raise SystemExit(f"bench: the loss of {name}, shrink_every={shrink_every}, is not finite; lower --lr")
    facts = {"seconds": round(seconds, 3), "cuts": method.cuts.cuts, "removed": removed(method), "over_time": marks}
    facts["channels"] = sum(len(mask) for mask in method.survivors().values())
    facts["loss_last"] = round(torch.stack(losses[-every:]).mean().item(), 5)
    facts["test_acc"] = evaluate(model, loaders.test, autocast_of(args))["acc"]  # of the masked one, with shrinking off
    keep, survivors = method.keep_masks(), method.survivors()
    fp.compact(model, {group: mask for group, mask in keep.items() if not mask.all()}, example, graph=method.graph)
    facts |= {key: value for key, value in fp.flops(model, example).items() if key in ("macs", "params")}
    facts["test_acc_compact"] = evaluate(model, loaders.test, autocast_of(args))["acc"]
    return survivors, facts | {"history": history}


def removed(method: fp.methods.Method) -> int:
    return sum(int((~mask).sum()) for mask in method.survivors().values())


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def example_of(data: fp.data.ImageSet) -> torch.Tensor:
    return torch.zeros(2, *data.image_shape, device=data.train_images.device)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a | b)


def compare(on: tuple, off: tuple) -> dict[str, Any]:
    """Masks of a run with shrinking against those of one without: the same but for rounding, which can tip a choice."""
    pairs = zip(on[1]["history"], off[1]["history"], strict=False)
    first = next((cut for cut, (a, b) in enumerate(pairs, 1) if not same(a, b)), None)
    channels = sum(len(mask) for mask in on[0].values())
    differ = sum(int((on[0][name] != off[0][name]).sum()) for name in on[0])
    return {"identical": same(on[0], off[0]), "differ": differ, "of": channels, "first_cut_that_differs": first}


def scratch(args: argparse.Namespace, data: fp.data.ImageSet, keep: dict[str, torch.Tensor]) -> dict[str, float]:
    """Train the pruned shape from a fresh initialisation, ``--scratch`` epochs with the base network's schedule."""
    model = make_model(args, data)
    fp.compact(model, {group: mask for group, mask in keep.items() if not mask.all()}, example_of(data))
    model = from_scratch(model, args.seed)
    start = now(args.device)
    train_epochs(args, model, data, args.scratch)
    seconds = now(args.device) - start
    acc = evaluate(model, data.loaders(args.batch_size).test, autocast_of(args))["acc"]
    return {"epochs": args.scratch, "test_acc": acc, "seconds": round(seconds, 3)}


def bench(args: argparse.Namespace, data: fp.data.ImageSet, base: nn.Module, name: str, before: dict) -> dict[str, Any]:
    """The row of one method."""
    runs: dict[str, list[tuple]] = {"on": [], "off": []}
    for repeat in range(args.repeats):
        for setting in ("on", "off") if repeat % 2 == 0 else ("off", "on"):
            runs[setting].append(prune(args, base, data, name, args.shrink_every if setting == "on" else 0))
            facts = runs[setting][-1][1]
            print(
                f"{name:12} shrinking {setting:3} {facts['seconds']:8.1f} s, {facts['removed']} of {facts['channels']} "
                f"channels in {facts['cuts']} cuts, test accuracy {facts['test_acc']:.2%}",
                flush=True,
            )
    row: dict[str, Any] = {"bench": "iterative", "case": case_of(args, data, name), "impl": "on-off", "before": before}
    row["masks"] = compare(runs["on"][0], runs["off"][0])
    for setting, found in runs.items():
        seconds = statistics.median(run[1]["seconds"] for run in found)
        facts = {key: value for key, value in found[0][1].items() if key not in ("history", "seconds")}
        repeats_agree = all(same(run[0], found[0][0]) and run[1]["test_acc"] == facts["test_acc"] for run in found)
        every = [run[1]["seconds"] for run in found]
        row[setting] = {"seconds": seconds, "seconds_each": every, "repeats_agree": repeats_agree, **facts}
    row["speedup"] = {"off": {"ratio": round(row["off"]["seconds"] / row["on"]["seconds"], 4)}}
    if args.scratch:
        row["scratch"] = scratch(args, data, runs["on"][0][0])
    return row


def case_of(args: argparse.Namespace, data: fp.data.ImageSet, name: str) -> dict[str, Any]:
    names = ("arch", "depth", "width", "epochs", "base_lr", "steps", "frequency", "per_cut", "ratio", "shrink_every")
    names += ("lr", "batch_size", "precision", "repeats", "seed", "threads")
    case = {"images": args.name or data.name, "training_images": len(data.train_images), "method": name}
    return case | {key: getattr(args, key) for key in names}


def newest(path: Path) -> list[dict]:
    """The last row of each case."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return list({json.dumps(row["case"], sort_keys=True): row for row in rows}.values())


def page(rows: list[dict]) -> str:
    """docs/results/iterative.md from rows."""
    text = [
        "# Pruning while training, with and without shrinking on the way",
        "",
        "Written by `python -m bench.e2e.iterative` from [iterative/rows.jsonl](iterative/rows.jsonl), which also has",
        "the speed over time. `on` removes what was cut from the network every so many cuts, `off` only masks it; both",
        "start from the same weights and see the same batches. Wall time is the median of the runs, which alternate.",
    ]
    for setup in dict.fromkeys(json.dumps({**row["case"], "method": ""}) for row in rows):
        mine = [row for row in rows if json.dumps({**row["case"], "method": ""}) == setup]
        case, facts, before = mine[0]["case"], mine[0]["provenance"], mine[0]["before"]
        size = "".join(f", {key} {case[key]:g}" for key in ("depth", "width") if case[key] is not None)
        text += [
            "",
            f"## {case['images']}, {case['arch']}{size}",
            "",
            f"{case['training_images']} training images, {case['epochs']} epochs before (learning rate "
            f"{case['base_lr']:g}), then {case['steps']} steps of {case['batch_size']} images at learning rate "
            f"{case['lr']:g}, {case['per_cut']} channels every {case['frequency']} steps up to a share of "
            f"{case['ratio']:g}, shrinking every {case['shrink_every']} cuts, {case['precision']}, seed "
            f"{case['seed']}, {case['repeats']} runs of each. {facts['device']}, {case['threads']} threads, torch "
            f"{facts['torch']}, commit {facts['commit']}{', uncommitted changes' if facts['dirty'] else ''}; "
            f"{facts['date'][:10]}.",
            "",
            f"Before: test accuracy {before['test_acc']:.2%}, {before['macs'] / 1e6:.2f} M MACs, "
            f"{before['params'] / 1e3:.1f} k parameters.",
            "",
            "| method | shrinking | seconds | speed-up | steps/s at the start | at the end | cut | masks "
            "| test accuracy | compacted | MACs (M) | parameters (k) |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
        ]
        for row in mine:
            masks = row["masks"]
            verdict = "identical" if masks["identical"] else f"{masks['differ']} of {masks['of']} differ"
            if masks["first_cut_that_differs"]:
                verdict += f", from cut {masks['first_cut_that_differs']} on"
            for setting in ("on", "off"):
                r = row[setting]
                speed = [mark["steps_per_s"] for mark in r["over_time"]]
                cells = [row["case"]["method"], setting, f"{r['seconds']:.1f}"]
                cells.append(f"{row['speedup']['off']['ratio']:.2f}x" if setting == "on" else "")
                cells += [f"{speed[0]:.2f}", f"{speed[-1]:.2f}", f"{r['removed']} of {r['channels']}", verdict]
                cells += [f"{r['test_acc']:.2%}", f"{r['test_acc_compact']:.2%}"]
                cells += [f"{r['macs'] / 1e6:.2f}", f"{r['params'] / 1e3:.1f}"]
                text.append(f"| {' | '.join(cells)} |")
                if not r["repeats_agree"]:
                    text.append(f"| | {setting}: two runs of the same differ | | | | | | | | | | |")
        for row in mine:
            if s := row.get("scratch"):
                text += ["", f"{row['case']['method']}: the pruned shape from scratch, {s['epochs']} epochs: "]
                text[-1] += f"test accuracy {s['test_acc']:.2%}."
    return "\n".join([*text, ""])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", help="folder with train/<class>/ and test/<class>/; default: digits")
    p.add_argument("--name", help="what the images are, for the page")
    p.add_argument("--methods", nargs="+", default=["fisher", "taylor-gate"], choices=sorted(fp.methods.METHODS))
    p.add_argument("--arch", default="wrn-40-2")
    p.add_argument("--depth", type=int, help="of --arch, where it has one")
    p.add_argument("--width", type=float, help="of --arch, where it has one")
    p.add_argument("--epochs", type=int, default=10, help="of training before anything is cut")
    p.add_argument("--base-lr", type=float, default=0.1)
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--frequency", type=int, default=30, help="steps between two cuts")
    p.add_argument("--per-cut", type=int, default=10, help="channels each cut removes")
    p.add_argument("--ratio", type=float, default=0.7, help="share of the channels at which cutting stops")
    p.add_argument("--lr", type=float, default=8e-4, help="while cutting")
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--shrink-every", type=int, default=10, help="cuts between two physical removals")
    p.add_argument("--precision", default="fp32", choices=[*PRECISIONS, "fp64"])
    p.add_argument("--repeats", type=int, default=2, help="runs of each setting")
    p.add_argument("--points", type=int, default=20, help="of the speed over time")
    p.add_argument("--scratch", type=int, default=0, help="epochs of the pruned shape from scratch; 0: not at all")
    p.add_argument("--limit", type=int, help="at most so many images, for trials")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--render", action="store_true", help="only write the page again")
    p.add_argument("--out", type=Path, default=OUT, help="folder of rows.jsonl; the page is written beside it")
    args = p.parse_args()
    if not args.render:
        run(args, p)
    args.out.with_suffix(".md").write_text(page(newest(args.out / "rows.jsonl")))


def run(args: argparse.Namespace, p: argparse.ArgumentParser) -> None:
    if args.shrink_every < 1 or args.steps < 1 or args.repeats < 1 or args.per_cut < 1 or args.points < 1:
        p.error("--shrink-every, --steps, --repeats, --per-cut and --points must be at least 1")
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        fp.tune_cpu_memory()
    source = ("imagefolder", args.root) if args.root else ("digits",)
    data = fp.data.load(*source, device=args.device, limit=args.limit)
    base = make_model(args, data)
    if args.epochs:
        train_epochs(args, base, data, args.epochs)
    test = data.loaders(args.batch_size).test
    before = {"test_acc": evaluate(base, test, autocast_of(args))["acc"]}
    before |= {key: value for key, value in fp.flops(base, example_of(data)).items() if key in ("macs", "params")}
    for name in args.methods:
        row = bench(args, data, base, name, before)
        append(args.out / "rows.jsonl", [row | {"provenance": provenance(args.device, verified=False)}])


if __name__ == "__main__":
    main()
