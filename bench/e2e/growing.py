"""What growing regularisation costs in a training step: GReg-1, GReg-2 and TPP while their penalty grows.

    eager               a plain step of the network as it comes, torch.optim.SGD(foreach=True)
    greg-1, greg-2, tpp fp.create(method, ratio=0.9) on it, method.step and fp.optim.GrowingSGD
    loop-greg-1, -tpp   the usual way on it: per layer a Gram loss by autograd, grad += reg * w, a look at the norms
    fused               a plain step after convert_batchnorm(fuse=True)
    greg-1-fused, ...   the methods on that

Before anything is timed, both ways of each method must have moved the weights alike, in float64.

A call of the clock is ``--interval`` steps, one of which updates the coefficients; times are per step.  Beside them:

    aten_calls, our_calls     of a step between two updates, counted as in bench.e2e.statistics
    calls_added               aten_calls over those of the step without the method, eager or fused
    calls_added_update        the same in a step with an update
    peak_mb                   as in bench.e2e.statistics: setting up and two steps, parameters and momentum included

``--render`` only writes docs/results/growing.md again, from all rows.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fastprune as fp
from bench import harness, table
from bench.e2e.statistics import NETS, count_calls, peak_mb, setup
from bench.e2e.step import sgd_step
from fastprune import backends, memory
from fastprune.nn import convert_batchnorm

METHODS = ("greg-1", "greg-2", "tpp")
# implementation to the same step without the method
BASES = {"eager": None} | dict.fromkeys(METHODS, "eager") | dict.fromkeys(("loop-greg-1", "loop-tpp"), "eager")
BASES |= {"fused": None} | dict.fromkeys((f"{name}-fused" for name in METHODS), "fused")
GOALS = {"greg-1": 1.02, "greg-2": 1.02, "tpp": 1.05} | {
    f"{name}-fused": 1.00 for name in METHODS
}  # times eager's time
CALLS_GOAL = 10  # added to the step without the method
RATIO = 0.9
TOLERANCE = 1e-6  # between the two ways, of what the method moves
PAGE = harness.ROOT / "docs" / "results" / "growing.md"
Step = Callable[[], float]


class LayerLoop:
    """GReg-1 or TPP as they are usually written: a Python loop over the layers for everything.

    Layers and what they lose are taken from ``method``, whose model is trained.  The methods' phases after the growth
    are left out.
    """

    def __init__(self, method: fp.methods.Method) -> None:
        self.options, self.tpp, self.steps, self.level = method.options, method.name == "tpp", 0, 0.0
        self.layers = []
        for name, keep in method.keep_masks().items():
            if not keep.all():
                conv, norms = method.model.get_submodule(name), method.groups[name].norms
                norm = method.model.get_submodule(norms[0]) if self.tpp and norms else None
                self.layers.append((conv, norm, (~keep).to(conv.weight)))
        self.reg = [torch.zeros_like(cut) for *_, cut in self.layers]
        self.ratios = [0.0] * len(self.layers)

    @torch.no_grad()
    def grow(self) -> None:
        o = self.options
        if self.steps % o.update_interval:
            return
        self.level = o.reg_step * (self.steps / o.update_interval if self.tpp else self.steps // o.update_interval + 1)
        for i, (conv, _, cut) in enumerate(self.layers):
            self.reg[i] = self.level * cut
            if not self.tpp:  # the ratio of magnitudes that may end the growth
                magnitude = conv.weight.abs().flatten(1).mean(1)
                ratio = (magnitude[cut == 0].mean() / magnitude[cut == 1].mean()).item()
                self.ratios[i] = 0.9 * self.ratios[i] + 0.1 * ratio if self.steps else ratio
                if all(r >= o.ratio_limit for r in self.ratios) or self.reg[i].max().item() > o.reg_limit:
                    raise SystemExit("bench: the growth is over; nothing more to time")

    def penalty(self) -> torch.Tensor:
        self.grow()
        total = self.layers[0][2].new_zeros(())
        if self.tpp:
            for conv, _, cut in self.layers:
                rows, keep = conv.weight.flatten(1), 1 - cut
                gram = rows @ rows.T
                total = total + (gram - gram.detach() * keep[:, None] * keep).square().mean()
        return self.options.weight * self.level * total if self.tpp else total

    def update(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        with torch.no_grad():
            for (conv, norm, _), reg in zip(self.layers, self.reg, strict=True):
                conv.weight.grad += reg.view(-1, *[1] * (conv.weight.dim() - 1)) * conv.weight
                if self.tpp and conv.bias is not None:
                    conv.bias.grad += reg * conv.bias
                if norm is not None:
                    norm.weight.grad += reg * norm.weight
                    norm.bias.grad += reg * norm.bias
        optimizer.step()
        self.steps += 1


def make_step(
    impl: str, model: nn.Module, x: torch.Tensor, target: torch.Tensor, interval: int, reg_step: float = 1e-4
) -> tuple[Step, nn.Module]:
    """A step on a copy of ``model``, and that copy; ``interval`` steps lie between two updates of the coefficients."""
    model = copy.deepcopy(model)
    if "fused" in impl:
        convert_batchnorm(model, fuse=True)
    name = impl.removeprefix("loop-").removesuffix("-fused")
    if name not in METHODS:
        return sgd_step(model, x, target), model
    options = {"update_interval": interval, "reg_step": reg_step, "stabilize": 10000}  # the end is out of reach
    method = fp.create(name, model, x[:2], ratio=RATIO, scope="local", **options)
    if impl.startswith("loop-"):
        loop = LayerLoop(method)
        return sgd_step(model, x, target, loop.penalty, loop.update), model
    update = lambda optimizer, loss: method.step(optimizer, loss.detach())  # noqa: E731
    return sgd_step(model, x, target, method.penalty, update, fp.optim.GrowingSGD), model


def disagreement(name: str, model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> float:
    """How far method and loop are apart after three steps, relative to how far the method moves the weights, float64.

    A few images do; the coefficients grow a hundred times as fast as they are timed, so that they matter.
    """
    model, x, target = copy.deepcopy(model).double(), x[:4].double(), target[:4]
    weights = {}
    for impl in ("eager", name, f"loop-{name}"):
        step, trained = make_step(impl, model, x, target, interval=1, reg_step=1e-2)
        for _ in range(3):
            step()
        weights[impl] = torch.cat([p.detach().flatten() for p in trained.parameters()])
    ours, usual, plain = weights[name], weights[f"loop-{name}"], weights["eager"]
    return ((ours - usual).norm() / (usual - plain).norm()).item()


def bench(args: argparse.Namespace, net: str, allocator: str) -> list[dict]:
    model, x, target = setup(net, args.batch, args.device)
    apart = {name: disagreement(name, model, x, target) for name in METHODS if f"loop-{name}" in BASES}
    print(f"{net}: methods against loops, {', '.join(f'{name} {d:.1e}' for name, d in apart.items())}", flush=True)
    if not max(apart.values()) <= TOLERANCE:  # NaN too
        raise SystemExit(f"bench: methods and loops differ by {apart}, so nothing was timed")
    chosen = [impl for impl in BASES if impl in args.impls or impl in ("eager", *(BASES[i] for i in args.impls))]
    steps = {impl: make_step(impl, model, x, target, args.interval)[0] for impl in chosen}
    calls = {impl: lambda step=step: [step() for _ in range(args.interval)] for impl, step in steps.items()}
    samples = harness.interleave(calls, rounds=args.rounds, sample_s=0.0, clock=harness.clock_for(args, steps=True))
    samples = {impl: [us / args.interval for us in values] for impl, values in samples.items()}
    case = {"net": net, "batch": args.batch, "ratio": RATIO, "interval": args.interval}
    case |= harness.setting(args, allocator)
    loops = {impl: [f"loop-{impl.removesuffix('-fused')}"] for impl in BASES}
    over = {impl: [o for o in ["eager", *loops[impl]] if o in chosen and o != impl] for impl in chosen}
    rows = harness.rows_of("growing", case, samples, over)
    found: dict[str, dict] = {}
    for row in rows:
        impl = row["impl"]
        row["metrics"] = found[impl] = metrics_of(impl, model, x, target)
        if base := BASES[impl]:
            for kind in ("", "_update"):
                found[impl][f"calls_added{kind}"] = found[impl][f"aten_calls{kind}"] - found[base]["aten_calls"]
        if impl != "eager":  # what it costs, so above 1 is slower
            row["cost"] = {"over": "eager", "time": harness.speedup(samples, "eager", impl)}
            row["cost"]["peak"] = round(found[impl]["peak_mb"] / found["eager"]["peak_mb"], 4)
        if impl.removesuffix("-fused") in apart:
            row["disagreement"] = apart[impl.removesuffix("-fused")]
        print(
            f"{net:9}{allocator:8}{impl:13}{row['us'] / 1e3:8.1f} ms ({row['us_p20'] / 1e3:.1f}-"
            f"{row['us_p80'] / 1e3:.1f})  {', '.join(f'{k} {v}' for k, v in row['metrics'].items())}"
            + (f"  {row['cost']['time']['ratio']:.3f} x the time of eager" if "cost" in row else ""),
            flush=True,
        )
    harness.finish(args, "growing", rows)
    return rows


def metrics_of(impl: str, model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Calls of a step between two updates and of one with an update, and the peak of memory."""
    metrics = {}
    for kind, interval in (("", 4), ("_update", 1)):
        if kind and not BASES[impl]:
            continue
        step, _ = make_step(impl, model, x[:4], target[:4], interval)  # no more operators for more images
        for _ in range(5):  # with interval 4, an update is in the first and in the fifth
            step()
        calls = count_calls(step)  # of two steps
        metrics |= {f"aten_calls{kind}": calls["aten"], f"our_calls{kind}": calls["fastprune"]}
    metrics["peak_mb"] = peak_mb(lambda: make_step(impl, model, x, target, 1)[0], x.device)
    return metrics


