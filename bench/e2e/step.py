"""A whole training step (forward, loss, backward, SGD) of CIFAR networks, with plain and with fused batch norm.

    eager     nn.BatchNorm2d, in-place ReLU, as the network comes
    fused     the same network after convert_batchnorm(bound=None, fuse=True)
    sigmoid   after convert_batchnorm(bound="sigmoid", fuse=True), with RNI's penalty in the loss

Per step, beside the time:

    aten_calls     operators dispatched, forward, backward and optimizer (a TorchDispatchMode sees them)
    our_calls      of which fastprune's
    peak_mb        the most bytes held at one time in blocks of PyTorch's CPU allocator (tensors, and scratch tensors
                   inside operators; not oneDNN's own scratch), above what is held between two steps: parameters,
                   buffers, momentum, one batch.  Counted by torch.profiler, exact, no matter which malloc is below
    resident_mb    peak resident memory of a process that makes three steps, above what is resident before the first:
                   what the machine must hold, gradients, momentum and fragmentation of the heap included

Both settings of the allocator are timed in one process, first the default one, then after tune_cpu_memory().
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench import harness
from fastprune import backends, memory, models
from fastprune.nn import convert_batchnorm
from fastprune.ops import scale_penalty

NETS = {"resnet56": "resnet56-rni", "vgg16": "vgg16-rni"}
IMPLS = ("eager", "fused", "sigmoid")
MB = 1 << 20


def make_step(impl: str, model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> Callable[[], float]:
    """A training step on a converted copy of ``model``; it returns the loss."""
    model = copy.deepcopy(model)
    if impl != "eager":
        convert_batchnorm(model, bound="sigmoid" if impl == "sigmoid" else None, fuse=True)
    scales = [m.weight for m in model.modules() if getattr(m, "bound", None) == "sigmoid"]
    return sgd_step(model, x, target, (lambda: 1e-4 * scale_penalty(scales, "rni", 3.0)) if scales else None)


def sgd_step(
    model: nn.Module,
    x: torch.Tensor,
    target: torch.Tensor,
    penalty: Callable[[], torch.Tensor] | None = None,
    update: Callable[[torch.optim.Optimizer, torch.Tensor], None] | None = None,
    sgd: Callable[..., torch.optim.Optimizer] | None = None,
) -> Callable[[], float]:
    """A training step on ``model`` itself; it returns the loss, ``penalty()`` included.

    ``update(optimizer, loss)`` stands for the optimizer's step, ``sgd`` for PyTorch's SGD with foreach.
    """
    sgd = sgd or partial(torch.optim.SGD, foreach=True)
    optimizer = sgd(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def step() -> float:
        loss = F.cross_entropy(model(x), target)
        if penalty:
            loss = loss + penalty()
        loss.backward()
        if update:
            update(optimizer, loss)
        else:
            optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


class CountCalls(TorchDispatchMode):
    """Operators dispatched below autograd, by namespace and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.namespace] += 1
        self.names[str(func)] += 1
        return func(*args, **kwargs or {})


def count_calls(step: Callable[[], object]) -> Counter[str]:
    """Dispatched operators of one step by namespace: ``{"aten": ..., "fastprune": ...}``."""
    with CountCalls() as mode:
        step()
    return mode.calls


def peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes held at one time in blocks that PyTorch's CPU allocator handed out during ``step``."""
    events = [e for e in profiled(step) if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def profiled(step: Callable[[], object]) -> list:
    """Events of ``step`` on the CPU, memory included."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else a GPU build of torch prints an error where there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        step()
    return prof.profiler.kineto_results.events()


def setup(net: str, batch: int, device: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = models.create(NETS[net]).to(device)
    return model, torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)


def resident(net: str, impl: str, batch: int, tuned: bool) -> float:
    """Peak resident memory over three steps above what was resident before, MB; once per process."""
    if tuned:
        harness.tune()
    step = make_step(impl, *setup(net, batch, "cpu"))
    before = status_mb("VmRSS")
    for _ in range(3):
        step()
    return status_mb("VmHWM") - before


def status_mb(name: str) -> float:
    """A row of /proc/self/status; getrusage's ru_maxrss would start from the parent's size at the fork."""
    return int(re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) / 1024


def resident_elsewhere(args: argparse.Namespace, net: str, impl: str, tuned: bool) -> float:
    """:func:`resident` in a new process."""
    job = json.dumps([net, impl, args.batch, tuned])
    command = [sys.executable, "-m", "bench.e2e.step", "--resident", job, "--threads", str(args.threads)]
    run = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"bench: {' '.join(command[1:])} failed:\n{run.stderr[-2000:]}")
    return float(run.stdout.splitlines()[-1])


def bench(args: argparse.Namespace, net: str, allocator: str) -> list[dict]:
    model, x, target = setup(net, args.batch, args.device)
    steps = {impl: make_step(impl, model, x, target) for impl in IMPLS}
    clock = harness.clock_for(args, steps=True)
    samples = harness.interleave(steps, rounds=args.rounds, sample_s=0.0, clock=clock)
    case = {"net": net, "batch": args.batch} | harness.setting(args, allocator)
    over = {impl: ["eager"] for impl in IMPLS[1:]}
    rows = harness.rows_of("step", case, samples, over)
    for row in rows:
        calls = count_calls(steps[row["impl"]])
        row["metrics"] = {"aten_calls": calls["aten"], "our_calls": calls["fastprune"]}
        if args.device == "cpu":
            row["metrics"]["peak_mb"] = round(peak_bytes(steps[row["impl"]]) / MB, 1)
            if not args.no_resident:
                grown = resident_elsewhere(args, net, row["impl"], allocator == "tuned")
                row["metrics"]["resident_mb"] = round(grown, 1)
        ratio = row.get("speedup", {}).get("eager")
        print(
            f"{net:9}{allocator:8}{row['impl']:8}{row['us'] / 1e3:8.1f} ms ({row['us_p20'] / 1e3:.1f}-"
            f"{row['us_p80'] / 1e3:.1f})  {', '.join(f'{k} {v}' for k, v in row['metrics'].items())}"
            + (f"  {ratio['ratio']:.2f}x eager (rounds {ratio['p20']:.2f}-{ratio['p80']:.2f})" if ratio else ""),
            flush=True,
        )
    harness.finish(args, "step", rows)
    return rows


def main() -> None:
    tests = ["tests/test_batch_norm_act.py", "tests/test_nn.py"]
    p = harness.arguments("Time training steps with plain and with fused batch norm.", tests)
    p.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--allocator", choices=("default", "tuned", "both"), default="both")
    p.add_argument("--no-resident", action="store_true", help="leave out resident_mb, which takes a process per row")
    p.add_argument("--resident", help=argparse.SUPPRESS)  # a child of this bench: see resident_elsewhere
    p.set_defaults(rounds=harness.MIN_ROUNDS)
    args = p.parse_args()
    if args.resident:
        torch.set_num_threads(args.threads)
        print(resident(*json.loads(args.resident)))
        return
    backend = "triton" if args.device == "cuda" else "cpp"
    x = torch.ones(1, 1, 1, 1, device=args.device)
    if reason := backends.why_not("batch_norm_act", backend, x, *[None] * 6):
        raise SystemExit(f"bench: nothing to compare, backend {backend} cannot run here: {reason}")
    allocators = ("default", "tuned") if args.allocator == "both" else (args.allocator,)
    if args.device == "cuda":
        allocators = ("default",)
    elif "tuned" in allocators and (reason := memory.why_not()):
        raise SystemExit(f"bench: the allocator cannot be tuned here ({reason}); use --allocator default")
    started = time.perf_counter()
    harness.start(args)
    for allocator in allocators:
        if allocator == "tuned":
            harness.tune()
        for net in args.nets:
            bench(args, net, allocator)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
