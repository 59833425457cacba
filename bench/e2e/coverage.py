"""Which networks can be pruned at all: fastprune beside Torch-Pruning, 50 % of every group of channels, at random.

Every network is pruned by every tool in a process of its own, with limits of time and memory: a crash is a row, not an
end.  What is left is compared with what should be left by an oracle that knows neither tool: it finds the kept indices
of every parameter by its values, zeroes all others in a float64 copy of the whole network, and compares the outputs.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import math
import multiprocessing
import re
import resource
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastprune as fp
from bench import harness, table, zoo
from fastprune.graph import trace
from fastprune.surgery import leaves

PAGE = harness.ROOT / "docs" / "results" / "coverage.md"
RATIO = 0.5
TOLERANCE = 1e-9
TOOLS = ("fastprune", "torch-pruning")
TESTS = ["tests/test_coverage_bench.py", "tests/test_graph.py", "tests/test_compact.py"]
CONTROL = 1e-6

Kept = dict[str, dict[int, Tensor]]  # parameter -> dimension -> indices that are left, for those that shrank


# ---- the oracle


def kept_indices(whole: Mapping[str, Tensor], part: Mapping[str, Tensor]) -> Kept:
    """Find by their values which indices of each parameter are left.

    Raises:
        ValueError: A parameter is gone, new, or no selection of indices of what it was.
    """
    if whole.keys() != part.keys():
        raise ValueError(f"parameters came or went: {', '.join(sorted(whole.keys() ^ part.keys())[:4])}")
    return {
        name: _selection(name, whole[name].detach(), p.detach())
        for name, p in part.items()
        if p.shape != whole[name].shape or not torch.equal(p, whole[name])
    }


def _selection(name: str, whole: Tensor, part: Tensor) -> dict[int, Tensor]:
    """Indices per dimension with ``part = whole[ix_(...)]``; checked on all of the tensor."""
    wrong = ValueError(f"{name} {tuple(part.shape)} is no selection from {tuple(whole.shape)}")
    if part.dim() != whole.dim() or not part.numel():
        raise wrong
    pairs = []  # positions of the same element in part and whole
    for at in torch.randint(part.numel(), (64,), generator=torch.Generator().manual_seed(0)).tolist():
        here = [int(i) for i in torch.unravel_index(torch.tensor(at), part.shape)]
        found = (whole == part[tuple(here)]).nonzero()
        if len(found) == 1:
            pairs.append((here, found[0].tolist()))
        if not len(found) or len(pairs) == 8:
            break
    if not pairs:
        raise wrong
    selection = {}
    for dim in range(part.dim()):  # along each, lines through these elements tell where an index comes from
        lines_part, lines_whole = (
            torch.stack([t[tuple(slice(None) if d == dim else i for d, i in enumerate(at))] for at in places], 1)
            for t, places in ((part, [p for p, _ in pairs]), (whole, [w for _, w in pairs]))
        )
        source = {tuple(line): i for i, line in enumerate(lines_whole.tolist())}
        indices = [source.get(tuple(line)) for line in lines_part.tolist()]
        if None in indices:
            raise wrong
        selection[dim] = torch.tensor(indices)
    left = whole
    for dim, indices in selection.items():
        left = left.index_select(dim, indices)
    if not torch.equal(left, part):
        raise wrong
    return {dim: i for dim, i in selection.items() if not torch.equal(i, torch.arange(whole.shape[dim]))}


@torch.no_grad()
def mask_(model: nn.Module, kept: Kept) -> None:
    """Zero what was removed."""
    for name, dims in kept.items():
        p = model.get_parameter(name)
        for dim, indices in dims.items():
            gone = torch.ones(p.shape[dim], dtype=torch.bool).index_fill_(0, indices, False)
            p.index_fill_(dim, gone.nonzero().squeeze(1), 0)


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor, heads: bool = False) -> list[Tensor]:
    """What the network returns; with ``heads`` also what it returns only in training, without dropout and alike."""
    model.eval()
    model.training = heads  # of the root only, which decides on auxiliary heads
    torch.manual_seed(0)
    try:
        return leaves(model(images))
    finally:
        model.training = False


def apart(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest value, of the worst output.

    Raises:
        ValueError: They have other shapes, or numbers that are not finite.
    """
    if [t.shape for t in got] != [t.shape for t in expected]:
        raise ValueError(f"expected outputs {[tuple(t.shape) for t in expected]}, got {[tuple(t.shape) for t in got]}")
    if not all(t.isfinite().all() for t in (*got, *expected)):
        raise ValueError("an output is not finite")
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True))


