"""``fastprune bench``: how fast the ops are here, against plain PyTorch, in half a minute.

Both sides of a row take turns within each round, so that a machine that slows down slows both; what is told is the
median of the rounds' ratios and its 20th to 80th percentile.  The repository's ``bench/`` measures more shapes, other
baselines and whole training steps, and keeps what it finds.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune import models, ops
from fastprune.errors import did_you_mean
from fastprune.latency import Stopwatch, interleaved
from fastprune.nn import convert_batchnorm
from fastprune.optim import GrowingSGD
from fastprune.quickstart import aligned, environment

SHAPES = {"small": (128, 16, 32, 32), "deep": (64, 64, 8, 8), "large": (32, 64, 56, 56)}  # of activations
ROUNDS = 9
SAMPLE_MS = 10.0  # a sample repeats a call until it takes about so long
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def run(names: list[str] | None = None, *, device: str | None = None, rounds: int = ROUNDS) -> int:
    """Print a table: op, input, microseconds on eager PyTorch and here, ratio.

    Args:
        names: Of :data:`CASES`; None: all.
        device: None: the first GPU if there is one, else the CPU.
        rounds: Samples of each side.

    Returns: 0, the exit code.

    Raises:
        ValueError: An unknown name.
    """
    for name in names or ():
        if name not in CASES:
            raise ValueError(f"bench: unknown op {name!r}{did_you_mean(name, CASES)}")
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    facts = environment() | {"device": device, "rounds": rounds}
    if device.startswith("cuda"):
        facts["gpu"] = torch.cuda.get_device_name(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print("times in microseconds, medians; more than 1x is faster than eager\n", flush=True)
    rows = []
    for name in names or CASES:
        for label, pair, other in CASES[name](device):
            rows.append([name, label, *measured(pair, torch.zeros((), device=device), rounds), other])
    header = ["op", "input", "eager", "here", "faster", "20%", "80%", "eager is"]
    print(aligned(header, rows))
    print("\nOne process, nothing else should be running. More: bench/README.md in the repository.")
    return 0


def measured(pair: Pair, on: Tensor, rounds: int) -> list[str]:
    """Cells of a row: microseconds of both sides, and how many times faster the second one is."""
    watch = Stopwatch.of(on)
    batches = []
    for call in pair:
        call()
        watch.synchronize()
        start = time.perf_counter()
        call()
        watch.synchronize()
        batches.append(max(1, round(SAMPLE_MS / max(1e3 * (time.perf_counter() - start), 1e-3))))
    samples = interleaved(watch, [partial(_repeat, call, n) for call, n in zip(pair, batches, strict=True)], rounds)
    eager, ours = ([1e3 * ms / n for ms in times] for times, n in zip(samples, batches, strict=True))
    ratios = [a / b for a, b in zip(eager, ours, strict=True)]
    fifths = statistics.quantiles(ratios, n=5, method="inclusive")
    times = [f"{statistics.median(of):.0f}" for of in (eager, ours)]
    return [*times, f"{statistics.median(ratios):.2f}x", f"{fifths[0]:.2f}x", f"{fifths[3]:.2f}x"]


def _repeat(call: Callable[[], Any], n: int) -> None:
    for _ in range(n):
        call()


Row = tuple[str, Pair, str]  # input, (eager, ours), what eager is


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _batch_norm_act(device: str) -> Iterator[Row]:
    def step(op: Callable[..., Tensor], x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None, dy: Tensor) -> Any:
        y = op(x, norm, residual)
        inputs = [t for t in (x, norm.weight, norm.bias, residual) if t is not None]
        return y, *torch.autograd.grad(y, inputs, dy)

    def eager(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None) -> Tensor:
        y = norm(x)
        return (y if residual is None else y.add_(residual)).relu_()

    def ours(x: Tensor, norm: nn.BatchNorm2d, residual: Tensor | None) -> Tensor:
        stats = norm.running_mean, norm.running_var, norm.num_batches_tracked
        return ops.batch_norm_act(x, norm.weight, norm.bias, *stats, residual=residual, act="relu")

    for shape in SHAPES.values():
        for adds in (False, True):
            x, r, dy = (torch.randn(shape, device=device) for _ in range(3))
            args = (x.requires_grad_(), nn.BatchNorm2d(shape[1]).to(device), r.requires_grad_() if adds else None, dy)
            what = "norm, add, ReLU" if adds else "norm, ReLU"
            yield _text(shape), (partial(step, eager, *args), partial(step, ours, *args)), f"{what}; both directions"


def _channel_gate(device: str) -> Iterator[Row]:
    for shape in SHAPES.values():
        x, dy = (torch.randn(shape, device=device) for _ in range(2))
        gate = torch.ones(shape[1], device=device).requires_grad_()
        sums = torch.empty(shape[:2], device=device)
        x.requires_grad_()

        def eager(x: Tensor = x, dy: Tensor = dy, gate: Tensor = gate) -> Any:
            y = x * gate[:, None, None]
            per_sample = (dy * y.detach()).sum((2, 3))  # as the criteria need it
            return *torch.autograd.grad(y, (x, gate), dy), per_sample

        def ours(x: Tensor = x, dy: Tensor = dy, gate: Tensor = gate, sums: Tensor = sums) -> Any:
            return *torch.autograd.grad(ops.channel_gate(x, gate, gate_grad=sums), (x, gate), dy), sums

        yield _text(shape), (eager, ours), "x * gate, per-sample sums; both directions"


def _scale_penalty(device: str) -> Iterator[Row]:
    weights = [torch.randn(n, device=device).requires_grad_() for n in [64] * 16 + [128] * 16 + [256] * 24]

    def eager() -> Any:
        value = sum(w.abs().sum() for w in weights)
        return torch.autograd.grad(value, weights)

    def ours() -> Any:
        return torch.autograd.grad(ops.scale_penalty(weights, "l1"), weights)

    yield "56 norms", (eager, ours), "sum of |w| by autograd"


def _growing_sgd(device: str) -> Iterator[Row]:
    model = models.create("resnet56").to(device)
    pairs = []
    for kind in (partial(torch.optim.SGD, foreach=True), GrowingSGD):
        mine = copy.deepcopy(model)
        for p in mine.parameters():
            p.grad = torch.randn_like(p)
        pairs.append(kind(mine.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4).step)
    yield "resnet56", tuple(pairs), "SGD(foreach=True)"


def _masked_conv2d(device: str) -> Iterator[Row]:
    n, c, h, w = SHAPES["deep"]
    x, weight = torch.randn(n, c, h, w, device=device), torch.randn(c, c, 3, 3, device=device)
    mask = torch.arange(c, device=device) % 4 == 0
    live = mask.float()[:, None, None]

    def eager() -> Tensor:
        return F.conv2d(x * live, weight, padding=1) * live

    def ours() -> Tensor:
        return ops.masked_conv2d(x, weight, in_mask=mask, out_mask=mask, padding=1)

    yield f"{_text((n, c, h, w))}, 3x3", (eager, ours), "conv, times masks; a quarter is left; forward"


def _train_step(device: str) -> Iterator[Row]:
    torch.manual_seed(0)
    x, y = torch.randn(128, 3, 32, 32, device=device), torch.randint(10, (128,), device=device)
    steps = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = models.create("resnet20").to(device)
        if fused:
            convert_batchnorm(model, bound=None, fuse=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        steps.append(step)
    yield "resnet20, batch 128", tuple(steps), "nn.BatchNorm2d; a whole training step"


CASES: dict[str, Callable[[str], Iterator[Row]]] = {
    "batch_norm_act": _batch_norm_act,
    "channel_gate": _channel_gate,
    "scale_penalty": _scale_penalty,
    "growing_sgd": _growing_sgd,
    "masked_conv2d": _masked_conv2d,
    "train_step": _train_step,
}
