"""What half of the multiply-accumulates is worth in time: a forward before and after pruning, in eval mode.

    dense               the network of torchvision, untrained, norms with random statistics
    half, half-16       fp.create("l1", coupled=True, target_macs=0.5), with round_to=16; the same share of every layer
    *-folded            each after fp.fold, dense too; of single images only, unless --fold all

Before anything is timed, each pruned network must compute what the masked one does, and each folded one what it was.
`layers` of a row sums what fp.latency gives for each kind of layer, for single images and without folding.

    python -m bench.e2e.latency --tuned && python -m bench.e2e.latency --tuned --threads 2 --fold none

`--render` only writes docs/results/latency.md again, from all rows.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models as tv

import fastprune as fp
from bench import harness, table

NETS = ("resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121", "convnext_tiny")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
TARGET = 0.5
ROUND_TO = {"half": None, "half-16": 16}
PROPORTION = 0.8  # of the speedup that the MACs promise; what stays below is named
PAGE = harness.ROOT / "docs" / "results" / "latency.md"


def setup(net: str) -> nn.Module:
    """As from torchvision, but with statistics and affine parameters that are not 0 and 1."""
    torch.manual_seed(0)
    model = getattr(tv, net)(weights=None).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.1)
    return model


def contestants(model: nn.Module, image: torch.Tensor, fold: bool) -> dict[str, nn.Module]:
    """The dense network and what becomes of it, all proved: implementation to model."""
    found, example = {"dense": model}, torch.randn(2, 3, 64, 64)  # a proof needs no more
    for impl, round_to in ROUND_TO.items():
        method = fp.create("l1", model, image, coupled=True, target_macs=TARGET, round_to=round_to)
        found[impl] = fp.compact(copy.deepcopy(model), method.keep_masks(), example, graph=method.graph)
    if fold and any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        with warnings.catch_warnings():  # it names the norms that cannot be folded, such as those before a convolution
            warnings.simplefilter("ignore")
            found |= {f"{impl}-folded": fp.fold(copy.deepcopy(m), example) for impl, m in found.items()}
    return found


def by_kind(report: Any, dense: nn.Module) -> dict[str, list[float]]:
    """Milliseconds before and after, summed over each kind of layer."""
    kinds: dict[str, list[float]] = {}
    for row in report.rows:
        before, after = row["before"], row["after"]
        kind = row["kind"] or "all else"
        if kind == "Conv2d" and dense.get_submodule(row["name"]).groups > 1:
            kind = "Conv2d, grouped"
        sums = kinds.setdefault(kind, [0.0, 0.0])
        sums[0] += before["ms"]
        sums[1] += after["ms"]
    return {kind: [float(f"{ms:.4g}") for ms in sums] for kind, sums in kinds.items()}


def bench(args: argparse.Namespace, net: str) -> list[dict]:
    dense, image = setup(net), torch.randn(1, 3, args.size, args.size)
    models = contestants(dense, image, args.fold != "none")
    counts = {impl: fp.flops(m, image) for impl, m in models.items()}
    found = []
    for layout in args.layouts:
        for m in models.values():
            m.to(args.device, memory_format=LAYOUTS[layout])
        for batch in args.batches:
            x = torch.randn(batch, 3, args.size, args.size, device=args.device).to(memory_format=LAYOUTS[layout])
            folded = batch == 1 or args.fold == "all"
            with torch.no_grad():
                calls = {impl: partial(m, x) for impl, m in models.items() if folded or impl in ("dense", *ROUND_TO)}
                samples = harness.interleave(calls, rounds=args.rounds, sample_s=0.05, clock=harness.clock_for(args))
            case = {"net": net, "batch": batch, "layout": layout, "size": args.size}
            case |= harness.setting(args, "tuned" if args.tuned else "default")
            over = {
                impl: ["dense-folded" if impl.endswith("-folded") else "dense"]
                for impl in models
                if "dense" not in impl
            }
            rows = harness.rows_of("latency", case, samples, over)
            for row in rows:
                impl = row["impl"]
                row["metrics"] = {"mmacs": round(counts[impl]["macs"] / 1e6, 1), "params": counts[impl]["params"]}
                if impl in ROUND_TO and batch == 1:
                    row["layers"] = by_kind(fp.latency(models[impl], x, compare=dense, repeats=args.rounds), dense)
                gain = row.get("speedup", {}).get(over.get(impl, [""])[0])
                print(
                    f"{net:16}{layout:14} batch {batch:3} {impl:15}{row['us'] / 1e3:9.2f} ms "
                    f"({row['us_p20'] / 1e3:.2f}-{row['us_p80'] / 1e3:.2f}) {row['metrics']['mmacs']:8.1f} MMACs"
                    + (f"  {gain['ratio']:.2f}x (rounds {gain['p20']:.2f}-{gain['p80']:.2f})" if gain else ""),
                    flush=True,
                )
            harness.finish(args, "latency", rows)
            found += rows
    return found


def page(rows: list[dict]) -> str:
    """docs/results/latency.md from rows."""
    text = [
        "# What half of the multiply-accumulates is worth in time",
        "",
        "Written by `python -m bench.e2e.latency`; its first lines say what each implementation is. A forward in eval",
        "mode; medians, and in brackets how many times faster than the dense network (folded: than the folded one),",
        "with the 20th and 80th percentile of the ratios within a round: where they do not fit, the machine was busy.",
        "",
    ]
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        case = row["case"]
        key = (row["provenance"]["device"], case["threads"], case["allocator"], case.get("clock", "wall"), case["size"])
        cases.setdefault(key, {}).setdefault((case["net"], case["batch"], case["layout"]), {})[row["impl"]] = row
    behind = []
    for (device, threads, allocator, clock, size), of in sorted(cases.items(), key=str):
        first = next(iter(next(iter(of.values())).values()))
        impls = list(dict.fromkeys(impl for found in of.values() for impl in found))
        text += [f"## {device}, {threads} threads, {size} x {size}, allocator {allocator}, {clock} time", ""]
        text += [f"torch {first['provenance']['torch']}, {first['provenance']['date'][:10]}."]
        if not all(row["provenance"]["verified"] for found in of.values() for row in found.values()):
            text.append("NOT VERIFIED by tests.")
        text += ["", f"| net | batch | layout | MACs | {', ms | '.join(impls)}, ms |"]
        text.append(f"| --- | ---: | --- | ---: |{' ---: |' * len(impls)}")
        for (net, batch, layout), found in of.items():
            dense = found["dense"]["metrics"]["mmacs"]
            cells = [net, str(batch), layout, f"{found['half']['metrics']['mmacs'] / dense:.3f}"]
            for impl in impls:
                cells.append(_cell(found[impl]) if impl in found else "")
                if impl in found and (gain := next(iter(found[impl].get("speedup", {}).values()), None)):
                    promised = dense / found[impl]["metrics"]["mmacs"]
                    if gain["ratio"] < PROPORTION * promised:
                        where = f"{net} | {batch} | {layout} | {threads} | {impl}"
                        behind.append(f"| {where} | {promised:.2f}x | {gain['ratio']:.2f}x |")
            text.append(f"| {' | '.join(cells)} |")
        text.append("")
    text += ["## Not faster in proportion", ""]
    if behind:
        text += [f"Less than {PROPORTION:g} of the factor by which the MACs shrink.", ""]
        text.append("| net | batch | layout | threads | implementation | fewer MACs | faster |")
        text += [f"| {'--- | ' * 5}---: | ---: |", *behind]
    else:
        text.append("None.")
    if layered := [row for row in rows if "layers" in row]:
        text += ["", "## Where the time goes", ""]
        text += ["Milliseconds of all layers of a kind, inside the forward of one image, before > after.", ""]
        kinds = list(dict.fromkeys(kind for row in layered for kind in row["layers"]))
        text.append(f"| net | batch | layout | threads | implementation | {' | '.join(kinds)} |")
        text.append(f"| {'--- | ' * 5}{'---: | ' * len(kinds)}".rstrip())
        for row in layered:
            case, layers = row["case"], row["layers"]
            cells = [case["net"], str(case["batch"]), case["layout"], str(case["threads"]), row["impl"]]
            cells += ["{:.3g} > {:.3g}".format(*layers[kind]) if kind in layers else "" for kind in kinds]
            text.append(f"| {' | '.join(cells)} |")
    return "\n".join([*text, ""])


def _cell(row: dict) -> str:
    text = f"{row['us'] / 1e3:,.1f}"
    gains = [f"{s['ratio']:.2f}x, {s['p20']:.2f}-{s['p80']:.2f}" for s in row.get("speedup", {}).values()]
    return text + "".join(f" ({gain})" for gain in gains)


def main() -> None:
    tests = ["tests/test_budget.py", "tests/test_latency.py"]
    p = harness.arguments("Time networks before and after pruning to half of their MACs.", tests)
    p.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    p.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    p.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    p.add_argument("--size", type=int, default=224, help="of the images")
    p.add_argument("--fold", choices=("one", "all", "none"), default="one", help="which batches also run folded")
    p.add_argument("--tuned", action="store_true", help="after fastprune.tune_cpu_memory(), all of them")
    p.add_argument("--render", action="store_true", help="only write the page again, from all rows")
    p.add_argument("--page", type=Path, default=PAGE)
    p.set_defaults(rounds=harness.MIN_ROUNDS)
    args = p.parse_args()
    if not args.render:
        harness.start(args)
        if args.tuned:
            harness.tune()
        for net in args.nets:
            bench(args, net)
    if not args.no_write:
        folders = [args.out] if args.out else sorted(harness.RESULTS.iterdir())
        paths = [path for folder in folders if (path := folder / "latency.jsonl").exists()]
        args.page.write_text(page(table.latest(paths)))


if __name__ == "__main__":
    main()