def judge(whole: nn.Module, pruned: nn.Module, images: Tensor) -> dict[str, Any]:
    """Compare the pruned network with the whole one, in which everything that is missing is zero.

    Args:
        whole: The network before; becomes float64 and masked.
        pruned: What a tool made of it; becomes float64.
        images: float32.

    Returns: ``difference``, relative to the largest output; ``control``: what it becomes when the rows of the first
        pruned layer are put in the wrong order, so that a mistake there could be seen; ``where``, if they differ: the
        first layer that does.
    """
    kept = kept_indices(dict(whole.named_parameters()), dict(pruned.named_parameters()))
    images = images.double()
    mask_(whole.double(), kept)
    pruned.double()
    try:
        expected = outputs(whole, images, heads=True)
        gap = apart(outputs(pruned, images, heads=True), expected)
    except RuntimeError:  # heads that do not run cannot be trained either: see train_step
        expected = []
    if not expected or (gap >= TOLERANCE and len(expected) == 1):  # it may have been dropout in the root
        expected = outputs(whole, images)
        gap = apart(outputs(pruned, images), expected)
    found: dict[str, Any] = {"difference": gap}
    if found["difference"] >= TOLERANCE:
        return found | {"where": first_difference(whole, pruned, kept, images)}
    for name, dims in kept.items():
        if 0 in dims and len(dims[0]) > 1:
            p = pruned.get_parameter(name)
            p.data = p.data.roll(1, 0)
            found["control"] = apart(outputs(pruned, images, heads=len(expected) > 1), expected)
            p.data = p.data.roll(-1, 0)
            break
    return found


@torch.no_grad()
def first_difference(whole: nn.Module, pruned: nn.Module, kept: Kept, images: Tensor) -> str:
    """The first convolution, linear layer or norm whose outputs differ, on the channels that are left."""
    runs: list[list[tuple[str, Tensor]]] = []
    for model in (whole, pruned):
        runs.append([])
        kinds = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
        hooks = [
            m.register_forward_hook(lambda m, _, out, name=name, run=runs[-1]: run.append((name, out.clone())))
            for name, m in model.named_modules()
            if isinstance(m, kinds)
        ]
        model(images)
        for hook in hooks:
            hook.remove()
    for (name, expected), (_, got) in zip(*runs, strict=False):
        rows = kept.get(f"{name}.weight", {}).get(0)
        # channels lie along the axis that was cut
        for axis, (a, b) in enumerate(zip(expected.shape, got.shape, strict=True)):
            if rows is not None and a != b == len(rows):
                expected = expected.index_select(axis, rows)
        if expected.shape != got.shape or apart([got], [expected]) >= TOLERANCE:
            return name
    return "after the last layer"


# ---- the tools


def prune_fastprune(model: nn.Module, images: Tensor, seed: int = 0) -> dict[str, Any]:
    """Prune in place.  Returns: CPU seconds per stage, and why layers were left alone."""
    generator = torch.Generator().manual_seed(seed)
    start = time.process_time()
    graph = trace(model, images)
    traced = time.process_time()
    keep = {}
    for name, group in graph.groups.items():
        stays = torch.randperm(group.size, generator=generator)[: max(1, round(group.size * (1 - RATIO)))]
        keep[name] = torch.zeros(group.size, dtype=torch.bool).index_fill_(0, stays, True)
    selected = time.process_time()
    fp.compact(model, keep, images, check=False, graph=graph)
    seconds = {"graph": traced - start, "select": selected - traced, "remove": time.process_time() - selected}
    return {"seconds": seconds, "frozen": graph.frozen}


