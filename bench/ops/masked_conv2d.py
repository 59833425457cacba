"""masked_conv2d with dead inputs and outputs, forward and backward, against two convolutions:

    eager     ``F.conv2d(x * in_mask, weight) * out_mask``, what masked training does today
    smaller   the dense convolution of the live channels alone: what compaction would leave, the limit

The masks are fixed and looked up once, as MaskedConv2d does; channels die at random places.  3x3, padding 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench import harness
from bench.ops.batch_norm_act import DTYPES, LAYOUTS, shape_of
from fastprune import backends, ops

SHAPES = (
    *((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)),  # ResNet-56 on CIFAR
    *((128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8), (128, 512, 4, 4), (128, 512, 2, 2)),  # VGG-16
)
DEAD = (0.5, 0.75, 0.9)
OURS, EAGER, SMALLER = "fastprune", "eager", "smaller"
GOAL = 1.3  # times the smaller convolution, at 75 % dead


def contestants(shape: tuple[int, ...], dead: float, dtype, layout, device: str, backend: str) -> dict:
    """Implementation to a call: forward and backward of a layer C to C, (1 - dead) of its inputs and outputs live."""

    def tensor(*size):
        return torch.randn(size, device=device).to(dtype, memory_format=layout)

    C = shape[1]
    masks = torch.zeros(2, C, dtype=torch.bool, device=device)
    for mask in masks:
        mask[torch.randperm(C, device=device)[: max(1, round(C * (1 - dead)))]] = True
    x, weight, dy = tensor(*shape).requires_grad_(), tensor(C, C, 3, 3).requires_grad_(), tensor(*shape)
    live_in, live_out = map(ops.live_channels, masks)
    in_mask, out_mask = (mask.to(dtype).view(1, -1, 1, 1) for mask in masks)
    few = [t.detach()[:, mask].contiguous(memory_format=layout) for t, mask in zip((x, dy), masks, strict=True)]
    few_weight = weight.detach()[masks[1]][:, masks[0]].contiguous(memory_format=layout).requires_grad_()
    few[0].requires_grad_()
    forward = {
        OURS: lambda: ops.masked_conv2d(x, weight, in_mask=live_in, out_mask=live_out, padding=1, backend=backend),
        EAGER: lambda: F.conv2d(x * in_mask, weight, padding=1) * out_mask,
    }
    calls = {name: lambda run=run: torch.autograd.grad(run(), (x, weight), dy) for name, run in forward.items()}
    calls[SMALLER] = lambda: torch.autograd.grad(F.conv2d(few[0], few_weight, padding=1), (few[0], few_weight), few[1])
    return calls


def run(args: argparse.Namespace, allocator: str) -> Iterator[dict]:
    cases = [(s, d, la, dead) for s in args.shapes for d in args.dtypes for la in args.layouts for dead in args.dead]
    clock = harness.clock_for(args)
    for shape, dtype, layout, dead in cases:
        calls = contestants(shape, dead, DTYPES[dtype], LAYOUTS[layout], args.device, args.backend)
        samples = harness.interleave(calls, rounds=args.rounds, sample_s=args.sample_ms / 1e3, clock=clock)
        case = {"shape": "x".join(map(str, shape)), "dtype": dtype, "layout": layout, "dead": dead}
        case |= harness.setting(args, allocator)
        rows = harness.rows_of("masked_conv2d", case, samples, {OURS: [EAGER, SMALLER]})
        harness.finish(args, "masked_conv2d", rows)
        for row in rows:
            faster = ", ".join(f"{s['ratio']:.2f}x {over}" for over, s in row.get("speedup", {}).items())
            print(f"{case['shape']:14}{dtype:9}{layout:5}{dead:5.0%} {row['impl']:10}{row['us']:10.1f} us  {faster}")
            yield row


def summary(rows: list[dict]) -> str:
    """Time over the smaller convolution's and under eager's, per share of dead channels, and what misses the goal."""
    lines = []
    ours = [row for row in rows if row["impl"] == OURS]
    for dead in sorted({row["case"]["dead"] for row in ours}):
        mine = [row for row in ours if row["case"]["dead"] == dead]
        over = {" ".join(str(row["case"][n]) for n in ("shape", "dtype", "layout")): row["speedup"] for row in mine}
        times = {case: 1 / s[SMALLER]["ratio"] for case, s in over.items()}
        eager = [s[EAGER]["ratio"] for s in over.values()]
        lines.append(
            f"{dead:.0%} dead, {len(mine)} cases: {min(times.values()):.2f}-{max(times.values()):.2f} x the time of "
            f"the smaller convolution, median {statistics.median(times.values()):.2f}; "
            f"{min(eager):.2f}-{max(eager):.2f} x faster than eager, median {statistics.median(eager):.2f}"
        )
        if dead == 0.75:
            missed = {case: t for case, t in times.items() if t > GOAL}
            lines[-1] += f"; goal {GOAL} missed in {len(missed)}"
            lines += [f"    {t:.2f}  {case}" for case, t in sorted(missed.items(), key=lambda item: -item[1])]
    return "\n".join(lines)


def share(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a share of dead channels in [0, 1), got {text!r}")
    return value


def main() -> None:
    p = harness.arguments("Time masked_conv2d.", tests=["tests/test_masked_conv2d.py"])
    p.add_argument("--shapes", type=shape_of, nargs="+", default=SHAPES, metavar="NxCxHxW")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    p.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    p.add_argument("--dead", type=share, nargs="+", default=DEAD, help="share of dead inputs and of dead outputs")
    p.add_argument("--backend", default=None, help="ours; default: the first compiled one for the device")
    p.add_argument("--tuned", action="store_true", help="after fastprune.tune_cpu_memory(), for all contestants")
    p.add_argument("--sample-ms", type=float, default=10.0, help="least length of a sample")
    args = p.parse_args()
    args.backend = args.backend or backends.PREFERENCE["masked_conv2d"][args.device][0]
    started = time.perf_counter()
    harness.start(args)
    if args.tuned:
        harness.tune()
    rows = list(run(args, "tuned" if args.tuned else "default"))
    print(f"\n{summary(rows)}\n\n{len(rows)} rows, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