def page(rows: list[dict]) -> str:
    """docs/results/growing.md from rows."""
    text = [
        "# What growing regularisation costs in a training step",
        "",
        "Written by `python -m bench.e2e.growing`; its first lines say what each implementation is. Times and peak",
        "memory are relative to `eager`; in brackets median, 20th and 80th percentile of the ratios within a round:",
        "where they do not fit the ratio, the machine was busy. *Over the loop*: how many times faster than the same",
        "method by a Python loop over the layers of the eager network. ATen calls are those added to the step without",
        "the method, between two updates of the coefficients and in a step with one; in brackets fastprune's own.",
        "",
        "| net | device | allocator | steps per update | rounds | implementation | time | goal | over the loop "
        "| peak memory | ATen calls added | with an update |",
        "| --- | --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    missed = []
    for row in rows:
        if "cost" not in row:
            continue
        case, cost, metrics, impl = row["case"], row["cost"], row["metrics"], row["impl"]
        device, time, goal = row["provenance"]["device"], cost["time"], GOALS.get(impl)
        loop = next((s["ratio"] for over, s in row["speedup"].items() if over.startswith("loop-")), None)
        cells = [case["net"], device, case["allocator"], str(case["interval"]), str(row["rounds"]), impl]
        cells.append(f"{time['ratio']:.3f}x ({time['median']:.3f}, {time['p20']:.3f}-{time['p80']:.3f})")
        cells += [f"at most {goal:.2f}x" if goal else "", f"{loop:.3f}x" if loop else "", f"{cost['peak']:.4f}x"]
        for kind in ("", "_update"):
            added = metrics.get(f"calls_added{kind}")
            cells.append("" if added is None else f"{added} ({metrics[f'our_calls{kind}']})")
        text.append(f"| {' | '.join(cells)} |")
        if goal:
            where = f"- {case['net']}, {device}, allocator {case['allocator']}, {case['interval']} steps, {impl}"
            if time["ratio"] > goal:
                missed.append(f"{where}: time {time['ratio']:g}, goal {goal:g}")
            if metrics["calls_added"] > CALLS_GOAL:
                missed.append(f"{where}: {metrics['calls_added']} ATen calls added, goal {CALLS_GOAL}")
    goals = f"Goals: the times in the table, and at most {CALLS_GOAL} ATen calls added between two updates."
    text += ["", goals, "", *(["Goals missed:", "", *missed] if missed else ["No goal was missed."]), ""]
    apart = [row["disagreement"] for row in rows if "disagreement" in row]
    if apart:
        text += [f"Method and loop differ by at most {max(apart):.1e} of what the method moves, in float64.", ""]
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["provenance"]["device"], []).append(row)
    return "\n".join([*text, *(table.render(group) for group in groups.values())])


