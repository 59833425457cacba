"""batch_norm_act against eager PyTorch and, with --compile, torch.compile; then a summary against the goals.

What is timed, forward and backward in training unless said otherwise, parameters float32, running statistics updated:

    relu    batch norm, ReLU
    add     batch norm, residual add, ReLU
    bn      batch norm alone
    eval    batch norm, ReLU; inference: forward only, running statistics

Eager uses the in-place add and ReLU, as torchvision's networks do.  ``+gates`` also makes the per-sample gate
gradients; for eager that is a hook on the output of the batch norm, with add and ReLU not in place, since the hook
needs that output.  ``+gates+abs`` adds gate_abs, and ``+gates+out``, with the residual, out_grad and out_abs, for which
y is read once more.  On the GPU ours are named after their backends, and stand beside ``per-channel``, a Triton batch
norm of one program per channel (see bench.ops.per_channel).

GB/s count what any implementation must move (see TRAFFIC), against a copy of x in the same run; ``moved`` is what the
kernels do move, by their own count, where a tensor is read twice.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from fastprune import backends, ops

SHAPES = (
    *((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)),  # ResNet-56 on CIFAR
    *((128, 512, 2, 2), (128, 37, 8, 8), (128, 13, 32, 32)),  # VGG-16's last stage; ragged, as pruning leaves them
    *((128, 512, 7, 7), (64, 64, 56, 56), (64, 256, 56, 56)),  # ResNet-50 on ImageNet
)
QUICK = ((128, 64, 8, 8), (128, 37, 8, 8))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
TRAFFIC = {  # tensors of the size of x that must be read or written
    "relu": 5,  # forward: x, y; backward: dy, x, dx
    "add": 7,  # and the residual and its gradient; the ReLU's mask in bits is not counted
    "bn": 5,
    "eval": 2,
}
OURS, EAGER, HOOKS, COMPILED, PER_CHANNEL = "fastprune", "eager", "eager+gates", "torch.compile", "per-channel"
GATES, ABS, OUT = "+gates", "+gates+abs", "+gates+out"  # behind the name of ours
SMALL = 8 << 20  # bytes of x


@dataclass(frozen=True)
class Goal:
    """Ours is to be ``least`` times as fast as ``over`` for every shape, and ``middle`` times in the median.

    ``impl`` stands behind the name of ours, an empty ``over`` is ours.  "copy" compares the bandwidth of what is moved.
    """

    text: str
    what: tuple[str, ...]
    impl: str
    over: str
    least: float
    middle: float | None = None
    small: bool | None = None  # only tensors up to SMALL, or only larger ones
    allocator: str | None = None


GOALS = (
    Goal("ReLU, x up to 8 MB", ("relu",), "", EAGER, 2.0, 4.0, small=True),
    Goal("ReLU, x over 8 MB", ("relu",), "", EAGER, 1.6, small=False, allocator="default"),
    Goal("ReLU, x over 8 MB", ("relu",), "", EAGER, 2.0, 3.5, small=False, allocator="tuned"),
    Goal("residual add and ReLU", ("add",), "", EAGER, 1.8, 3.5),
    Goal("batch norm alone", ("bn",), "", EAGER, 1.0, 3.0),
    Goal("eval with ReLU", ("eval",), "", EAGER, 2.0, 3.0),
    Goal("everything", tuple(TRAFFIC), "", COMPILED, 1.0),
    Goal("with gate gradients", ("relu", "add"), GATES, "", 1 / 1.03),
    Goal("with gate gradients", ("relu", "add"), GATES, HOOKS, 2.5),
)
GPU_GOALS = (
    Goal("ReLU, bandwidth", ("relu",), "", "copy", 0.9),
    Goal("ReLU", ("relu",), "", EAGER, 1.0),
    Goal("ReLU", ("relu",), "", COMPILED, 1.0),
    Goal("ReLU", ("relu",), "", PER_CHANNEL, 1.0),
    Goal("with gate gradients", ("relu",), GATES, "", 1 / 1.02),
)


def eager(x, weight, bias, mean, var, tracked, residual, relu, training):
    """What nn.BatchNorm2d, ``+=`` and nn.ReLU(inplace=True) do."""
    if training:
        tracked.add_(1)
    y = F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5)
    if residual is not None:
        y += residual
    return y.relu_() if relu else y


def per_channel(x, weight, bias, mean, var, tracked, residual, relu, training):
    """The same with a Triton program per channel."""
    from bench.ops.per_channel import batch_norm  # needs triton

    tracked.add_(1)
    y = batch_norm(x, weight, bias, mean, var)
    if residual is not None:
        y += residual
    return y.relu_() if relu else y


def eager_with_hook(x, weight, bias, mean, var, tracked, residual, gates):
    """The same with ReLU, and the gate gradient from a hook."""
    tracked.add_(1)
    z = F.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)
    kept = z.detach()

    def hook(dz: Tensor) -> None:
        gates.copy_((dz * kept).sum((2, 3)))

    z.register_hook(hook)
    return (z if residual is None else z + residual).relu()


def contestants(what: str, x: Tensor, names: dict[str, str], others: Sequence[str] = ()) -> dict[str, harness.Call]:
    """Implementation to a call on ``x`` (N, C, H, W) and other inputs of its shape, dtype and layout.

    ``names`` maps names of ours to backends, ``others`` are of COMPILED and PER_CHANNEL.
    """
    C = x.shape[1]
    training, relu = what != "eval", what != "bn"
    weight, bias = (torch.rand(C, device=x.device, requires_grad=training) for _ in range(2))
    stats = [torch.zeros(C, device=x.device), torch.ones(C, device=x.device), torch.tensor(0, device=x.device)]
    residual = torch.randn_like(x).requires_grad_() if what == "add" else None
    dy, target = torch.randn_like(x), torch.empty_like(x)
    gates, *more = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(3))
    x.requires_grad_(training)
    inputs = [t for t in (x, weight, bias, residual) if t is not None]

    def fused(backend, **buffers):
        return ops.batch_norm_act(
            *(x, weight, bias, *stats),
            residual=residual,
            act="relu" if relu else None,
            training=training,
            **buffers,
            backend=backend,
        )

    def trained(forward):
        return lambda: torch.autograd.grad(forward(), inputs, dy)

    plain = (x, weight, bias, *stats, residual, relu, training)
    forwards = {EAGER: lambda: eager(*plain)}
    if what in ("relu", "add"):
        forwards[HOOKS] = lambda: eager_with_hook(*plain[:7], gates)
    for ours, b in names.items():
        forwards[ours] = lambda b=b: fused(b)
        if what in ("relu", "add"):
            forwards[ours + GATES] = lambda b=b: fused(b, gate_grad=gates)
            forwards[ours + ABS] = lambda b=b: fused(b, gate_grad=gates, gate_abs=more[0])
        if what == "add":
            forwards[ours + OUT] = lambda b=b: fused(b, gate_grad=gates, out_grad=more[0], out_abs=more[1])
    if COMPILED in others:
        torch._dynamo.reset()
        quick = torch.compile(eager, fullgraph=True, dynamic=False)
        forwards[COMPILED] = lambda: quick(*plain)
    if PER_CHANNEL in others and training:
        forwards[PER_CHANNEL] = lambda: per_channel(*plain)
    calls = {name: trained(forward) for name, forward in forwards.items()} if training else forwards
    return calls | {"copy": lambda: target.copy_(x.detach())}


def moved(what: str, shape: tuple[int, ...], layout: str, itemsize: int) -> tuple[int, dict]:
    """Bytes that the Triton kernels move, by their own count, and the path they take in each direction."""
    from fastprune.kernels.batch_norm_act import traffic

    found = traffic(shape, layout == "nhwc", itemsize, what)
    return found["forward"] + found["backward"], found["path"]


def run(args: argparse.Namespace, allocator: str) -> Iterator[dict]:
    others = [COMPILED] * args.compile + [PER_CHANNEL] * args.per_channel
    over = {}
    for ours in args.names:
        over |= {ours: [EAGER, *others], ours + GATES: [ours, HOOKS], ours + ABS: [ours], ours + OUT: [ours]}
    cases = [(s, d, la, w) for s in args.shapes for d in args.dtypes for la in args.layouts for w in args.what]
    clock = harness.clock_for(args)
    for shape, dtype, layout, what in cases:
        x = torch.randn(shape, device=args.device).to(DTYPES[dtype], memory_format=LAYOUTS[layout])
        calls = contestants(what, x, args.names, others)
        with torch.set_grad_enabled(what != "eval"):
            samples = harness.interleave(calls, rounds=args.rounds, sample_s=args.sample_ms / 1e3, clock=clock)
        traffic = {name: (2 if name == "copy" else TRAFFIC[what]) * x.numel() * x.itemsize for name in calls}
        counted = {n: moved(what, shape, layout, x.itemsize) for n, b in args.names.items() if b == "triton"}
        case = {"what": what, "shape": "x".join(map(str, shape)), "dtype": dtype, "layout": layout}
        case |= harness.setting(args, allocator)
        timed = {name: [o for o in them if o in calls] for name, them in over.items()}
        rows = harness.rows_of(
            "batch_norm_act", case, samples, timed, traffic, {n: count for n, (count, _) in counted.items()}
        )
        for row in rows:
            if row["impl"] in counted:
                row["path"] = counted[row["impl"]][1]
        harness.finish(args, "batch_norm_act", rows)
        for row in rows:
            faster = ", ".join(
                f"{s['ratio']:.2f}x {o} (rounds {s['p20']:.2f}-{s['p80']:.2f})"
                for o, s in row.get("speedup", {}).items()
            )
            print(
                f"{what:5}{case['shape']:14}{dtype:9}{layout:5}{row['impl']:20}{row['us']:10.1f} us"
                f"{row['gb_per_s']:7.1f} GB/s {row['of_copy']:5.0%} of copy  "
                + (f"(moved {row['moved_of_copy']:.0%})  " if "moved_of_copy" in row else "")
                + faster,
                flush=True,
            )
            yield row


def bytes_of(case: dict) -> int:
    return torch.Size(map(int, case["shape"].split("x"))).numel() * DTYPES[case["dtype"]].itemsize


def reached(goal: Goal, ours: str, row: dict) -> float | None:
    """What a row has of a goal; None if it says nothing about it."""
    if row["impl"] != ours + goal.impl or row["case"]["what"] not in goal.what:
        return None
    small, allocator = bytes_of(row["case"]) <= SMALL, row["case"]["allocator"]
    if goal.small not in (None, small) or goal.allocator not in (None, allocator):
        return None
    if goal.over == "copy":
        return row.get("moved_of_copy", row.get("of_copy"))
    return row.get("speedup", {}).get(goal.over or ours, {}).get("ratio")


def summary(rows: list[dict], names: Sequence[str] = (OURS,), goals: Sequence[Goal] = GOALS) -> str:
    """Each goal with what was reached, and the cases that miss it."""
    lines = []
    for goal, ours in ((goal, ours) for goal in goals for ours in names):
        found = {
            " ".join(str(row["case"][n]) for n in ("what", "shape", "dtype", "layout", "allocator")): ratio
            for row in rows
            if (ratio := reached(goal, ours, row)) is not None
        }
        if not found:
            continue
        least, middle = min(found.values()), statistics.median(found.values())
        misses = {case: ratio for case, ratio in found.items() if ratio < goal.least}
        title = f"{goal.text}{f', allocator {goal.allocator}' if goal.allocator else ''}: {ours + goal.impl}"
        lines.append(
            f"{title} against {goal.over or ours}, {len(found)} cases: least {least:.2f}x (goal {goal.least:.2f}), "
            f"median {middle:.2f}x"
            + (f" (goal {goal.middle:.2f})" if goal.middle else "")
            + (f"; {len(misses)} missed" if misses else "")
            + (", median missed" if goal.middle and middle < goal.middle else "")
        )
        lines += [f"    {ratio:.2f}x  {case}" for case, ratio in sorted(misses.items(), key=lambda item: item[1])]
    return "\n".join(lines)


def shape_of(text: str) -> tuple[int, ...]:
    shape = tuple(int(n) for n in text.split("x"))
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected NxCxHxW, got {text!r}")
    return shape


def main() -> None:
    p = harness.arguments("Time batch_norm_act.", tests=["tests/test_batch_norm_act.py"])
    p.add_argument("--shapes", type=shape_of, nargs="+", default=SHAPES, metavar="NxCxHxW")
    p.add_argument("--quick", action="store_true", help="two small shapes: to see that it runs, not to believe")
    p.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    p.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    p.add_argument("--what", nargs="+", choices=TRAFFIC, default=list(TRAFFIC))
    p.add_argument("--backend", nargs="+", default=None, help="ours; default: all compiled ones that run here")
    p.add_argument("--per-channel", action="store_true", help="also bench.ops.per_channel")
    p.add_argument("--compile", action="store_true", help="also torch.compile: 10 to 40 s more per case")
    p.add_argument("--tuned", action="store_true", help="after fastprune.tune_cpu_memory(), for all contestants")
    p.add_argument("--sample-ms", type=float, default=10.0, help="least length of a sample")
    args = p.parse_args()
    if args.quick:
        args.shapes = QUICK
    x = torch.ones(1, 1, 1, 1, device=args.device)
    compiled = [b for b in backends.PREFERENCE["batch_norm_act"][args.device] if b != "eager"]
    why = {b: backends.why_not("batch_norm_act", b, x, *[None] * 6) for b in args.backend or compiled}
    if args.backend or all(why.values()):
        for backend, reason in why.items():
            if reason:
                raise SystemExit(f"bench: backend {backend} cannot run here: {reason}")
    runs = [b for b, reason in why.items() if not reason]
    args.names = {b: b for b in runs} if args.device == "cuda" else {OURS: runs[0]}
    started = time.perf_counter()
    harness.start(args)
    if args.tuned:
        harness.tune()
    rows = list(run(args, "tuned" if args.tuned else "default"))
    goals = GPU_GOALS if args.device == "cuda" else GOALS
    print(f"\n{summary(rows, list(args.names), goals)}\n\n{len(rows)} rows, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
