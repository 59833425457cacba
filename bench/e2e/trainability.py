"""What pruning does to a linear network's trainability, and what bringing it back is worth: TPP's study, on digits.

    python -m bench.e2e.trainability

A network of seven linear layers is trained; of each layer but the last, ``--ratio`` of the neurons is removed; the rest
is fine-tuned with each learning rate.  As the network computes a product of matrices, its Jacobian is that product
whatever the input, and trainability can be restored exactly, by making each factor orthogonal:

    l1         the neurons with the smallest mean absolute weight, at once
    l1+steps   the same, then plain training for as many steps as tpp takes, at its learning rate
    l1+orthp   l1, then every layer replaced by the nearest orthogonal matrix
    tpp        the same neurons, after their Gram penalty and decay have grown for some hundred steps

The paper (Wang and Fu, ICLR 2023, arXiv:2207.12534) used MNIST; this is scikit-learn's 8x8 digits, without
augmentation.  Writes docs/results/trainability.json and .md (``--render``: only the page again).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastprune as fp
from bench.e2e.growing_cifar10 import endless, grow, mean_std, steps_of_tpp
from bench.e2e.iterative import example_of
from bench.harness import ROOT, provenance
from fastprune.train import evaluate, fit, multistep
from fastprune.trainability import orthogonalise, trainability

OUT = ROOT / "docs" / "results" / "trainability.json"
METHODS = ("l1", "l1+steps", "l1+orthp", "tpp")
MEASURES = ("mean", "min", "max", "condition_number")


def train(
    args: argparse.Namespace, model: nn.Module, data: fp.data.ImageSet, epochs: int, lr: float, seed: int
) -> list:
    """Plain SGD, a tenth of the learning rate after half and after three quarters; accuracy after each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=args.weight_decay, foreach=True)
    history = fit(
        model, data.loaders(args.batch_size, seed), epochs=epochs, optimizer=optimizer,
        schedule=multistep(optimizer, epochs), progress=False,
    )  # fmt: skip
    return [row["test_acc"] for row in history]


def prune(args: argparse.Namespace, model: nn.Module, data: fp.data.ImageSet, name: str, seed: int) -> int:
    """In place; the number of training steps it took."""
    example, batches, steps = example_of(data), endless(data.loaders(args.batch_size, seed).train), 0
    options = {"ratio": args.ratio, "scope": "local"}
    if name == "tpp":
        names = ("update_interval", "reg_step", "stabilize", "zero_out_interval")
        method = fp.create("tpp", model, example, **options, **{key: getattr(args, key) for key in names})
        optimizer = fp.optim.GrowingSGD(model.parameters(), args.prune_lr, momentum=0.9, weight_decay=args.weight_decay)
        steps = grow(model, method, optimizer, batches)
    else:
        method = fp.create("l1", model, example, **options)
    fp.compact(model, method.keep_masks(), example)
    if name == "l1+orthp":
        orthogonalise(model)
    elif name == "l1+steps":
        optimizer = torch.optim.SGD(
            model.parameters(), args.prune_lr, momentum=0.9, weight_decay=args.weight_decay, foreach=True
        )
        steps = grow(model, None, optimizer, batches, steps_of_tpp(args))
    return steps


