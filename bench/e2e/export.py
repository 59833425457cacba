"""Networks pruned by half, made plain, folded, and written to files that run without fastprune.

    python -m bench.e2e.export                    # all networks, some 40 minutes on one core
    python -m bench.e2e.export --nets resnet18    # these rows anew, the others stay

Each network gets random scales, statistics of random images, our norms (bounded, adds and ReLUs folded in), and loses
half of each group at random.  Then, on two random images:

    plain   to_plain against the network before it, in float64, eval and training mode: the larger relative difference
    folded  norms that fold put into the layer before them, of all; relative difference in float64
    files   .pt2 and .onnx by fastprune.export, each read back and compared with the float64 network on four batches of
            three sizes (ONNX by onnxruntime's CPU kernels): largest relative difference, and beside it that of PyTorch
            eager in float32; sizes of the files (of the whole network: of its .pt2 only)

Writes docs/results/export.json and .md after each network (``--render``: only the page again).
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastprune as fp
from bench.harness import ROOT, provenance
from fastprune.export import TIMES_EAGER, TOLERANCE
from fastprune.surgery import leaves

OUT = ROOT / "docs" / "results" / "export.json"
OURS = ("vgg16-rni", "resnet56-rni", "resnet56", "wrn-40-2", "densenet-bc-100", "lenet-taylor")
# One of each torchvision family, and what timm does differently: norms with activations inside, split attention, ...
TORCHVISION = {
    "alexnet": 64, "vgg11_bn": 64, "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64, "densenet121": 64,
    "mobilenet_v2": 64, "mobilenet_v3_small": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64, "googlenet": 64,
    "inception_v3": 299, "squeezenet1_1": 64, "shufflenet_v2_x0_5": 64, "regnet_y_400mf": 64, "mnasnet0_5": 64,
    "convnext_tiny": 64, "swin_t": 224, "vit_b_16": 224, "maxvit_t": 224,
}  # fmt: skip
TIMM = {
    "tf_efficientnet_b0": 64, "repvgg_a0": 64, "res2net50_26w_4s": 64, "skresnet18": 64, "ghostnet_100": 64,
    "mixnet_s": 64, "cspresnet50": 64, "dpn48b": 64, "resnetv2_50": 64, "nf_regnet_b0": 64,
}  # fmt: skip
NETS = dict.fromkeys(OURS, 32) | TORCHVISION | TIMM


def build(net: str) -> tuple[nn.Module, Tensor]:
    """The network in eval mode with scales and statistics that are not those of its initialisation, and two images."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"bound": "sigmoid"} if net.endswith("-rni") else {}
    model = fp.models.create(net, num_classes=10, **options)
    x = torch.randn(2, 3, NETS[net], NETS[net])
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    with torch.no_grad():
        for m in norms:
            if getattr(m, "bound", None) is None and m.weight is not None:
                m.weight.uniform_(0.2, 0.95)
                m.bias.normal_(0, 0.2)
            m.momentum = None
        model.train()
        for _ in range(4):
            model(torch.randn(8, *x.shape[1:]))
    for m in norms:
        m.momentum = 0.1
    return model.eval(), x


