"""RNI, L1 and UCS on CIFAR-10 as an image folder: train, prune at several ratios, fine-tune; one result row per ratio.

    python -m bench.e2e.rni_cifar10 --root CIFAR10_FOLDER --width 0.25 --epochs 30 --finetune-epochs 8

Appends to docs/results/cifar10/rows.jsonl, keeps each run's metrics beside it and renders docs/results/cifar10.md from
all rows (``--render``: only that).  The authors train a full-width VGG-16 for 160 epochs and fine-tune for 160; what is
shortened here is on every row.  ``--name`` says which images these are, e.g. "CIFAR-10 (JPEG q75)".
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

import fastprune as fp
from bench.harness import ROOT, append, provenance

# lambda and b of the authors' notebook for VGG-16
STRENGTH = {"rni": {"reg_weight": 1e-3, "b": 3}, "l1": {"reg_weight": 1e-4}, "ucs": {}}


OUT = ROOT / "docs" / "results" / "cifar10"
INTRO = """# RNI and L1 on real CIFAR-10 images

Written by `python -m bench.e2e.rni_cifar10`; all numbers are in [cifar10/](cifar10/): a row per ratio in `rows.jsonl`
(kept channels, scale histogram, environment, command), every epoch in `<method>-<call>.jsonl`. One seed. Not comparable
with the published table: shorter schedule, narrower network.
"""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", help="folder with train/<class>/ and test/<class>/")
    p.add_argument("--render", action="store_true", help="only write docs/results/cifar10.md again")
    p.add_argument("--name", default="CIFAR-10")
    p.add_argument("--methods", nargs="+", default=["rni", "l1"], choices=sorted(STRENGTH))
    p.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.9])
    p.add_argument("--arch", default="vgg16")
    p.add_argument("--width", type=float, default=1.0)
    p.add_argument("--epochs", type=int, default=160)
    p.add_argument("--finetune-epochs", type=int, default=160)
    p.add_argument("--lr", type=float, default=0.1)
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    p.add_argument("--runs", type=Path, default=Path("runs/rni_cifar10"), help="metrics.jsonl and checkpoints")
    args = p.parse_args()
    if args.render:
        return render()
    if not args.root:
        p.error("--root is needed: a folder with train/<class>/ and test/<class>/")

    fp.tune_cpu_memory()
    data = fp.data.load("imagefolder", args.root)
    common = {"batch_size": args.batch_size, "seed": args.seed, "lr": args.lr, "precision": args.precision}
    common |= {"channels_last": True, "dataset": data, "resume": True}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for method in args.methods:
        where = args.runs / f"{args.arch}-w{args.width:g}-{method}" / f"seed{args.seed}"
        model, logs = fp.train(
            arch=args.arch,
            arch_options={"width": args.width},
            method=method,
            epochs=args.epochs,
            out_dir=where / "train",
            **STRENGTH[method],
            **common,
        )
        scales = [m.scale.detach() if hasattr(m, "scale") else m.weight.detach() for m in _norms(model)]
        counts = torch.histc(torch.cat(scales).abs().float(), bins=20, min=0.0, max=1.0).int().tolist()
        for ratio in args.ratios:
            _, tuned = fp.prune_finetune(
                model,
                method=method,
                prune_pc=ratio,
                epochs=args.finetune_epochs,
                out_dir=where / f"prune{ratio:g}",
                **common,
            )
            s = tuned.summary
            row = {
                "bench": "rni_cifar10",
                "images": args.name,
                "arch": args.arch,
                "width": args.width,
                "method": method,
                **STRENGTH[method],
                "ratio": ratio,
                "epochs": args.epochs,
                "finetune_epochs": args.finetune_epochs,
                "lr": args.lr,
                "batch_size": args.batch_size,
                "precision": args.precision,
                "seed": args.seed,
                "train_acc_best": logs[logs.best]["test_acc"],
                "train_acc_last": logs[-1]["test_acc"],
                "pruned_acc_before_finetuning": s["pruned"]["acc"],
                "finetuned_acc_best": tuned[tuned.best]["test_acc"],
                "finetuned_acc_last": tuned[-1]["test_acc"],
                "dense": s["dense"],
                "pruned": s["pruned"],
                "kept": s["kept"],
                "scale_histogram_0_to_1": counts,
                "seconds_training": sum(r["seconds"] for r in logs),
                "seconds_finetuning": sum(r["seconds"] for r in tuned),
            }
            append(OUT / "rows.jsonl", [row | {"provenance": provenance(device, verified=False)}])
            print(json.dumps(row), flush=True)
        for run in ("train", *(f"prune{ratio:g}" for ratio in args.ratios)):
            shutil.copyfile(where / run / "metrics.jsonl", OUT / f"{method}-{run}.jsonl")
    render()


def render() -> None:
    """docs/results/cifar10.md from the rows."""
    rows = [json.loads(line) for line in (OUT / "rows.jsonl").read_text().splitlines()]
    text = [INTRO]
    setups = dict.fromkeys(tuple(r[k] for k in SETUP) for r in rows)
    for setup in setups:
        s = dict(zip(SETUP, setup, strict=True))
        text.append(
            f"## {s['images']}, {s['arch']} at width {s['width']:g}\n\n{s['epochs']} epochs of training, "
            f"{s['finetune_epochs']} of fine-tuning, SGD with learning rate {s['lr']:g}, batch {s['batch_size']}, "
            f"{s['precision']}, seed {s['seed']}.\n\n"
            "| method | removed | trained: best | last | cut, before tuning | tuned: best | last | MACs (M) "
            "| parameters (k) |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|"
        )
        for r in rows:
            if tuple(r[k] for k in SETUP) == setup:
                dense, pruned = r["dense"], r["pruned"]
                cells = [r["method"], f"{r['ratio']:.0%}", *(f"{r[k]:.2%}" for k in ACCURACIES)]
                cells.append(f"{dense['macs'] / 1e6:.2f} → {pruned['macs'] / 1e6:.2f}")
                cells.append(f"{dense['params'] / 1e3:.0f} → {pruned['params'] / 1e3:.0f}")
                text.append("| " + " | ".join(cells) + " |")
        text.append("")
    OUT.with_suffix(".md").write_text("\n".join(text))


SETUP = ("images", "arch", "width", "epochs", "finetune_epochs", "lr", "batch_size", "precision", "seed")
ACCURACIES = (
    "train_acc_best",
    "train_acc_last",
    "pruned_acc_before_finetuning",
    "finetuned_acc_best",
    "finetuned_acc_last",
)


def _norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]


if __name__ == "__main__":
    main()
