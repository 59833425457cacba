"""The optimizer's step over all parameters of a network, with a regularisation per filter and masks, against torch's.

"sgd + loop" is the usual way to do what GrowingSGD does: ``grad += reg * weight`` layer by layer, the step, and masks
on parameters and momentum by ``torch._foreach_mul_``.  "sgd foreach", "sgd fused" and "plain" only step.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bench import harness
from bench.ops.batch_norm_act import DTYPES
from fastprune import backends, models
from fastprune.optim import GrowingSGD

NETWORKS = ("resnet56", "vgg16-rni", "resnet50")
OURS, PLAIN, FOREACH, FUSED, LOOP = "GrowingSGD", "GrowingSGD plain", "sgd foreach", "sgd fused", "sgd + loop"
OPTIONS = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 5e-4}


def parameters_of(network: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """All parameters of a network, random."""
    return [p.detach() for p in models.create(network).to(device, dtype).parameters()]


def constraints(params: list[nn.Parameter]) -> tuple[dict[nn.Parameter, Tensor], dict[nn.Parameter, Tensor]]:
    """A regularisation per filter of all weights, and a mask per filter or channel of all parameters."""
    acc = torch.promote_types(params[0].dtype, torch.float32)
    of = {p: torch.arange(len(p), dtype=acc, device=p.device).view(-1, *[1] * (p.dim() - 1)) / len(p) for p in params}
    return {p: 1e-3 * r for p, r in of.items() if p.dim() > 1}, {p: r > 0.3 for p, r in of.items()}


def contestants(tensors: list[Tensor]) -> dict[str, harness.Call]:
    """Implementation to a step, which returns its own parameters; ``"copy"`` copies all at once."""

    def made(cls: type[torch.optim.SGD], **options: bool) -> tuple[torch.optim.SGD, list[nn.Parameter]]:
        params = [nn.Parameter(t.clone()) for t in tensors]
        for p in params:
            p.grad = 1e-3 * torch.ones_like(p)
        return cls(params, **OPTIONS, **options), params

    def steps(cls: type[torch.optim.SGD], **options: bool) -> harness.Call:
        optimizer, params = made(cls, **options)
        return lambda: (optimizer.step(), params)[1]

    (ours, our_params), (loop, params) = made(GrowingSGD), made(torch.optim.SGD, foreach=True)
    ours.constrain(*constraints(our_params))
    reg, keep = constraints(params)
    masks = [k.to(p.dtype) for p, k in keep.items()]

    @torch.no_grad()
    def by_hand() -> list[nn.Parameter]:
        for p, r in reg.items():
            p.grad += r * p
        loop.step()
        torch._foreach_mul_(params, masks)
        torch._foreach_mul_([loop.state[p]["momentum_buffer"] for p in params], masks)
        return params

    flat = torch.cat([t.reshape(-1) for t in tensors])
    target = torch.empty_like(flat)
    return {
        FOREACH: steps(torch.optim.SGD, foreach=True),
        FUSED: steps(torch.optim.SGD, fused=True),
        LOOP: by_hand,
        PLAIN: steps(GrowingSGD),
        OURS: lambda: (ours.step(), our_params)[1],
        "copy": lambda: target.copy_(flat),
    }


def run(args: argparse.Namespace) -> Iterator[dict]:
    clock = harness.clock_for(args)
    for network in args.networks:
        for dtype in args.dtypes:
            tensors = parameters_of(network, DTYPES[dtype], args.device)
            with backends.force(args.backend, "growing_sgd"):
                samples = harness.interleave(contestants(tensors), rounds=args.rounds, clock=clock)
            size = sum(t.nbytes for t in tensors)
            traffic = {name: (2 if name == "copy" else 5) * size for name in samples}
            case = {"network": network, "dtype": dtype} | harness.setting(args, "default")
            over = {OURS: [LOOP, FOREACH, FUSED], PLAIN: [FOREACH, FUSED]}
            rows = harness.rows_of("growing_sgd", case, samples, over, traffic)
            harness.finish(args, "growing_sgd", rows)
            for row in rows:
                ratios = "  ".join(f"{s['ratio']:.2f}x {other}" for other, s in row.get("speedup", {}).items())
                speed = f"{row['us']:10.1f} us{row['gb_per_s']:7.1f} GB/s"
                print(f"{network:10}{dtype:9}{row['impl']:17}{speed}  {ratios}", flush=True)
            yield from rows


def main() -> None:
    p = harness.arguments("Time the step of GrowingSGD.", tests=["tests/test_growing_sgd.py"])
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    p.add_argument("--quick", action="store_true", help="the small network: to see that it runs, not to believe")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    p.add_argument("--backend", default=None, help="ours; default: the first compiled one for the device")
    args = p.parse_args()
    if args.quick:
        args.networks = NETWORKS[:1]
    args.backend = args.backend or backends.PREFERENCE["growing_sgd"][args.device][0]
    harness.start(args)
    rows = [row for row in run(args) if row["impl"] == OURS]
    ratios = [row["speedup"][LOOP]["ratio"] for row in rows]
    print(f"\n{len(ratios)} cases: least {min(ratios):.2f}x the loop, median {statistics.median(ratios):.2f}x")


if __name__ == "__main__":
    main()
