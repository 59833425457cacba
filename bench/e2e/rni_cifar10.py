"""RNI, L1 and UCS on CIFAR-10 as an image folder: train, prune at several ratios, fine-tune; one result row per ratio.

    python -m bench.e2e.rni_cifar10 --root CIFAR10_FOLDER --width 0.25 --epochs 30 --finetune-epochs 10

The authors train a full-width VGG-16 for 160 epochs and fine-tune for 160; what is shortened here is on every row.
``--name`` says which images these are, e.g. "CIFAR-10 (JPEG q75)".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import fastprune as fp
from bench.harness import RESULTS, append, device_folder, provenance

# lambda and b of the authors' notebook for VGG-16
STRENGTH = {"rni": {"reg_weight": 1e-3, "b": 3}, "l1": {"reg_weight": 1e-4}, "ucs": {}}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", required=True, help="folder with train/<class>/ and test/<class>/")
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

    fp.tune_cpu_memory()
    data = fp.data.load("imagefolder", args.root)
    common = {"batch_size": args.batch_size, "seed": args.seed, "lr": args.lr, "precision": args.precision}
    common |= {"channels_last": True, "dataset": data, "resume": True}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = RESULTS / device_folder(device) / "rni_cifar10.jsonl"
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
            append(out, [row | {"provenance": provenance(device, verified=False)}])
            print(json.dumps(row), flush=True)


def _norms(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]


if __name__ == "__main__":
    main()
