"""gram_penalty of trainability preserving pruning, value and gradient, over all convolutions of a network.

    eager   what the method is without the op: per layer G = A A^T, a target that is G with the rows and columns of cut
            channels zeroed, the mean of the squares of the difference, and backward

Products are counted in both: eager makes three of 2 N^2 K operations per layer, the op only what is needed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench import harness
from bench.ops.batch_norm_act import DTYPES
from fastprune import backends, models, ops
from fastprune.ops.gram_penalty import value_and_grad

RATIOS = {"vgg19": 0.7, "resnet56": 0.9, "resnet50": 0.5}  # of all convolutions but the first
OURS, EAGER = "fastprune", "eager"
GOAL = 2.5  # times eager, on VGG-19


def problem(network: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of the convolutions, as initialised, and keep masks: channels are cut at random places."""
    model = models.create(network).to(device, dtype)
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d)]
    keep = [torch.ones(len(w), dtype=torch.bool, device=device) for w in weights]
    for mask in keep[1:]:
        mask[torch.randperm(len(mask), device=device)[: math.ceil(RATIOS[network] * len(mask))]] = False
    return weights, keep


def contestants(weights: list[Tensor], keep: list[Tensor], backend: str) -> dict[str, harness.Call]:
    """Implementation to a call that returns the value and the gradients."""
    plan = ops.gram_plan(keep)

    def eager() -> tuple[Tensor, list[Tensor]]:
        leaves, value = [w.detach().requires_grad_() for w in weights], 0
        for w, mask in zip(leaves, keep, strict=True):
            a = w.flatten(1)
            gram = a @ a.t()
            target = gram.detach().clone()
            target[~mask] = 0
            target[:, ~mask] = 0
            value = value + (gram - target).square().mean()
        value.backward()
        return value.detach(), [w.grad for w in leaves]

    return {EAGER: eager, OURS: lambda: value_and_grad(weights, plan, 1.0, 0.0, None, backend)}


def operations(weights: list[Tensor], keep: list[Tensor]) -> dict[str, float]:
    """Implementation to the operations of its matrix products."""
    count = dict.fromkeys((EAGER, OURS), 0.0)
    for w, mask in zip(weights, keep, strict=True):
        n, cut, width = len(w), int((~mask).sum()), w[0].numel()
        kept = n - cut
        count[EAGER] += 3 * 2 * n * n * width
        count[OURS] += 2 * width * (cut * (cut + 1) / 2 + cut * kept + cut * n + kept * cut)
    return count


def run(args: argparse.Namespace) -> Iterator[dict]:
    clock = harness.clock_for(args)
    for network in args.networks:
        for dtype in args.dtypes:
            weights, keep = problem(network, DTYPES[dtype], args.device)
            samples = harness.interleave(contestants(weights, keep, args.backend), rounds=args.rounds, clock=clock)
            case = {"network": network, "dtype": dtype, "ratio": RATIOS[network]} | harness.setting(args, "default")
            rows = harness.rows_of("gram_penalty", case, samples, {OURS: [EAGER]})
            for row in rows:
                row["operations"] = operations(weights, keep)[row["impl"]]
                row["gflop_per_s"] = float(f"{row['operations'] / row['us'] / 1e3:.4g}")
            harness.finish(args, "gram_penalty", rows)
            for row in rows:
                print(
                    f"{network:9}{dtype:9}{row['impl']:11}{row['us'] / 1e3:9.2f} ms{row['operations'] / 1e9:8.2f} Gflop"
                    f"{row['gflop_per_s']:8.1f} Gflop/s  {row.get('speedup', '')}",
                    flush=True,
                )
            yield from rows


def main() -> None:
    p = harness.arguments("Time gram_penalty.", tests=["tests/test_gram_penalty.py"])
    p.add_argument("--networks", nargs="+", choices=RATIOS, default=list(RATIOS))
    p.add_argument("--quick", action="store_true", help="the small network: to see that it runs, not to believe")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    p.add_argument("--backend", default=None, help="ours; default: the first compiled one for the device")
    args = p.parse_args()
    if args.quick:
        args.networks = ["resnet56"]
    args.backend = args.backend or backends.PREFERENCE["gram_penalty"][args.device][0]
    harness.start(args)
    for row in run(args):
        if row["impl"] == OURS and row["case"]["network"] == "vgg19":
            print(f"goal {GOAL}x eager on VGG-19: {row['speedup'][EAGER]['ratio']:.2f}x")


if __name__ == "__main__":
    main()