def prune(model: nn.Module, x: Tensor) -> None:
    graph, keep = fp.graph.trace(model, x), {}
    for name, group in graph.groups.items():
        keep[name] = torch.zeros(group.size, dtype=torch.bool)
        keep[name][torch.randperm(group.size)[: max(1, group.size // 2)]] = True
    fp.compact(model, keep, x, graph=graph)


def run(model: nn.Module, x: Tensor, training: bool = False) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.cat([t.flatten() for t in leaves(model.train(training)(x))])


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def measure(net: str) -> dict[str, Any]:
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be fused, and what stays frozen
        model, x = build(net)
        whole = copy.deepcopy(model)
        fp.nn.convert_batchnorm(model, bound="sigmoid")
        prune(model, x)
    row: dict[str, Any] = {"net": net, "image": NETS[net]}
    row["parameters"] = [sum(p.numel() for p in m.parameters()) for m in (whole, model)]

    exact, images = copy.deepcopy(model).double(), x.double()
    plain = fp.to_plain(copy.deepcopy(exact), images)
    row["ours_left"] = sum(type(m).__module__.startswith("fastprune.nn") for m in plain.modules())
    row["plain"] = max(gap(run(copy.deepcopy(plain), images, t), run(exact, images, t)) for t in (False, True))
    expected = run(plain.eval(), images)
    norms = sum(isinstance(m, _BatchNorm) for m in plain.modules())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folded = fp.fold(plain, images)
    stay = sum(isinstance(m, _BatchNorm) for m in folded.modules())
    row |= {"norms": norms, "folded": norms - stay, "fold": gap(run(folded, images), expected)}
    row["stay"] = [str(w.message) for w in caught]
    del exact, plain, folded

    with tempfile.TemporaryDirectory() as folder:
        before = fp.export(whole, Path(folder) / "whole.pt2", x, check=False).bytes
        for suffix in (".pt2", ".onnx"):
            path = Path(folder) / f"model{suffix}"
            report = fp.export(model, path, x)
            row[suffix] = {
                "bytes": [report.bytes],
                "difference": report.difference,
                "eager": report.eager_difference,
                "opset": report.opset,
            }
    row[".pt2"]["bytes"].insert(0, before)
    row["seconds"] = time.perf_counter() - started
    return row


def small_number(x: float) -> str:
    return f"{x:.0e}" if x else "0"


def page(results: dict[str, Any]) -> str:
    rows, facts = sorted(results["rows"], key=lambda row: [*NETS].index(row["net"])), results["provenance"]
    text = [
        "# Plain networks and their files",
        "",
        "Written by `python -m bench.e2e.export`, whose first lines say what is done and measured; all numbers are in",
        "[export.json](export.json). Differences are relative to the largest output: `plain` and `fold` in float64,",
        "files in float32 against the float64 network, in brackets what PyTorch eager in float32 is off. A file may be",
        f"off by {TOLERANCE:g} or {TIMES_EAGER} times eager. 0: the same operators ran on the same numbers.",
        "MB: whole → pruned.",
        "",
        f"{facts['device']}, torch {facts['torch']}, onnx {facts['onnx']}, onnxruntime {facts['onnxruntime']}; "
        f"{facts['date'][:10]}.",
        "",
        "| network | image | parameters, millions | plain | norms folded | fold | .pt2 | MB | .onnx | MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        head = f"| {row['net']} | {row['image']} |"
        if "error" in row:
            text.append(f"{head} {row['error']} | | | | | | | |")
            continue
        whole, small = (n / 1e6 for n in row["parameters"])
        cells = [f"{whole:.2f} → {small:.2f}", small_number(row["plain"]), f"{row['folded']} of {row['norms']}"]
        cells.append(small_number(row["fold"]))
        for suffix in (".pt2", ".onnx"):
            file = row[suffix]
            cells.append(f"{small_number(file['difference'])} ({small_number(file['eager'])})")
            cells.append(" → ".join(f"{n / 1e6:.2f}" for n in file["bytes"]))
        text.append(f"{head} {' | '.join(cells)} |")
    good = [row for row in rows if "error" not in row]
    text += [
        "",
        f"{len(good)} of {len(rows)} networks: {sum(row['folded'] for row in good)} of "
        f"{sum(row['norms'] for row in good)} norms folded, {sum(row['ours_left'] for row in good)} modules of "
        "fastprune left in them.",
        "",
        "Norms that stay, and the first reasons:",
        "",
    ]
    text += [f"- {row['net']}: {said.removeprefix('fold: ')[:400]}" for row in good for said in row["stay"]]
    return "\n".join([*text, ""])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    p.add_argument("--out", type=Path, default=OUT, help="the numbers; the page is written beside them")
    p.add_argument("--render", action="store_true", help="only write the page again")
    args = p.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    for net in [] if args.render else args.nets:
        import onnx
        import onnxruntime

        try:
            row = measure(net)
        except fp.FastpruneError as e:
            row = {"net": net, "image": NETS[net], "error": str(e)}
        print(row, flush=True)
        results["rows"] = [r for r in results["rows"] if r["net"] != net] + [row]
        results["provenance"] = provenance("cpu", verified=True)
        results["provenance"] |= {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(page(results))
    args.out.with_suffix(".md").write_text(page(results))


if __name__ == "__main__":
    main()