def prune_torch_pruning(model: nn.Module, images: Tensor, seed: int = 0) -> dict[str, Any]:
    """The same with Torch-Pruning, set up like its own examples for torchvision and timm."""
    import torch_pruning as tp

    torch.manual_seed(seed)
    attention = [
        m for m in model.modules() if hasattr(m, "num_heads") and isinstance(getattr(m, "qkv", None), nn.Linear)
    ]
    heads = {m.qkv: m.num_heads for m in attention}
    multihead = [m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    start = time.process_time()
    pruner = tp.pruner.BasePruner(
        model,
        images,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=RATIO,
        global_pruning=False,
        round_to=multihead[0] if multihead else None,
        num_heads=heads,
        ignored_layers=zoo.classifiers(model),
        in_channel_groups={},
        out_channel_groups={},
    )
    built = time.process_time()
    pruner.step()
    removed = time.process_time()
    for m in attention:
        m.num_heads = heads[m.qkv]
        m.head_dim = m.qkv.out_features // (3 * m.num_heads)
    if multihead and hasattr(model, "hidden_dim"):
        model.hidden_dim = model.conv_proj.out_channels
    return {"seconds": {"graph": built - start, "select and remove": removed - built}, "frozen": {}}


PRUNE: dict[str, Callable[..., dict[str, Any]]] = {"fastprune": prune_fastprune, "torch-pruning": prune_torch_pruning}


# ---- one network, one tool


def train_step(model: nn.Module, images: Tensor) -> set[str]:
    """Forward, backward and a step of SGD in training mode.

    Returns: Names of parameters without a gradient.

    Raises:
        ValueError: The loss or a gradient is not finite.
    """
    model.train()
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    loss = sum(out.square().mean() for out in leaves(model(images)))
    loss.backward()
    named = dict(model.named_parameters())
    without = {name for name, p in named.items() if p.grad is None}
    grads = [p.grad for p in named.values() if p.grad is not None]
    if not all(g.isfinite().all() for g in [loss, *grads]):
        raise ValueError("the loss or a gradient is not finite")
    optimizer.step()
    return without


def examine(source: str, net: str, tool: str, report: Callable[[dict], None]) -> None:
    """Prune one network with one tool and judge the result.

    Args:
        source, net, tool: What to examine.
        report: Given all that is known so far before every stage and at the end.
    """
    row: dict[str, Any] = {"stage": "build", "errors": {}}
    models: dict[str, Any] = {}
    for stage, step in STAGES.items():
        row["stage"] = stage
        report(row)
        try:
            step(source, net, tool, row, models)
        except Exception as e:
            text = re.sub(r"(?<![\w.])/\S*/", "", " ".join(str(e).split()))  # no places of this machine
            row["errors"][stage] = f"{type(e).__name__}: {text[:200]}"
            if stage != "compare":
                break
    report(row | {"stage": "done", "cpu_s": round(time.process_time(), 1)})


def _build(source: str, net: str, tool: str, row: dict, models: dict) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if tool == "torch-pruning" and source == "timm":  # as its examples do; it cannot see into the fused op
        from timm.layers import set_fused_attn

        set_fused_attn(False)
    PRUNE[tool](_tiny(), torch.randn(2, 3, 8, 8))  # whatever is imported late is not the network's
    models["whole"], models["images"] = whole, images = zoo.build(source, net)
    models["pruned"] = copy.deepcopy(whole)
    before = fp.flops(whole, images)
    row |= {"size": images.shape[-1], "batch": len(images), "layers": len(zoo.prunable(whole))}
    row |= {"macs_before": before["macs"], "params_before": before["params"]}


def _prune(source: str, net: str, tool: str, row: dict, models: dict) -> None:
    found = PRUNE[tool](models["pruned"], models["images"])
    row["seconds"] = {k: round(s, 3) for k, s in found["seconds"].items()}
    layers, after = zoo.prunable(models["whole"]), dict(models["pruned"].named_modules())
    alone = [name for name, m in layers.items() if after[name].weight.shape[0] == m.weight.shape[0]]
    row |= {"pruned": len(layers) - len(alone), "alone": reasons(alone, found["frozen"])}


def _run(source: str, net: str, tool: str, row: dict, models: dict) -> None:
    after = fp.flops(models["pruned"], models["images"])
    row |= {"macs": after["macs"], "params": after["params"]}


def _compare(source: str, net: str, tool: str, row: dict, models: dict) -> None:
    row |= judge(models.pop("whole"), copy.deepcopy(models["pruned"]), models["images"])


def _train(source: str, net: str, tool: str, row: dict, models: dict) -> None:
    without = train_step(models["pruned"], models["images"])
    if without:  # of the whole network, too?
        without -= train_step(zoo.build(source, net)[0], models["images"])
    if without:
        raise ValueError(f"no gradient for {', '.join(sorted(without)[:3])}")
    row["trains"] = True


STAGES = {"build": _build, "prune": _prune, "run": _run, "compare": _compare, "train": _train}


def _tiny() -> nn.Module:
    convs = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(128, zoo.CLASSES))