def main() -> None:
    tests = ["tests/test_growing_sgd.py", "tests/test_gram_penalty.py", "tests/test_batch_norm_act.py"]
    p = harness.arguments("Time training steps with and without growing regularisation.", tests)
    p.add_argument("--nets", nargs="+", choices=NETS, default=["resnet56"])
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--impls", nargs="+", choices=BASES, default=list(BASES), help="eager is always among them")
    p.add_argument("--interval", type=int, default=10, help="steps between two updates of the coefficients")
    p.add_argument("--allocator", choices=("default", "tuned", "both"), default="both")
    p.add_argument("--render", action="store_true", help="only write the page again, from all rows")
    p.set_defaults(rounds=harness.MIN_ROUNDS)  # of --interval steps each
    p.add_argument("--page", type=Path, default=PAGE)
    args = p.parse_args()
    if not args.render:
        run(args)
    if not args.no_write:
        folders = [args.out] if args.out else sorted(harness.RESULTS.iterdir())
        paths = [path for folder in folders if (path := folder / "growing.jsonl").exists()]
        args.page.write_text(page(table.latest(paths)))


def need_kernels(device: str) -> None:
    """Refuse to time the eager backends."""
    backend = "triton" if device == "cuda" else "cpp"
    x, w = torch.ones(1, 1, 1, 1, device=device), torch.ones(2, 2, device=device)
    calls = {"batch_norm_act": (x, *[None] * 6), "growing_sgd": (w, [w], [w], [w]), "gram_penalty": (w, (w,), "rows")}
    for op, call in calls.items():
        if reason := backends.why_not(op, backend, *call):
            raise SystemExit(f"bench: nothing to compare, backend {backend} of {op} cannot run here: {reason}")


def run(args: argparse.Namespace) -> None:
    need_kernels(args.device)
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
