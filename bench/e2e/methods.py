"""Whole training steps with a pruning method on, against plain training: ResNet-56 and ResNet-50, for GPUs above all.

    eager           a plain step of the network as it comes, torch.optim.SGD(foreach=True)
    torch.compile   the same network compiled
    fused           after convert_batchnorm(fuse=True), no method
    greg-1, tpp     on that: fp.create(method, ratio=0.9), method.step and fp.optim.GrowingSGD
    rni             on convert_batchnorm(bound="sigmoid"): its penalty in the loss
    taylor-gate     on that of fused: gate gradients of every step, no cut in sight
    ...+compile     the method with its network compiled
    ...+graph       the step captured as one CUDA graph, fp.capture_step; its memory lies in the graph, and is not shown

A call of the clock is ``--interval`` steps, of which growing methods update their coefficients in one; times are per
step.  Nothing waits for the GPU within a call, so there they are those of the host or of the GPU, whichever is behind.
Beside them:

    peak_mb    the most memory held at one time within a step above what is held between two: on a GPU by
               torch.cuda.max_memory_allocated, on the CPU as in bench.e2e.step

Methods must have been tested (see the harness); what they compute is not compared here, see bench.e2e.growing.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from bench import harness
from bench.e2e.step import MB, peak_bytes
from bench.ops.batch_norm_act import LAYOUTS
from fastprune import backends, models
from fastprune.nn import convert_batchnorm

NETS = {"resnet20": (128, 32), "resnet56": (128, 32), "resnet50": (256, 224)}  # batch and size of the images
EAGER, COMPILED, FUSED = "eager", "torch.compile", "fused"
METHODS = ("greg-1", "tpp", "rni", "taylor-gate")
WITH_COMPILE = {f"{name}+compile": name for name in ("greg-1", "tpp", "rni")}
WITH_GRAPH = {f"{name}+graph": name for name in (EAGER, FUSED, *METHODS)}
IMPLS = (EAGER, FUSED, *METHODS, COMPILED, *WITH_COMPILE, *WITH_GRAPH)
GOALS = {EAGER: 1.00, COMPILED: 1.02}  # times the time of: every method, and every one compiled
Step = Callable[[], torch.Tensor]


def make_step(impl: str, model: nn.Module, x: torch.Tensor, target: torch.Tensor, interval: int, amp: bool) -> Step:
    """A step on a copy of ``model``, which returns the loss; ``interval`` steps lie between two updates."""
    model, name = copy.deepcopy(model), (WITH_COMPILE | WITH_GRAPH).get(impl, impl)
    if name not in (EAGER, COMPILED):
        convert_batchnorm(model, bound="sigmoid" if name == "rni" else None, fuse=True)
    method, sgd = None, partial(torch.optim.SGD, foreach=True)
    if name in METHODS:
        options = {"ratio": 0.9}
        if name in ("greg-1", "tpp"):  # the end of the growth is out of reach
            options |= {"scope": "local", "update_interval": interval, "reg_step": 1e-4, "stabilize": 10**6}
            sgd = fp.optim.GrowingSGD
        if name == "taylor-gate":  # and so is the next cut
            options = {"ratio": 0.5, "per_cut": 100, "frequency": 10**9, "shrink_every": 0}
        method = fp.create(name, model, x[:2], **options)
    optimizer = sgd(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    if impl in WITH_GRAPH:
        dtype = torch.bfloat16 if amp else None
        captured = fp.capture_step(model, F.cross_entropy, optimizer, method, autocast=dtype)
        for _ in range(2 * interval + 10):  # beyond the first updates, which warm up again
            captured(x, target)
        return lambda: captured(x, target)
    forward = torch.compile(model, dynamic=False) if impl == COMPILED or impl in WITH_COMPILE else model

    def step() -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(forward(x), target)
        if method:
            loss = loss + method.penalty()
        loss.backward()
        if method:
            method.step(optimizer, loss.detach())
        else:
            optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def setup(net: str, batch: int, size: int, layout: str, device: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = models.create(net).to(device, memory_format=LAYOUTS[layout])
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=LAYOUTS[layout])
    return model, x, torch.randint(10, (batch,), device=device)


def peak_mb(step: Step, device: torch.device) -> float:
    """Most memory held within a step above what is held between two."""
    if device.type == "cpu":
        return round(peak_bytes(step) / MB, 2)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return round((torch.cuda.max_memory_allocated() - before) / MB, 2)


def bench(args: argparse.Namespace, net: str, layout: str) -> list[dict]:
    batch, size = args.batch or NETS[net][0], args.size or NETS[net][1]
    model, x, target = setup(net, batch, size, layout, args.device)
    chosen = [impl for impl in IMPLS if impl in args.impls]
    steps = {impl: make_step(impl, model, x, target, args.interval, args.amp) for impl in chosen}
    calls = {impl: lambda step=step: [step() for _ in range(args.interval)] for impl, step in steps.items()}
    samples = harness.interleave(
        calls, rounds=args.rounds, sample_s=0.0, clock=harness.clock_for(args, steps=True)
    )  # fmt: skip
    samples = {impl: [us / args.interval for us in values] for impl, values in samples.items()}
    case = {"net": net, "batch": batch, "size": size, "layout": layout, "amp": args.amp, "interval": args.interval}
    case |= harness.setting(args, "default")
    over = {impl: [base for base in (EAGER, COMPILED, FUSED) if base in chosen and base != impl] for impl in chosen}
    rows = harness.rows_of("methods", case, samples, over)
    peaks = {impl: peak_mb(step, x.device) for impl, step in steps.items() if impl not in WITH_GRAPH}
    for row in rows:
        row["metrics"] = {"peak_mb": peaks[row["impl"]]} if row["impl"] in peaks else {}
    for row in rows:  # what it costs, so above 1 is slower
        row["cost"] = {
            base: {"time": harness.speedup(samples, base, row["impl"])}
            | ({"peak": round(peaks[row["impl"]] / peaks[base], 4)} if row["impl"] in peaks else {})
            for base in over[row["impl"]]
        }
        times = ", ".join(f"{c['time']['ratio']:.3f} x {base}" for base, c in row["cost"].items())
        print(
            f"{net:9}{layout:5}{'bf16 ' if args.amp else 'fp32 '}{row['impl']:16}{row['us'] / 1e3:9.2f} ms"
            f" ({row['us_p20'] / 1e3:.2f}-{row['us_p80'] / 1e3:.2f}), peak {peaks.get(row['impl'], math.nan):,} MB"
            f"  {times}",
            flush=True,
        )
    harness.finish(args, "methods", rows)
    return rows


def main() -> None:
    tests = ["tests/test_batch_norm_act.py", "tests/test_growing_sgd.py", "tests/test_gram_penalty.py"]
    tests += ["tests/test_scale_penalty.py", "tests/test_gate_sums.py", "tests/test_channel_gate.py"]
    p = harness.arguments("Time training steps with pruning methods against plain training.", tests)
    p.add_argument("--nets", nargs="+", choices=NETS, default=["resnet56"])
    p.add_argument("--batch", type=int, default=None, help="default: 128 for images of CIFAR, 256 for ResNet-50")
    p.add_argument("--size", type=int, default=None, help="of the images; default: 32 and 224")
    p.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    p.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    p.add_argument("--interval", type=int, default=5, help="steps of a call, of which one updates coefficients")
    p.add_argument(
        "--impls", nargs="+", choices=IMPLS, default=[EAGER, FUSED, *METHODS], help="compiled ones take time"
    )
    p.set_defaults(rounds=harness.MIN_ROUNDS)
    args = p.parse_args()
    x = torch.ones(1, 1, 1, 1, device=args.device)
    compiled = [b for b in backends.PREFERENCE["batch_norm_act"][args.device] if b != "eager"]
    why = {b: backends.why_not("batch_norm_act", b, x, *[None] * 6) for b in compiled}
    if all(why.values()):
        raise SystemExit(f"bench: nothing to compare, no backend can run here: {why}")
    harness.start(args)
    for net in args.nets:
        for layout in args.layouts:
            bench(args, net, layout)


if __name__ == "__main__":
    main()