def state(model: nn.Module, data: fp.data.ImageSet) -> dict[str, float]:
    """Accuracy and trainability on the test images."""
    test = data.loaders(100).test
    images = torch.cat([x for x, _ in test])
    values = trainability(model, images)
    return {"acc": evaluate(model, test)["acc"]} | {key: values[key] for key in MEASURES}


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    data = fp.data.load("digits", pad=0, limit=args.limit)
    features = example_of(data)[0].numel()
    dense, rows = [], []
    for seed in args.seeds:
        torch.manual_seed(seed)
        options = {"in_features": features, "hidden": args.hidden, "depth": args.depth}
        base = fp.models.create("mlp-7-linear", len(data.classes), **options)
        train(args, base, data, args.epochs_base, args.base_lr, seed)
        dense.append(state(base, data))
        for name in METHODS:
            pruned = copy.deepcopy(base)
            steps = prune(args, pruned, data, name, seed)
            before = state(pruned, data)
            for lr in args.lrs:
                model = copy.deepcopy(pruned)
                accs = train(args, model, data, args.epochs, lr, seed)
                after = state(model, data)
                row = {"method": name, "lr": lr, "seed": seed, "steps": steps, "before": before, "after": after}
                rows.append(row | {"first": accs[0], "best": max(accs)})
                print(
                    f"seed {seed} {name:8} lr {lr:g}: {before['acc']:.2%}, mean JSV {before['mean']:.3g}; tuned "
                    f"{max(accs):.2%}, mean JSV {after['mean']:.3g}",
                    flush=True,
                )
    setup = {key: value for key, value in vars(args).items() if key not in ("out", "render")}
    setup["layers"] = [list(m.weight.shape) for m in base.modules() if isinstance(m, nn.Linear)]
    setup["left"] = [list(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
    setup["images"] = len(data.train_labels)
    return {"setup": setup, "dense": dense, "rows": rows, "provenance": provenance("cpu", verified=False)}


def pick(rows: list[dict], method: str, lr: float) -> list[dict]:
    return [row for row in rows if row["method"] == method and row["lr"] == lr]


def figure(values: list[float]) -> str:
    """Mean over the seeds, three digits."""
    return f"{statistics.fmean(values):.3g}"


def page(result: dict[str, Any]) -> str:
    """docs/results/trainability.md."""
    setup, dense, rows, facts = (result[key] for key in ("setup", "dense", "rows", "provenance"))
    steps = max(row["steps"] for row in rows if row["method"] == "tpp")
    sizes = lambda layers: "-".join(map(str, [layers[0][1], *(rows for rows, _ in layers)]))  # noqa: E731
    text = [
        "# Trainability of a pruned linear network",
        "",
        "Written by `python -m bench.e2e.trainability`, whose first lines say what is compared; all numbers are in",
        "[trainability.json](trainability.json). *JSV*: singular values of the network's Jacobian, all 1 at dynamical",
        "isometry. Accuracies on the test images in per cent, mean ± standard deviation over the seeds; JSV: means.",
        "",
        f"Digits, {setup['images']} training images, batches of {setup['batch_size']}, weight decay "
        f"{setup['weight_decay']:g}, momentum 0.9. Network {sizes(setup['layers'])} without activations, "
        f"{setup['epochs_base']} epochs from learning rate {setup['base_lr']:g}; ratio {setup['ratio']:g} leaves "
        f"{sizes(setup['left'])}. TPP: learning rate {setup['prune_lr']:g}, the coefficient {setup['reg_step']:g} more "
        f"every {setup['update_interval']} steps up to 1, {setup['stabilize']} steps more, a layer zeroed every "
        f"{setup['zero_out_interval']}: {steps} steps. "
        f"Fine-tuning: {setup['epochs']} epochs; both divide the learning rate by 10 "
        f"after half and three quarters. Seeds {', '.join(map(str, setup['seeds']))}. {facts['device']}, torch "
        f"{facts['torch']}, commit {facts['commit']}{', uncommitted changes' if facts['dirty'] else ''}; "
        f"{facts['date'][:10]}.",
        "",
        "| method | learning rate | before fine-tuning | mean JSV | min to max | condition | first epoch | best | last "
        "| mean JSV after |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def states(found: list[dict]) -> list[str]:
        ends = f"{figure([s['min'] for s in found])} to {figure([s['max'] for s in found])}"
        accuracy = mean_std([s["acc"] for s in found])
        return [accuracy, figure([s["mean"] for s in found]), ends, figure([s["condition_number"] for s in found])]

    text.append(f"| dense | | {' | '.join(states(dense))} | | | | |")
    for lr in setup["lrs"]:
        for method in METHODS:
            mine = pick(rows, method, lr)
            cells = [method, f"{lr:g}", *states([row["before"] for row in mine])]
            cells += [mean_std([row["first"] for row in mine]), mean_std([row["best"] for row in mine])]
            cells += [mean_std([row["after"]["acc"] for row in mine]), figure([row["after"]["mean"] for row in mine])]
            text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, "", *findings(dense, rows, setup["lrs"]), ""])


def findings(dense: list[dict], rows: list[dict], lrs: list[float]) -> list[str]:
    """The paper's claims, and whether they are so here, by means over the seeds of the best accuracies."""
    low, high = min(lrs), max(lrs)
    best = {
        (m, lr): 100 * statistics.fmean(row["best"] for row in pick(rows, m, lr)) for m in METHODS for lr in (low, high)
    }
    jsv = {m: statistics.fmean(row["before"]["mean"] for row in pick(rows, m, high)) for m in METHODS}
    whole = statistics.fmean(s["mean"] for s in dense)
    gain = {m: best[m, high] - best[m, low] for m in METHODS}
    recovered = best["l1+orthp", low] - best["l1", low]
    claims = [
        (jsv["l1"] < 0.5 * whole, "pruning damages trainability", f"mean JSV from {whole:.3g} to {jsv['l1']:.3g}"),
        (
            gain["l1"] > gain["l1+orthp"],
            "a larger learning rate helps because it recovers trainability, so less where it was recovered before",
            f"{high:g} instead of {low:g} gains l1 {gain['l1']:+.2f} points, l1+orthp {gain['l1+orthp']:+.2f}",
        ),
        (
            recovered > 0,
            "recovering trainability before fine-tuning helps at the small learning rate",
            f"l1+orthp {recovered:+.2f} points over l1 at {low:g}",
        ),
        (
            jsv["tpp"] > jsv["l1"],
            "TPP preserves trainability",
            f"mean JSV {jsv['tpp']:.3g}, l1 {jsv['l1']:.3g}, l1+steps {jsv['l1+steps']:.3g}",
        ),
    ]
    for lr, other in itertools.product(dict.fromkeys((high, low)), ("l1", "l1+steps")):
        ahead = best["tpp", lr] - best[other, lr]
        claims.append((ahead > 0, f"TPP ends above {other} at learning rate {lr:g}", f"{ahead:+.2f} points"))
    head = "What the paper claims (l1+steps is ours), and whether it is so here:"
    return [head, "", *(f"- {what}: {'yes' if so else 'no'} ({numbers})." for so, what, numbers in claims)]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--hidden", type=int, default=100)
    p.add_argument("--depth", type=int, default=7)
    p.add_argument("--ratio", type=float, default=0.8)
    p.add_argument("--epochs-base", type=int, default=60)
    p.add_argument("--base-lr", type=float, default=1e-2)
    p.add_argument("--epochs", type=int, default=60, help="of fine-tuning")
    p.add_argument("--lrs", nargs="+", type=float, default=[1e-2, 1e-3], help="of fine-tuning")
    p.add_argument("--prune-lr", type=float, default=1e-3, help="while TPP's penalty grows")
    p.add_argument("--update-interval", type=int, default=1)
    p.add_argument("--reg-step", type=float, default=1e-3)
    p.add_argument("--stabilize", type=int, default=500)
    p.add_argument("--zero-out-interval", type=int, default=50)
    p.add_argument("--batch-size", type=int, default=100)
    p.add_argument("--weight-decay", type=float, default=1e-4)
    p.add_argument("--limit", type=int, help="at most so many images, for trials")
    p.add_argument("--out", type=Path, default=OUT, help="the numbers; the page is written beside them")
    p.add_argument("--render", action="store_true", help="only write the page again")
    args = p.parse_args()
    if not args.render:
        args.out.write_text(json.dumps(run(args), indent=1) + "\n")
    args.out.with_suffix(".md").write_text(page(json.loads(args.out.read_text())))


if __name__ == "__main__":
    main()
