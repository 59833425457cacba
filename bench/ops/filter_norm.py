"""filter_norm and weight_taylor over all weights of a network, against the loop over its weights that users write."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench import harness
from bench.ops.batch_norm_act import DTYPES
from fastprune import backends, models, ops

NETWORKS = ("resnet56", "resnet50")
OURS, EAGER = "fastprune", "eager loop"


def weights_of(network: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Weights of the convolutions and linear layers, random."""
    model = models.create(network).to(device, dtype)
    return [m.weight.detach() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def contestants(what: str, weights: list[Tensor], backend: str) -> dict[str, harness.Call]:
    """Implementation to a call; ``"copy"`` copies all weights at once."""
    grads = [torch.randn_like(w) for w in weights] if what == "taylor" else None
    flat = torch.cat([w.reshape(-1) for w in weights])
    target = torch.empty_like(flat)
    loops = {
        "l1": lambda: [w.abs().flatten(1).sum(1) for w in weights],
        "l2": lambda: [w.flatten(1).norm(dim=1) for w in weights],
        "l1 inputs": lambda: [w.abs().sum([d for d in range(w.dim()) if d != 1]) for w in weights],
        "taylor": lambda: [(w * g).square().flatten(1).sum(1) for w, g in zip(weights, grads, strict=True)],
    }
    ours = {
        "l1": lambda: ops.filter_norm(weights, "l1", backend=backend),
        "l2": lambda: ops.filter_norm(weights, "l2", backend=backend),
        "l1 inputs": lambda: ops.filter_norm(weights, "l1", dim=1, backend=backend),
        "taylor": lambda: ops.weight_taylor(weights, grads, backend),
    }
    return {EAGER: loops[what], OURS: ours[what], "copy": lambda: target.copy_(flat)}


def run(args: argparse.Namespace) -> Iterator[dict]:
    clock = harness.clock_for(args)
    for network in args.networks:
        for dtype in args.dtypes:
            weights = weights_of(network, DTYPES[dtype], args.device)
            size = sum(w.nbytes for w in weights)
            for what in ("l1", "l2", "l1 inputs", "taylor"):
                samples = harness.interleave(contestants(what, weights, args.backend), rounds=args.rounds, clock=clock)
                tensors = 2 if what == "taylor" else 1
                traffic = {name: (2 if name == "copy" else tensors) * size for name in samples}
                case = {"what": what, "network": network, "dtype": dtype} | harness.setting(args, "default")
                rows = harness.rows_of("filter_norm", case, samples, {OURS: [EAGER]}, traffic)
                harness.finish(args, "filter_norm", rows)
                for row in rows:
                    print(
                        f"{what:10}{network:9}{dtype:9}{row['impl']:11}{row['us']:10.1f} us{row['gb_per_s']:7.1f} GB/s "
                        f"{row['of_copy']:5.0%} of copy  {row.get('speedup', '')}",
                        flush=True,
                    )
                yield from rows


def main() -> None:
    p = harness.arguments("Time filter_norm and weight_taylor.", tests=["tests/test_filter_sums.py"])
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    p.add_argument("--quick", action="store_true", help="the small network: to see that it runs, not to believe")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    p.add_argument("--backend", default=None, help="ours; default: the first compiled one for the device")
    args = p.parse_args()
    if args.quick:
        args.networks = NETWORKS[:1]
    args.backend = args.backend or backends.PREFERENCE["filter_norm"][args.device][0]
    harness.start(args)
    rows = list(run(args))
    ratios = [row["speedup"][EAGER]["ratio"] for row in rows if row["impl"] == OURS]
    print(f"\n{len(ratios)} cases: least {min(ratios):.2f}x the loop, median {statistics.median(ratios):.2f}x")


if __name__ == "__main__":
    main()