def reasons(alone: list[str], frozen: Mapping[str, str]) -> dict[str, list]:
    """Layers that were not pruned, by reason: ``{reason: [how many, the first three]}``."""
    by: dict[str, list[str]] = {}
    for name in alone:
        by.setdefault(frozen.get(name, "it is in no group"), []).append(name)
    return {reason: [len(names), names[:3]] for reason, names in sorted(by.items(), key=lambda r: -len(r[1]))}


# ---- all of them


def _child(work: Callable[..., None], connection: Any, seconds: int, gigabytes: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    work(report=connection.send)


def in_a_process(work: Callable[..., None], seconds: int, gigabytes: float, context: Any) -> dict[str, Any]:
    """Run :func:`examine` in a process of its own.

    Args:
        work: It, with all arguments but ``report``.
        seconds: Of CPU time, so that a busy machine changes nothing; ten times as many by the clock.
        gigabytes: Of address space.
        context: Of multiprocessing.

    Returns: The row, or what was known of it when the process died or took too long.
    """
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, theirs, seconds, gigabytes))
    process.start()
    theirs.close()
    row, deadline, late = {"stage": "start", "errors": {}}, time.monotonic() + 10 * seconds, False
    with ours:
        try:
            while not late:
                late = not ours.poll(max(0.0, deadline - time.monotonic()))
                row = row if late else ours.recv()
            process.kill()
        except EOFError:
            pass
    process.join()
    late |= process.exitcode == -signal.SIGXCPU
    if row["stage"] != "done":
        died = f"the process died (exit code {process.exitcode})"
        row["errors"][row["stage"]] = f"more than {seconds} s" if late else died
    process.close()
    return row


