"""GReg-1, GReg-2 and TPP against L1 pruning at once, on real images: accuracy before and after the same fine-tuning.

    python -m bench.e2e.growing_cifar10 --root CIFAR10_FOLDER --name "CIFAR-10 (JPEG q75)"

One base network is trained.  From its weights, for each seed, each method chooses and removes the same number of
channels per layer: ``l1`` at once, the others after their penalty has grown for some hundred steps, in which they
learn, too; ``l1+steps`` is ``l1`` and as many plain steps.  What is left is fine-tuned, for all in the same way.  The
authors' schedules are a few hundred times as long; what is shortened here is in every row and on the page.

Appends a row per method and seed to docs/results/growing_cifar10/rows.jsonl as soon as it is done, so that a run that
is started again goes on where it stopped, and renders docs/results/growing_cifar10.md from all rows (``--render``: only
that).  Without ``--root``: scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from bench.e2e.iterative import example_of, newest, now
from bench.harness import ROOT, append, provenance
from fastprune.train import evaluate, fit, multistep

OUT = ROOT / "docs" / "results" / "growing_cifar10"
SCHEDULE = ("reg_step", "update_interval", "stabilize")
OPTIONS = {  # of the arguments, those that a method takes
    "l1": (),
    "l1+steps": (),
    "greg-1": SCHEDULE,
    "greg-2": (*SCHEDULE, "pick_step"),
    "tpp": (*SCHEDULE, "zero_out_interval"),
}
# (better, worse, what the papers report for ResNet-56 on CIFAR-10 at 90 %, but for GReg-2, which was at 2.55x)
CLAIMS = (
    ("greg-1", "l1", "GReg: 89.49 against 87.34"),
    ("greg-2", "greg-1", "GReg: 93.36 against 93.18 at 2.55 times fewer MACs"),
    ("tpp", "l1", "TPP: 89.63 against 86.75"),
    ("tpp", "l1+steps", "not in the papers"),
)


def base_network(args: argparse.Namespace, data: fp.data.ImageSet) -> nn.Module:
    """Trained for ``--epochs-base`` epochs, or loaded as an earlier run left it; norms fused."""
    torch.manual_seed(0)
    model = fp.models.create(args.arch, len(data.classes), in_channels=data.image_shape[0])
    model = fp.nn.convert_batchnorm(model.to(args.device), fuse=True)
    name = f"{args.arch}-{len(data.train_images)}-{args.epochs_base}-{args.base_lr:g}.pt"
    tune(args, model, data, args.epochs_base, args.base_lr, seed=0, checkpoint=args.runs / name)
    return model


def tune(
    args: argparse.Namespace,
    model: nn.Module,
    data: fp.data.ImageSet,
    epochs: int,
    lr: float,
    seed: int,
    checkpoint: Path | None = None,
) -> fp.train.History:
    """Plain training: a tenth of the learning rate after half and after three quarters of the epochs."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=args.weight_decay, foreach=True)
    return fit(
        model, data.loaders(args.batch_size, seed), epochs=epochs, optimizer=optimizer,
        schedule=multistep(optimizer, epochs), checkpoint=checkpoint, resume=checkpoint is not None, progress=False,
    )  # fmt: skip


