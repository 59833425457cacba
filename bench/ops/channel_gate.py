"""channel_gate, forward and backward, against its definition in eager PyTorch.

    gate    x * gate with both gradients and the gate gradients of each sample
    probe   only the gate gradients, on activations that pass unchanged

Eager makes the sums of each sample in a hook on the output.  GB/s count what any implementation must move, against a
copy of x in the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from bench import harness
from bench.ops.batch_norm_act import DTYPES, LAYOUTS, QUICK, SHAPES, shape_of
from fastprune import backends, ops

TRAFFIC = {"gate": 5, "probe": 2}  # tensors of the size of x: x, y and dy, x, dx | dy, x
OURS, EAGER = "fastprune", "eager"


def contestants(what: str, x: Tensor, backend: str) -> dict[str, harness.Call]:
    """Implementation to a forward and backward on ``x`` (N, C, H, W)."""
    gate = torch.rand(x.shape[1], device=x.device, requires_grad=True) if what == "gate" else None
    dy, sums, target = torch.randn_like(x), x.new_empty(x.shape[:2], dtype=torch.float32), torch.empty_like(x)
    x.requires_grad_()
    kept = x.detach()

    def eager() -> Tensor:
        y = x.view_as(x) if gate is None else x * gate.to(x.dtype).view(-1, 1, 1)

        def hook(dy: Tensor) -> None:
            sums.copy_((dy * kept).sum((2, 3)))

        y.register_hook(hook)
        return y

    forwards = {EAGER: eager, OURS: lambda: ops.channel_gate(x, gate, gate_grad=sums, backend=backend)}
    inputs = [x] if gate is None else [x, gate]
    calls = {name: lambda f=f: torch.autograd.grad(f(), inputs, dy) for name, f in forwards.items()}
    return calls | {"copy": lambda: target.copy_(kept)}


def run(args: argparse.Namespace) -> Iterator[dict]:
    cases = [(s, d, la, w) for s in args.shapes for d in args.dtypes for la in args.layouts for w in TRAFFIC]
    clock = harness.clock_for(args)
    for shape, dtype, layout, what in cases:
        x = torch.randn(shape, device=args.device).to(DTYPES[dtype], memory_format=LAYOUTS[layout])
        calls = contestants(what, x, args.backend)
        samples = harness.interleave(calls, rounds=args.rounds, clock=clock)
        traffic = {name: (2 if name == "copy" else TRAFFIC[what]) * x.nbytes for name in calls}
        case = {"what": what, "shape": "x".join(map(str, shape)), "dtype": dtype, "layout": layout}
        case |= harness.setting(args, "tuned" if args.tuned else "default")
        rows = harness.rows_of("channel_gate", case, samples, {OURS: [EAGER]}, traffic)
        harness.finish(args, "channel_gate", rows)
        for row in rows:
            print(
                f"{what:6}{case['shape']:14}{dtype:9}{layout:5}{row['impl']:10}{row['us']:10.1f} us"
                f"{row['gb_per_s']:7.1f} GB/s {row['of_copy']:5.0%} of copy  {row.get('speedup', '')}",
                flush=True,
            )
        yield from rows


def main() -> None:
    p = harness.arguments("Time channel_gate.", tests=["tests/test_channel_gate.py"])
    p.add_argument("--shapes", type=shape_of, nargs="+", default=SHAPES, metavar="NxCxHxW")
    p.add_argument("--quick", action="store_true", help="two small shapes: to see that it runs, not to believe")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    p.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    p.add_argument("--backend", default=None, help="ours; default: the first compiled one for the device")
    p.add_argument("--tuned", action="store_true", help="after fastprune.tune_cpu_memory(), for all contestants")
    args = p.parse_args()
    if args.quick:
        args.shapes = QUICK
    args.backend = args.backend or backends.PREFERENCE["channel_gate"][args.device][0]
    harness.start(args)
    if args.tuned:
        harness.tune()
    rows = list(run(args))
    ratios = [row["speedup"][EAGER]["ratio"] for row in rows if row["impl"] == OURS]
    print(f"\n{len(ratios)} cases: least {min(ratios):.2f}x eager, median {statistics.median(ratios):.2f}x")


if __name__ == "__main__":
    main()