def run(args: argparse.Namespace, tasks: list[tuple[str, str, str]], folder: Path) -> None:
    """Examine all tasks, and file each row as it comes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "timm", "torch_pruning", "fastprune", "bench.zoo"])
    facts = harness.provenance("cpu", verified=not args.no_gate) | {"threads": 1}
    facts |= {name: metadata.version(name) for name in ("torchvision", "timm", "torch-pruning")}

    def one(task: tuple[str, str, str], gigabytes: float) -> None:
        source, net, tool = task
        row = in_a_process(partial(examine, source, net, tool), args.timeout, gigabytes, context)
        case = {"source": source, "net": net, "ratio": RATIO}
        row = {"bench": "coverage", "case": case, "impl": tool} | row | {"provenance": facts}
        if not args.no_write:
            harness.append(folder / "coverage.jsonl", [row])
        print(f"{source} {net}, {tool}: {verdict(row)}", flush=True)

    heavy = [t for t in tasks if t[1] in zoo.HEAVY]
    light = [t for t in tasks if t[1] not in zoo.HEAVY]
    for jobs, part in ((args.jobs, light), (1, heavy)):
        with ThreadPoolExecutor(jobs) as pool:
            for future in [pool.submit(one, task, args.memory / jobs) for task in part]:
                future.result()


# ---- the page


FAILED = {"start": "not built", "build": "not built", "prune": "not pruned", "run": "does not run"}


def faithful(row: dict) -> bool:
    """Pruned, the same as the masked network, and by a comparison that would have seen a mistake."""
    return row.get("difference", math.inf) < TOLERANCE and row.get("control", 0.0) > CONTROL


def unfaithful(row: dict) -> bool:
    """It runs, and computes something else."""
    return "macs" in row and row["pruned"] > 0 and not row.get("difference", math.inf) < TOLERANCE


def complete(row: dict) -> bool:
    """Faithful, and every layer is pruned."""
    return faithful(row) and row["pruned"] == row["layers"]


def seconds(row: dict) -> float:
    return sum(row["seconds"].values())


def verdict(row: dict) -> str:
    """What became of a network, in a few words."""
    errors = row["errors"]
    if stage := next((s for s in ("start", "build", "prune", "run") if s in errors), None):
        return f"{FAILED[stage]}: {errors[stage]}"
    if "compare" in errors:
        text = f"cannot be compared: {errors['compare']}"
    elif not row["pruned"]:
        text = "nothing pruned"
    elif faithful(row):
        text = "faithful"
    elif unfaithful(row):
        text = f"unfaithful: {row['difference']:.0e} from {row['where']} on"
    else:
        text = "undecided: the comparison would not have seen a mistake"
    text += f", {row['pruned']} of {row['layers']} layers, {seconds(row):.2f} s"
    return text + (f", does not train: {errors['train']}" if "train" in errors else "")


def page(rows: list[dict]) -> str:
    """docs/results/coverage.md from rows."""
    by: dict[str, dict[str, dict[str, dict]]] = {}  # block -> network -> tool -> row
    order = {key: i for i, key in enumerate(zoo.names())}
    for row in sorted(rows, key=lambda r: order.get((r["case"]["source"], r["case"]["net"]), len(order))):
        source, net = row["case"]["source"], row["case"]["net"]
        by.setdefault(zoo.kind(source, net), {}).setdefault(net, {})[row["impl"]] = row
    text = [INTRODUCTION.format(**_versions(rows)), _summary(by), ""]
    for block, nets in by.items():
        text += [f"## {block[0].upper()}{block[1:]}", "", _table(nets), "", *_left_alone(nets), *_wrong(nets)]
    return "\n".join([*text, *_losses(by)])


INTRODUCTION = """\
# Which networks can be pruned

Written by `python -m bench.e2e.coverage`: every network loses half of every group of channels, taken at random with a
fixed seed. torch {torch}, torchvision {torchvision}, timm {timm}, Torch-Pruning {torch-pruning}; {device}, {date},
commit {commit}.

- **Networks**: all classification networks of torchvision, and one or two small variants of each CNN family of timm.
  Images of 64 x 64 where the network allows, batch {batch}, 997 classes; weights, scales, shifts and statistics are
  drawn at random, so that nothing is zero by accident.
- **Faithful**: the pruned network computes what the whole network does with zeros for all that was removed, to
  {tolerance:.0e} of the largest output, in float64, auxiliary heads of training included. What was removed is found by
  the values of the parameters before and after; no tool is asked. That a mistake would have been seen is checked too:
  with the rows of the first pruned layer in another order the difference must exceed {control:.0e}.
  Channels under a layer norm or in an attention product have no such equal: without them the mean, the variance or the
  scale is another one. Torch-Pruning removes them all the same; training then starts from another function.
- **Layers**: convolutions and linear layers with fewer outputs than before, of all but the classifiers and those with
  a single output. *Every layer* means that none was left alone.
- **Trains**: forward, backward and a step of SGD run in training mode, with finite gradients for all parameters that
  had one before.
- **s**: CPU seconds of one thread for graph, choice and removal, measured once, after a tiny network to warm up.
  fastprune's trial of views and splits (see `trace`) is part of the graph; its proof (`compact(check=True)`, the
  default) comes on top and is not counted. Torch-Pruning has neither.
- **MACs**, **parameters**: the shares that are left.
- **Torch-Pruning**: `BasePruner`, random importance, 50 % per group, classifiers ignored, and as in its examples: heads
  of attention named, `round_to` their number for torchvision's vision transformers, no fused attention.