def endless(loader: fp.data.Loader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches, epoch after epoch."""
    return itertools.chain.from_iterable(itertools.repeat(loader))


def grow(
    model: nn.Module,
    method: fp.methods.Method | None,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    steps: int = 0,
) -> int:
    """Train until the method has finished, or without one for ``steps`` steps; the number of steps."""
    model.train()
    done = 0
    while not method.finished if method else done < steps:
        x, y = next(batches)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        (loss + method.penalty() if method else loss).backward()
        if method:
            method.step(optimizer, loss.detach())
        else:
            optimizer.step()
        done += 1
        if done % 50 == 0 and not math.isfinite(loss.item()):
            raise SystemExit(f"bench: the loss is {loss.item()} at step {done} before the cut; lower --prune-lr")
    return done


def run_one(args: argparse.Namespace, data: fp.data.ImageSet, base: nn.Module, name: str, seed: int) -> dict[str, Any]:
    """Prune a copy of ``base`` and fine-tune it: what the row says beside its case."""
    model, example, loaders = copy.deepcopy(base), example_of(data), data.loaders(args.batch_size, seed)
    torch.manual_seed(seed)
    options = {option: getattr(args, option) for option in OPTIONS[name]}
    method = fp.create(name.partition("+")[0], model, example, ratio=args.ratio, **options)
    optimizer = fp.optim.GrowingSGD(model.parameters(), args.prune_lr, momentum=0.9, weight_decay=args.weight_decay)
    batches = endless(loaders.train)
    start = now(args.device)
    steps = grow(model, method, optimizer, batches) if options else 0
    keep = method.keep_masks()
    fp.compact(model, keep, example, optimizer=optimizer)
    if name == "l1+steps":
        steps = grow(model, None, optimizer, batches, steps_of_tpp(args))
    grown = now(args.device)
    facts = {"steps": steps, "kept": {group: int(mask.sum()) for group, mask in keep.items() if not mask.all()}}
    facts |= {key: value for key, value in fp.flops(model, example).items() if key in ("macs", "params")}
    facts["acc_before"] = evaluate(model, loaders.test)["acc"]
    tuning = now(args.device)
    history = tune(args, model, data, args.epochs, args.lr, seed)
    facts["acc_best"], facts["acc_last"] = history[history.best]["test_acc"], history[-1]["test_acc"]
    facts["seconds"] = {"growing": round(grown - start, 1), "tuning": round(now(args.device) - tuning, 1)}
    return facts


def steps_of_tpp(args: argparse.Namespace) -> int:
    return math.ceil(1 / args.reg_step) * args.update_interval + args.stabilize + 1


def case_of(args: argparse.Namespace, data: fp.data.ImageSet, name: str, seed: int) -> dict[str, Any]:
    names = ("arch", "epochs_base", "base_lr", "ratio", "prune_lr", *dict.fromkeys(sum(OPTIONS.values(), ())))
    names += ("epochs", "lr", "weight_decay", "batch_size")
    case = {"images": args.name or data.name, "training_images": len(data.train_images), "method": name, "seed": seed}
    return case | {key: getattr(args, key) for key in names}


def mean_std(values: list[float]) -> str:
    """Per cent; the population's standard deviation, as TPP's tables have it."""
    return f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.pstdev(values):.2f}"


def page(rows: list[dict]) -> str:
    """docs/results/growing_cifar10.md from rows."""
    text = [
        "# Growing regularisation on real images",
        "",
        "Written by `python -m bench.e2e.growing_cifar10` from",
        "[growing_cifar10/rows.jsonl](growing_cifar10/rows.jsonl). All methods start from the same weights, remove the",
        "same number of channels per layer and are fine-tuned in the same way; `l1` removes at once, the others train",
        "while their penalty grows, for the steps given, `l1+steps` after the removal. Accuracies are of the compacted",
        "network, on the test images, in per cent: mean ± standard deviation over the seeds, which order the batches.",
        "Not comparable with the published tables: the schedules are a small part of the authors'.",
    ]
    of_setup: dict[str, list[dict]] = {}
    for row in rows:
        of_setup.setdefault(json.dumps({**row["case"], "method": "", "seed": ""}), []).append(row)
    for mine in of_setup.values():
        text += section(mine)
    return "\n".join([*text, ""])


def section(rows: list[dict]) -> list[str]:
    """One setup."""
    case, facts, base = rows[0]["case"], rows[0]["provenance"], rows[0]["base"]
    seeds = sorted({row["case"]["seed"] for row in rows})
    commits = sorted({row["provenance"]["commit"] + "+" * row["provenance"]["dirty"] for row in rows})
    text = [
        "",
        f"## {case['images']}, {case['arch']}, ratio `{case['ratio']}`",
        "",
        f"{case['training_images']} training images, batches of {case['batch_size']}, weight decay "
        f"{case['weight_decay']:g}, momentum 0.9. Base: {case['epochs_base']} epochs from learning rate "
        f"{case['base_lr']:g}. Growth: learning rate {case['prune_lr']:g}, every {case['update_interval']} steps "
        f"{case['reg_step']:g} more (greg-2: {case['pick_step']:g} until it picks) up to 1, then {case['stabilize']} "
        f"steps as it is (tpp: a layer hard-zeroed every {case['zero_out_interval']}). Fine-tuning: {case['epochs']} "
        f"epochs from learning rate {case['lr']:g}. Both divide it by 10 after half and three quarters. Seeds "
        f"{', '.join(map(str, seeds))}. {facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit "
        f"{', '.join(commits)}{' (+: uncommitted changes)' if any('+' in c for c in commits) else ''}; "
        f"{min(row['provenance']['date'] for row in rows)[:10]}.",
        "",
        *(f"    {command}" for command in dict.fromkeys(row["provenance"]["command"] for row in rows)),
        "",
        f"Base network: {base['acc']:.2%}, {base['macs'] / 1e6:.2f} M MACs, {base['params'] / 1e3:.1f} k parameters.",
        "",
        "| method | runs | steps | before fine-tuning | after: best | last | MACs (M) | parameters (k) | kept channels "
        "| s growing | s tuning |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    by_method: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: list(OPTIONS).index(row["case"]["method"])):
        by_method.setdefault(row["case"]["method"], []).append(row)
    for name, runs in by_method.items():
        cells = [name, str(len(runs)), span([run["steps"] for run in runs], 1, "d")]
        cells += [mean_std([run[key] for run in runs]) for key in ("acc_before", "acc_best", "acc_last")]
        cells += [span([run["macs"] for run in runs], 1e6, ".2f"), span([run["params"] for run in runs], 1e3, ".1f")]
        cells.append(widths(runs[0]["kept"]))
        cells += [f"{statistics.median(run['seconds'][key] for run in runs):.0f}" for key in ("growing", "tuning")]
        text.append(f"| {' | '.join(cells)} |")
    return [*text, "", *verdicts(by_method)]


def span(values: list[float], unit: float, form: str) -> str:
    """The one value, or the least and the greatest."""
    shown = [format(v if unit == 1 else v / unit, form) for v in (min(values), max(values))]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}"


def widths(kept: dict[str, int]) -> str:
    """``3x1, 3x3, 3x6``: groups times the channels they keep, in order."""
    return ", ".join(f"{len(list(same))}x{n}" for n, same in itertools.groupby(kept.values()))


def verdicts(by_method: dict[str, list[dict]]) -> list[str]:
    """What the papers claim, and whether it is so here, by the means of the best accuracies; the last ones beside."""
    text = []
    for better, worse, published in CLAIMS:
        if better in by_method and worse in by_method:
            best, last = (
                100 * (mean_of(by_method[better], key) - mean_of(by_method[worse], key))
                for key in ("acc_best", "acc_last")
            )
            verdict = "holds" if best > 0 else "undecided" if best == 0 else "does not hold"
            text.append(
                f"- {better} above {worse} ({published}): {verdict} here, {best:+.2f} points after fine-tuning (last "
                f"epoch {last:+.2f})."
            )
    return text


def mean_of(rows: list[dict], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", help="folder with train/<class>/ and test/<class>/; default: digits")
    p.add_argument("--name", help="what the images are, for the page")
    p.add_argument("--limit", type=int, help="at most so many training images, and as many test images")
    p.add_argument("--arch", default="resnet20")
    p.add_argument("--epochs-base", type=int, default=16)
    p.add_argument("--base-lr", type=float, default=0.1)
    p.add_argument("--methods", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--ratio", default="*layer*.conv1:0.9", help="share of the channels removed, by layer")
    p.add_argument("--prune-lr", type=float, default=1e-2, help="while the penalty grows")
    p.add_argument("--reg-step", type=float, default=1e-2, help="what an update adds to the penalty's factor")
    p.add_argument("--pick-step", type=float, default=1e-3, help="the same before greg-2 has picked")
    p.add_argument("--update-interval", type=int, default=2, help="steps between two updates")
    p.add_argument("--stabilize", type=int, default=100, help="steps after the growth")
    p.add_argument("--zero-out-interval", type=int, default=4, help="steps from one of tpp's hard-zeroed layers on")
    p.add_argument("--epochs", type=int, default=8, help="of fine-tuning")
    p.add_argument("--lr", type=float, default=1e-2, help="of fine-tuning")
    p.add_argument("--weight-decay", type=float, default=5e-4)
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--runs", type=Path, default=Path("runs/growing_cifar10"), help="folder of the base network")
    p.add_argument("--render", action="store_true", help="only write the page again")
    p.add_argument("--out", type=Path, default=OUT, help="folder of rows.jsonl; the page is written beside it")
    args = p.parse_args()
    if not args.render:
        run(args)
    args.out.with_suffix(".md").write_text(page(newest(args.out / "rows.jsonl")))


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        fp.tune_cpu_memory()
    source = ("imagefolder", args.root) if args.root else ("digits",)
    data = fp.data.load(*source, device=args.device, limit=args.limit)
    path, start = args.out / "rows.jsonl", time.perf_counter()
    done = [row["case"] for row in newest(path)] if path.exists() else []
    args.runs.mkdir(parents=True, exist_ok=True)
    base = base_network(args, data)
    before = {"acc": evaluate(base, data.loaders(args.batch_size).test)["acc"]}
    before |= {key: value for key, value in fp.flops(base, example_of(data)).items() if key in ("macs", "params")}
    print(f"base network: {before['acc']:.2%}, {time.perf_counter() - start:.0f} s", flush=True)
    for seed, name in itertools.product(args.seeds, args.methods):
        case = case_of(args, data, name, seed)
        if case in done:
            print(f"{name:8} seed {seed}: done before")
            continue
        row = {"bench": "growing_cifar10", "case": case, "impl": name, "base": before}
        row |= run_one(args, data, base, name, seed)
        append(path, [row | {"provenance": provenance(args.device, verified=False)}])
        print(
            f"{name:8} seed {seed}: {row['steps']} steps, {row['acc_before']:.2%}, tuned {row['acc_best']:.2%} "
            f"(last {row['acc_last']:.2%}), {row['macs'] / 1e6:.2f} M MACs; {time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
