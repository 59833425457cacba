"""What gate statistics cost in a training step: the criteria of Taylor 22, 23 and 6 and of Fisher, all at once.

    fused            a plain step after convert_batchnorm(fuse=True), no statistics
    statistics       the same with GateStatistics on all gates; each step adds the four criteria to float64 sums
    statistics-code  the same with pixel_magnitudes=True, method 6 as in its authors' code
    method           fused with fp.create("taylor-gate") and method.step, between two cuts
    eager            a plain step of the network as it comes
    hooks            the usual way on it: forward hooks keep the outputs, tensor hooks reduce output times gradient

Before anything is timed, one step of ``statistics`` and of ``hooks`` from the same weights must give the same sums.

Per step, beside the time:

    aten_calls, our_calls     as in bench.e2e.step, but for the ``detach`` that only shows while they are counted
    aten_calls_added          over those of the baseline: fused, for hooks eager
    peak_mb                   the most bytes of PyTorch's allocator held at one time while the network is copied, set up
                              and trained for two steps: unlike in bench.e2e.step parameters, momentum and the buffers
                              of the statistics are in it

``--render`` only writes docs/results/statistics.md again, from all rows.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

import fastprune as fp
from bench import harness, table
from bench.e2e.step import MB, CountCalls, peak_bytes, profiled, sgd_step
from fastprune import backends, memory, models
from fastprune.gates import GateSpec, GateStatistics, find_gates
from fastprune.graph import trace
from fastprune.nn import convert_batchnorm

NETS = {"resnet20": 32, "resnet56": 32, "vgg19": 32, "resnet50": 64}  # name to image size
BASES = {"fused": None, "statistics": "fused", "statistics-code": "fused", "method": "fused"}
BASES |= {"eager": None, "hooks": "eager"}
OVER = {"fused": ["eager"], "statistics": ["fused", "eager", "hooks"], "hooks": ["eager"]}
CRITERIA = ("taylor-gate", "taylor-gate-persample", "taylor-output", "fisher")
GOALS = {"time": 1.03, "peak": 1.01, "aten_calls_added": 10}  # of statistics; time and peak over the baseline
TOLERANCE = 1e-2  # of the norm of a criterion, between float32 sums: one ReLU that rounding tips moves them by 1e-3
PAGE = harness.ROOT / "docs" / "results" / "statistics.md"


class HookStatistics:
    """Gate gradients as they are usually taken: keep what each gated module returns, hook on its gradient."""

    def __init__(self, model: nn.Module, gates: Mapping[str, GateSpec]) -> None:
        self.gates = gates
        self.grads: dict[str, torch.Tensor] = {}  # gate to (N, C) of this step, summed over its uses
        uses: dict[str, list[tuple[str, torch.Tensor]]] = {}
        for gate in gates.values():
            for site in gate.sites:
                if len(site.index.channel) != gate.size:
                    raise ValueError(f"HookStatistics: {site.module} has only some channels of {gate.name}")
                order = site.index.position[site.index.channel.argsort()]
                uses.setdefault(site.module, []).append((gate.name, order))
        for name, places in uses.items():
            model.get_submodule(name).register_forward_hook(partial(self._watch, places))

    def _watch(self, places: list[tuple[str, torch.Tensor]], module: nn.Module, args: tuple, out: torch.Tensor) -> None:
        z = out.detach()  # a ReLU in place behind it changes z only where its gradient is 0

        def reduce(dz: torch.Tensor) -> None:
            sums = (z * dz).sum((2, 3))
            for name, order in places:
                mine = sums if len(order) == sums.shape[1] and name not in self.grads else sums[:, order]
                self.grads[name] = self.grads[name] + mine if name in self.grads else mine

        out.register_hook(reduce)

    def take(self) -> torch.Tensor:
        """(N, K), float64, gates in order."""
        taken = torch.cat([self.grads[name] for name in self.gates], dim=1).double()
        self.grads = {}
        return taken


def make_step(
    impl: str, model: nn.Module, x: torch.Tensor, target: torch.Tensor
) -> tuple[Callable[[], float], torch.Tensor | None]:
    """A step on a copy of ``model``, and the running sums of the criteria, (4, K) float64, if it makes them."""
    model = copy.deepcopy(model)
    if BASES[impl] == "fused" or impl == "fused":
        convert_batchnorm(model, fuse=True)
    if impl in ("fused", "eager"):
        return sgd_step(model, x, target), None
    if impl == "method":
        # The next cut is out of reach, so that every timed step is one between two cuts.
        method = fp.create("taylor-gate", model, x[:2], ratio=0.5, per_cut=100, frequency=10**9, shrink_every=0)
        return sgd_step(model, x, target, method.penalty, lambda opt, loss: method.step(opt, loss.detach())), None
    seen = copy.deepcopy(model)  # find_gates makes plain norms ours
    gates = find_gates(seen, trace(seen, x[:2]))
    running = torch.zeros(4, sum(gate.size for gate in gates.values()), dtype=torch.float64, device=x.device)
    gradient, squares, magnitudes, fisher = running.unbind()
    if impl == "hooks":
        hooks = HookStatistics(model, gates)

        @torch.no_grad()
        def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
            optimizer.step()
            per_sample = hooks.take()
            total, of_squares = per_sample.sum(0), per_sample.square().sum(0)
            gradient.addcmul_(total, total)
            squares.add_(of_squares)
            magnitudes.add_(per_sample.abs().sum(0))
            fisher.add_(of_squares, alpha=1 / (2 * len(per_sample)))

        return sgd_step(model, x, target, update=update), running
    pixels = impl == "statistics-code"
    statistics = GateStatistics(model, gates, pixel_magnitudes=pixels)

    @torch.no_grad()
    def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.step()
        sums = statistics.take()
        gradient.addcmul_(sums.gradient, sums.gradient)
        squares.add_(sums.squares)
        magnitudes.add_(sums.pixel_magnitudes if pixels else sums.magnitudes)
        fisher.add_(sums.squares, alpha=1 / (2 * sums.samples))

    return sgd_step(model, x, target, statistics.penalty, update), running


def setup(net: str, batch: int, device: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model, size = models.create(net).to(device), NETS[net]
    return model, torch.randn(batch, 3, size, size, device=device), torch.randint(10, (batch,), device=device)


def disagreement(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """How far the criteria of one step by ``statistics`` and by ``hooks`` are apart, relative to the norm of each."""
    sums = []
    for impl in ("statistics", "hooks"):
        step, running = make_step(impl, model, x, target)
        step()
        sums.append(running)
    ours, usual = sums
    return dict(zip(CRITERIA, ((ours - usual).norm(dim=1) / usual.norm(dim=1)).tolist(), strict=True))


def count_calls(step: Callable[[], object]) -> Counter[str]:
    """Dispatched operators of one step by namespace.

    While a dispatch mode looks on, autograd calls detach for each output it saves; the profiler has the true number.
    """
    with CountCalls() as mode:
        step()
    detached = sum(event.name() == "aten::detach" for event in profiled(step))
    mode.calls["aten"] += detached - mode.names["aten.detach.default"]
    return mode.calls


def peak_mb(make: Callable[[], Callable[[], object]], device: torch.device) -> float:
    """Most memory held while a step is made and run twice."""

    def run() -> None:
        step = make()
        step()
        step()

    if device.type == "cpu":
        return round(peak_bytes(run) / MB, 2)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return round((torch.cuda.max_memory_allocated() - before) / MB, 2)


def bench(args: argparse.Namespace, net: str, allocator: str) -> list[dict]:
    model, x, target = setup(net, args.batch, args.device)
    apart = disagreement(model, x, target)
    print(f"{net}: statistics against hooks, {', '.join(f'{name} {d:.1e}' for name, d in apart.items())}", flush=True)
    if not max(apart.values()) <= TOLERANCE:  # NaN too
        raise SystemExit(f"bench: statistics and hooks differ by {apart}, so nothing was timed")
    steps = {impl: make_step(impl, model, x, target)[0] for impl in BASES}
    samples = harness.interleave(steps, rounds=args.rounds, sample_s=0.0, clock=harness.clock_for(args, steps=True))
    case = {"net": net, "batch": args.batch} | harness.setting(args, allocator)
    over = {impl: OVER.get(impl, [base] if base else []) for impl, base in BASES.items()}
    rows = harness.rows_of("statistics", case, samples, over)
    metrics = {}
    for row in rows:
        impl = row["impl"]
        calls = count_calls(steps[impl])
        metrics[impl] = row["metrics"] = {"aten_calls": calls["aten"], "our_calls": calls["fastprune"]}
        metrics[impl]["peak_mb"] = peak_mb(lambda impl=impl: make_step(impl, model, x, target)[0], x.device)
    for row in rows:
        impl, base = row["impl"], BASES[row["impl"]]
        if base:
            mine, plain = metrics[impl], metrics[base]
            mine["aten_calls_added"] = mine["aten_calls"] - plain["aten_calls"]
            # what it costs, so above 1 is slower
            row["cost"] = {"over": base, "time": harness.speedup(samples, base, impl)}
            row["cost"]["peak"] = round(mine["peak_mb"] / plain["peak_mb"], 4)
        if impl == "statistics":
            row["disagreement"] = apart
        print(
            f"{net:9}{allocator:8}{impl:16}{row['us'] / 1e3:8.1f} ms ({row['us_p20'] / 1e3:.1f}-"
            f"{row['us_p80'] / 1e3:.1f})  {', '.join(f'{k} {v}' for k, v in row['metrics'].items())}"
            + (f"  {row['cost']['time']['ratio']:.3f} x the time of {base}" if base else ""),
            flush=True,
        )
    harness.finish(args, "statistics", rows)
    return rows


def page(rows: list[dict]) -> str:
    """docs/results/statistics.md from rows."""
    text = [
        "# What gate statistics cost in a training step",
        "",
        "Written by `python -m bench.e2e.statistics`; its first lines say what each implementation is. Times and peak",
        "memory are relative to the same step without statistics; in brackets median, 20th and 80th percentile of the",
        "ratios within a round: where they do not fit the ratio, the machine was busy. The goals are for `statistics`.",
        "",
    ]
    text += ["| net | device | allocator | implementation | over | time | peak memory | ATen calls added |"]
    text += ["| --- | --- | --- | --- | --- | ---: | ---: | ---: |"]
    goals = [f"at most {GOALS['time']:.2f}x", f"at most {GOALS['peak']:.2f}x", f"at most {GOALS['aten_calls_added']}"]
    text += [f"| goal | | | statistics | fused | {' | '.join(goals)} |"]
    missed = []
    for row in rows:
        if "cost" not in row:
            continue
        case, cost, device = row["case"], row["cost"], row["provenance"]["device"]
        time, added = cost["time"], row["metrics"]["aten_calls_added"]
        cells = [case["net"], device, case["allocator"], row["impl"], cost["over"]]
        cells += [
            f"{time['ratio']:.3f}x ({time['median']:.3f}, {time['p20']:.3f}-{time['p80']:.3f})",
            f"{cost['peak']:.4f}x",
            str(added),
        ]
        text.append(f"| {' | '.join(cells)} |")
        if row["impl"] == "statistics":
            found = {"time": time["ratio"], "peak": cost["peak"], "aten_calls_added": added}
            where = f"{case['net']}, {device}, allocator {case['allocator']}"
            missed += [f"- {where}: {k} {v:g}, goal {GOALS[k]:g}" for k, v in found.items() if v > GOALS[k]]
    text += ["", *(["Goals missed:", "", *missed] if missed else ["No goal was missed."]), ""]
    apart = [max(row["disagreement"].values()) for row in rows if "disagreement" in row]
    if apart:
        text += [f"The criteria of one step by `statistics` and by `hooks` differ by at most {max(apart):.1e},"]
        text += ["relative to the norm of each.", ""]
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["provenance"]["device"], []).append(row)
    return "\n".join([*text, *(table.render(group) for group in groups.values())])


def main() -> None:
    tests = ["tests/test_gates.py", "tests/test_gate_sums.py", "tests/test_batch_norm_act.py"]
    p = harness.arguments("Time training steps with and without gate statistics.", tests)
    p.add_argument("--nets", nargs="+", choices=NETS, default=["resnet56"])
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--allocator", choices=("default", "tuned", "both"), default="both")
    p.add_argument("--render", action="store_true", help="only write the page again, from all rows")
    p.add_argument("--page", type=Path, default=PAGE)
    args = p.parse_args()
    if not args.render:
        run(args)
    if not args.no_write:
        folders = [args.out] if args.out else sorted(harness.RESULTS.iterdir())
        paths = [path for folder in folders if (path := folder / "statistics.jsonl").exists()]
        args.page.write_text(page(table.latest(paths)))


def run(args: argparse.Namespace) -> None:
    backend = "triton" if args.device == "cuda" else "cpp"
    x = torch.ones(1, 1, 1, 1, device=args.device)
    if reason := backends.why_not("batch_norm_act", backend, x, *[None] * 6):
        raise SystemExit(f"bench: nothing to compare, backend {backend} cannot run here: {reason}")
    allocators = ("default", "tuned") if args.allocator == "both" else (args.allocator,)
    if args.device == "cuda":
        allocators = ("default",)
    elif "tuned" in allocators and (reason := memory.why_not()):
        raise SystemExit(f"bench: the allocator cannot be tuned here ({reason}); use --allocator default")
    harness.start(args)
    for allocator in allocators:
        if allocator == "tuned":
            harness.tune()
        for net in args.nets:
            bench(args, net, allocator)


if __name__ == "__main__":
    main()