- An empty cell was not run.  Each run may take 180 CPU seconds, or the 60 that its row says, and 10 to 22 GiB.
"""


def _versions(rows: list[dict]) -> dict[str, Any]:
    facts = [row["provenance"] for row in rows]
    names = ("torch", "torchvision", "timm", "torch-pruning", "commit", "device")
    joined = {name: ", ".join(dict.fromkeys(str(f[name]) for f in facts)) for name in names}
    joined["commit"] += " with uncommitted changes" if any(f["dirty"] for f in facts) else ""
    joined["commit"] += ", NOT VERIFIED by tests" if not all(f["verified"] for f in facts) else ""
    dates = sorted({f["date"][:10] for f in facts})
    return (
        joined
        | {"date": " to ".join(dict.fromkeys((dates[0], dates[-1]))), "batch": zoo.BATCH}
        | {"tolerance": TOLERANCE, "control": CONTROL}
    )


def _summary(by: dict) -> str:
    heads = ("pruned, and runs", "faithful", "and every layer pruned", "unfaithful", "trains", "s")
    lines = [table.line(["networks", "tool", *heads]), table.line(["---", "---", *["---:"] * len(heads)])]
    for block, nets in by.items():
        for tool in TOOLS:
            rows = [found[tool] for found in nets.values() if tool in found]
            if not rows:
                continue
            counts = [
                sum("macs" in r and r["pruned"] > 0 for r in rows),
                sum(map(faithful, rows)),
                sum(map(complete, rows)),
                sum(map(unfaithful, rows)),
                sum(r.get("trains", False) for r in rows),
            ]
            cells = [block, tool, *(f"{n} of {len(rows)}" for n in counts)]
            cells.append(f"{sum(seconds(r) for r in rows if 'seconds' in r):.1f}")
            lines.append(table.line(cells))
    return "\n".join(lines)


def _table(nets: dict[str, dict[str, dict]]) -> str:
    heads = ["faithful", "layers", "trains", "s", "MACs", "parameters"]
    lines = [table.line(["network", "M", *heads, *(f"Torch-Pruning: {heads[0]}", *heads[1:])])]
    lines.append(table.line(["---", "---:", *["---", "---:", "---", "---:", "---:", "---:"] * 2]))
    for net, found in nets.items():
        size = next((f"{r['params_before'] / 1e6:.1f}" for r in found.values() if "params_before" in r), "")
        lines.append(table.line([net, size, *(c for tool in TOOLS for c in _cells(found.get(tool)))]))
    return "\n".join(lines)


def _cells(row: dict | None) -> list[str]:
    if row is None:
        return [""] * 6
    if "macs" not in row:
        stage = next(s for s in FAILED if s in row["errors"])
        taken = f"{seconds(row):.2f}" if "seconds" in row else ""
        return [f"**{FAILED[stage]}**", "", "", taken, "", ""]
    if faithful(row):
        verdict = f"yes, {row['difference']:.0e}"
    elif not row["pruned"]:
        verdict = "nothing pruned"
    else:
        verdict = f"**no**, {row['difference']:.0e}" if unfaithful(row) and "difference" in row else "**no**"
    layers = f"{row['pruned']}/{row['layers']}"
    shares = (f"{100 * row[what] / row[f'{what}_before']:.0f} %" for what in ("macs", "params"))
    trains = "yes" if row.get("trains") else "**no**"
    return [verdict, layers, trains, f"{seconds(row):.2f}", *shares]


def _left_alone(nets: dict[str, dict[str, dict]]) -> list[str]:
    lines = []
    for net, found in nets.items():
        row = found.get("fastprune", {})
        if row.get("alone"):
            why = "; ".join(
                f"{reason} ({count}: {', '.join(names)}{', ...' if count > len(names) else ''})"
                for reason, (count, names) in row["alone"].items()
            )
            lines.append(f"- {net}, {row['layers'] - row['pruned']} of {row['layers']}: {why}")
    return ["fastprune leaves these layers alone:", "", *lines, ""] if lines else []


def _wrong(nets: dict[str, dict[str, dict]]) -> list[str]:
    lines = [
        f"- {net}, {tool}: {verdict(row)}"
        for tool in TOOLS
        for net, found in nets.items()
        if (row := found.get(tool)) and not (faithful(row) and row.get("trains"))
    ]
    return ["What went wrong:", "", *lines, ""] if lines else []


def _losses(by: dict) -> list[str]:
    """Where Torch-Pruning is faster, or prunes more layers and is faithful."""
    slower, fewer, ratios = [], [], []
    for nets in by.values():
        for net, found in nets.items():
            if len(found) == 2 and all("seconds" in row for row in found.values()):
                ours, theirs = (found[tool] for tool in TOOLS)
                if "macs" in ours and "macs" in theirs:
                    ratios.append(seconds(theirs) / seconds(ours))
                    if ratios[-1] < 1:
                        slower.append((ratios[-1], f"{net} ({seconds(ours):.2f} s against {seconds(theirs):.2f} s)"))
                if faithful(theirs) and theirs["pruned"] > ours["pruned"]:
                    fewer.append(f"{net} ({ours['pruned']} against {theirs['pruned']} of {ours['layers']})")
    if not ratios:
        return []
    spread, n = sorted(ratios), len(ratios)
    text = ["## Where Torch-Pruning does better", ""]
    text.append(
        f"Of {n} networks that run after both, fastprune takes less time on {n - len(slower)}. Torch-Pruning takes "
        f"{spread[n // 2]:.2f} times as long in the median, {spread[0]:.2f} to {spread[-1]:.0f} times."
    )
    text.append("")
    if slower:
        text += [f"Torch-Pruning is faster on: {', '.join(name for _, name in sorted(slower))}.", ""]
    more = f"It prunes more layers, and faithfully, on: {', '.join(fewer)}."
    return [*text, more if fewer else "It prunes more layers faithfully on none.", ""]


# ---- command line


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--only", default="*", metavar="PATTERN", help="networks of this name or source/name, with * and ?")
    p.add_argument("--tool", choices=TOOLS, default=None, help="default: both")
    p.add_argument("--jobs", type=int, default=2, help=f"processes at a time; {', '.join(sorted(zoo.HEAVY))} run alone")
    p.add_argument("--timeout", type=int, default=180, help="CPU seconds for one network and tool")
    p.add_argument("--memory", type=float, default=20, help="GiB of address space for all processes together")
    p.add_argument("--resume", action="store_true", help="leave out what has a row of this commit")
    p.add_argument("--list", action="store_true", help="print the networks and end")
    p.add_argument("--render", action="store_true", help="only write the page again")
    p.add_argument("--no-gate", action="store_true", help="do not run the tests first; rows are marked unverified")
    p.add_argument("--no-write", action="store_true", help="print only")
    p.add_argument("--out", type=Path, default=None, help="folder of results; default bench/results/<device>")
    p.add_argument("--page", type=Path, default=PAGE)
    args = p.parse_args()
    tools = [args.tool] if args.tool else TOOLS
    tasks = [(s, n, tool) for s, n in zoo.names() if named(s, n, args.only) for tool in tools]
    if not tasks:
        raise SystemExit(f"bench: no network is called {args.only!r}; --list names them")
    if args.list:
        print("\n".join(f"{s} {n}" for s, n in dict.fromkeys((s, n) for s, n, _ in tasks)))
        return
    folder = args.out or harness.RESULTS / harness.device_folder("cpu")
    path = folder / "coverage.jsonl"
    if not args.render:
        if args.resume and path.exists():
            tasks = without(tasks, table.latest([path]))
        if not args.no_gate:
            harness.check(TESTS)
        run(args, tasks, folder)
    if not args.no_write:
        args.page.write_text(page(table.latest([path])))


def named(source: str, net: str, pattern: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for name in (net, f"{source}/{net}"))


def without(tasks: list[tuple[str, str, str]], rows: list[dict]) -> list[tuple[str, str, str]]:
    """The tasks that have no row of this commit."""
    commit = harness.commit()
    have = {(r["case"]["source"], r["case"]["net"], r["impl"]) for r in rows if r["provenance"]["commit"] == commit}
    return [t for t in tasks if t not in have]


if __name__ == "__main__":
    main()
