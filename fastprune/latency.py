"""How long a forward takes, and each layer inside it, before and after pruning.

Layers are timed inside the real forward, by hooks, not alone: then caches, memory format and fused neighbours are those
that count.  What is left of the whole (activations, pooling, sums, the hooks themselves) is a row of its own, so that
the rows add up.  Two models are run in turn, so that a machine that slows down slows both.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.flops import flops
from fastprune.graph import undisturbed
from fastprune.surgery import call, leaves

WARM_UP = 2  # forwards of each model before the first that counts
ROUNDS = (7, 50)  # least and most forwards of each model that count, if nobody says how many
SECONDS = 1.0  # that a comparison of two models takes about, within these rounds
REST = "(all else)"


class Stopwatch:
    """Marks moments on the CPU, or in the current stream of a GPU."""

    @staticmethod
    def of(inputs: Any) -> Stopwatch:
        """For the device that the first tensor is on.

        Raises:
            ValueError: No tensor, or a device that cannot be timed.
        """
        device = next((t.device for t in leaves(inputs)), None)
        if device is None or device.type not in ("cpu", "cuda"):
            raise ValueError(f"latency: expected inputs on a CPU or a CUDA device, got {device or 'no tensor'}")
        return _CudaStopwatch(device) if device.type == "cuda" else Stopwatch(device)

    def placed(self, model: nn.Module) -> nn.Module:
        """A model of one's own, moved to the device and put into eval mode."""
        return model.to(self.device).eval()

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        return time.perf_counter()

    def synchronize(self) -> None:
        """Wait until all that was marked has happened."""

    def ms(self, start: Any, end: Any) -> float:
        return (end - start) * 1e3


class _CudaStopwatch(Stopwatch):
    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)


def interleaved(watch: Stopwatch, calls: Sequence[Callable[[], Any]], repeats: int | None = None) -> list[list[float]]:
    """Milliseconds of each call, one value per round; the order turns round from one round to the next.

    Args:
        watch: Of the device the calls run on.
        calls: Without arguments; what they return is dropped.
        repeats: Rounds after the warm-up; None: as many as take about a second, 7 to 50.
    """

    def run(each: Callable[[], Any]) -> float:
        watch.synchronize()
        start = watch.mark()
        each()
        end = watch.mark()
        watch.synchronize()
        return watch.ms(start, end)

    warm = [[run(each) for each in calls] for _ in range(WARM_UP)]
    if repeats is None:
        repeats = min(max(ROUNDS[0], round(1e3 * SECONDS / max(sum(warm[-1]), 1e-3))), ROUNDS[1])
    samples: list[list[float]] = [[] for _ in calls]
    for i in range(repeats):
        for j in range(len(calls))[:: -1 if i % 2 else 1]:
            samples[j].append(run(calls[j]))
    return samples


def relative(watch: Stopwatch, dense: nn.Module, small: nn.Module, inputs: Any) -> tuple[float, float]:
    """Milliseconds of a forward of ``dense``, and what share of them one of ``small`` takes: medians over rounds."""
    with torch.no_grad():
        before, after = interleaved(watch, [partial(call, m, inputs) for m in (dense, small)])
    return statistics.median(before), statistics.median(a / b for a, b in zip(after, before, strict=True))


@dataclass(frozen=True)
class LatencyReport:
    """What :func:`latency` measured; ``str`` makes an aligned table of it.

    Attributes:
        ms: Median milliseconds of a forward of the model, without hooks; the rows add up to one with hooks.
        before_ms: The same of the model it is compared with, or None.
        speedup: ``(median, p20, p80)`` over rounds of ``before / after``, or None.
        rows: One dict per layer with parameters of its own, in module order, and at last one for all else: ``name``,
            ``kind``, ``before`` and ``after`` (dicts of ``out`` and ``in`` channels, ``macs`` of one sample, ``ms``;
            None where there is no such layer), ``speedup`` as above, and a ``note``: ``"slower"`` if four of five
            rounds are, ``"gains little"`` if the time shrinks by less than half, on a logarithmic scale, of what the
            MACs do, with a reason where one could be measured.
        device: Type of the device, threads and inputs.
    """

    ms: float
    before_ms: float | None
    speedup: tuple[float, float, float] | None
    rows: list[dict[str, Any]] = field(repr=False)
    device: str

    def __str__(self) -> str:
        two = self.before_ms is not None
        lines = [["layer", "kind"]]
        for what in ("channels", "MMACs", "ms"):
            lines[0] += [what, "after"] if two else [what]
        lines[0] += ["speedup", ""] if two else []
        for row in self.rows:
            sides = [row[side] or {} for side in (("before", "after") if two else ("after",))]
            cells = [_channels(side) for side in sides] + [_millions(side) for side in sides]
            cells += [_number(side.get("ms")) for side in sides]
            lines.append([row["name"], row["kind"], *cells, *([_times(row["speedup"]), row["note"]] if two else [])])
        blank = [""] * (5 if two else 3)
        sums = [sum(row[side]["ms"] for row in self.rows if row[side]) for side in ("before", "after")]
        lines.append(["sum, with hooks", *blank, *map(_number, sums if two else sums[1:]), *([""] * 2 * two)])
        whole = [_number(self.before_ms), _number(self.ms), _times(self.speedup), ""] if two else [_number(self.ms)]
        lines.append(["whole, without hooks", *blank, *whole])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = {0, 1, 9}
        aligned = ([c.ljust(w) if i in text else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
                   for line in lines)  # fmt: skip
        head = f"milliseconds, medians; {self.device}"
        return "\n".join([head, *("  ".join(cells).rstrip() for cells in aligned)])


def _channels(side: Mapping[str, Any]) -> str:
    return f"{side['in']}>{side['out']}" if side.get("in") else str(side.get("out") or "")


def _millions(side: Mapping[str, Any]) -> str:
    return f"{side['macs'] / 1e6:.2f}" if side.get("macs") else ""


def _number(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.3f}"


def _times(speedup: tuple[float, float, float] | None) -> str:
    return "" if speedup is None else f"{speedup[0]:.2f}x"


def latency(
    model: nn.Module, example_inputs: Any, *, compare: nn.Module | None = None, repeats: int | None = None
) -> LatencyReport:
    """Measure a forward of ``model``, as a whole and layer by layer, beside the model it was pruned from.

    In eval mode, without gradients, with the threads that PyTorch has now.  On a GPU the layers' times are those of
    the stream, by events; where it waits for the CPU, that counts too.

    Args:
        model: The pruned model, or any; left as it was.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments, of the batch and memory format
            that count, on the device of the models.
        compare: The model before pruning; its layers are found by name.
        repeats: Rounds that count; None: as many as take about a second, 7 to 50.

    Raises:
        ValueError: Inputs that are not on a CPU or a CUDA device, ``repeats`` that is no number of at least 1, or
            ``compare`` is ``model``.
    """
    if repeats is not None and (not isinstance(repeats, int) or repeats < 1):
        raise ValueError(f"latency: expected repeats of at least 1, got {repeats!r}")
    if compare is model:
        raise ValueError(
            "latency: expected compare to be the model before pruning, got the model itself; compact works in "
            "place, so copy.deepcopy the model before"
        )
    watch = Stopwatch.of(example_inputs)
    models = [model] if compare is None else [model, compare]
    with ExitStack() as stack:
        for m in models:
            stack.enter_context(undisturbed(m))
            m.eval()
        stack.enter_context(torch.no_grad())
        sides = [_layers(m, example_inputs) for m in models]
        calls = [partial(call, m, example_inputs) for m in models]
        whole = interleaved(watch, calls, repeats)
        timers = [stack.enter_context(_timed(watch, m, list(side))) for m, side in zip(models, sides, strict=True)]
        hooked = interleaved(watch, calls, repeats)
    rounds = [timer()[WARM_UP:] for timer in timers]  # each a list of dicts, layer to milliseconds
    for side, mine, total in zip(sides, rounds, hooked, strict=True):
        for one, ms in zip(mine, total, strict=True):
            one[REST] = ms - sum(one.values())
        side[REST] = {"kind": "", "out": None, "in": None, "macs": 0, "size": 0}
        for name, facts in side.items():
            facts["all"] = [one.get(name, 0.0) for one in mine]
            facts["ms"] = statistics.median(facts["all"])
    after, before = sides[0], sides[1] if compare is not None else {}
    names = [*dict.fromkeys([*before, *after])]
    names.remove(REST)
    rows = [_row(name, before.get(name), after.get(name)) for name in (*names, REST)]
    if compare is not None:
        _explain(watch, model, example_inputs, rows, repeats)
    shape = ", ".join("x".join(map(str, t.shape)) for t in leaves(example_inputs))
    threads = f", threads {torch.get_num_threads()}" if watch.device.type == "cpu" else ""
    return LatencyReport(
        statistics.median(whole[0]),
        statistics.median(whole[1]) if compare is not None else None,
        _speedup(whole[1], whole[0]) if compare is not None else None,
        rows,
        f"{watch.device.type}{threads}, inputs {shape}",
    )


def _layers(model: nn.Module, example_inputs: Any) -> dict[str, dict[str, Any]]:
    """Modules with parameters of their own, in module order: kind, channels, MACs, elements."""
    macs: dict[str, int] = {}
    for layer in flops(model, example_inputs)["layers"]:
        macs[layer["name"]] = macs.get(layer["name"], 0) + layer["macs"]
    found = {}
    for name, m in model.named_modules():
        mine = [p for p in m._parameters.values() if p is not None]
        if mine:
            out = next((getattr(m, a) for a in ("out_channels", "out_features", "num_features") if hasattr(m, a)), None)
            read = next((getattr(m, a) for a in ("in_channels", "in_features") if hasattr(m, a)), None)
            found[name] = {"kind": type(m).__name__, "out": out, "in": read, "macs": macs.get(name, 0)}
            found[name]["size"] = sum(p.numel() for p in mine)
    return found


@contextmanager
def _timed(watch: Stopwatch, model: nn.Module, names: Sequence[str]) -> Iterator[Callable[[], list[dict[str, float]]]]:
    """Note when layers start and end.  Yields: a call for their own milliseconds, without layers inside, by forward."""
    forwards: list[list[tuple[str, bool, Any]]] = []
    handles = [model.register_forward_pre_hook(lambda *_: forwards.append([]))]
    for name in names:
        m = model.get_submodule(name)
        handles.append(m.register_forward_pre_hook(lambda *_, n=name: forwards[-1].append((n, True, watch.mark()))))
        handles.append(m.register_forward_hook(lambda *_, n=name: forwards[-1].append((n, False, watch.mark()))))

    def own() -> list[dict[str, float]]:
        found = []
        for events in forwards:
            ms: dict[str, float] = {}
            stack: list[list[Any]] = []  # when it started, milliseconds of the layers inside
            for name, starts, at in events:
                if starts:
                    stack.append([at, 0.0])
                    continue
                started, inside = stack.pop()
                took = watch.ms(started, at)
                ms[name] = ms.get(name, 0.0) + took - inside
                if stack:
                    stack[-1][1] += took
            found.append(ms)
        return found

    try:
        yield own
    finally:
        for handle in handles:
            handle.remove()


def _speedup(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile over the rounds."""
    ratios = [b / max(a, 1e-9) for b, a in zip(before, after, strict=True)]
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    fifths = statistics.quantiles(ratios, n=5, method="inclusive")
    return statistics.median(ratios), fifths[0], fifths[3]


def _row(name: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any]:
    speedup, note = None, ""
    if before is not None and after is not None:
        speedup = _speedup(before["all"], after["all"])
        if after["size"] < before["size"]:
            if speedup[2] < 1:
                note = "slower"
            elif after["macs"] and speedup[0] < (before["macs"] / after["macs"]) ** 0.5:
                note = "gains little"
    public = ("out", "in", "macs", "ms")
    sides = [None if side is None else {key: side[key] for key in public} for side in (before, after)]
    kind = (after or before)["kind"]
    return {"name": name, "kind": kind, "before": sides[0], "after": sides[1], "speedup": speedup, "note": note}


def _explain(
    watch: Stopwatch, model: nn.Module, example_inputs: Any, rows: list[dict[str, Any]], repeats: int | None
) -> None:
    """Where a layer with a note has odd widths, time it alone against itself with the next multiple."""
    multiple = 8 if watch.device.type == "cuda" else 16  # tensor cores; floats in the widest vector of a CPU
    noted = {row["name"]: row for row in rows if row["note"] and row["name"] != REST}
    layers = {name: m for name, m in model.named_modules() if name in noted and type(m) in (nn.Conv2d, nn.Linear)}
    inputs: dict[str, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=name: inputs.update({n: args[0]})) for name, m in layers.items()
    ]
    try:
        with undisturbed(model), torch.no_grad():
            model.eval()
            call(model, example_inputs)
            for handle in handles:
                handle.remove()
            for name, m in layers.items():
                if name in inputs and (padded := _padded(m, inputs[name], multiple)) is not None:
                    wide, x, widths = padded
                    calls = [partial(m, inputs[name]), partial(wide, x)]
                    own, padded_ms = interleaved(watch, calls, repeats)
                    gain, *_ = _speedup(own, padded_ms)
                    if gain > 1.05:
                        noted[name]["note"] += f": with {widths} channels it would take {1 / gain:.2f} of that"
    finally:
        for handle in handles:
            handle.remove()


def _padded(m: nn.Module, x: Tensor, multiple: int) -> tuple[nn.Module, Tensor, str] | None:
    """The layer and its input with channels rounded up to a multiple; None if they are one already."""
    conv = isinstance(m, nn.Conv2d)
    rows, columns = (m.out_channels, m.in_channels) if conv else (m.out_features, m.in_features)
    depthwise = conv and m.groups == rows == columns
    if conv and m.groups > 1 and not depthwise:
        return None
    up_rows, up_columns = (-(-n // multiple) * multiple for n in (rows, columns))
    if columns < multiple and not depthwise:  # such as an image's three
        up_columns = columns
    if (up_rows, up_columns) == (rows, columns):
        return None
    axis = 1 if conv else x.dim() - 1
    if depthwise:
        up_columns = up_rows
    grown = torch.randn([up_columns if d == axis else n for d, n in enumerate(x.shape)], dtype=x.dtype, device=x.device)
    shape = [up_rows, 1 if depthwise else up_columns, *m.weight.shape[2:]]
    weight = torch.randn(shape, dtype=m.weight.dtype, device=x.device)
    if conv and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        grown, weight = (t.to(memory_format=torch.channels_last) for t in (grown, weight))
    wide = copy.deepcopy(m)
    wide.weight = nn.Parameter(weight, requires_grad=False)
    if m.bias is not None:
        wide.bias = nn.Parameter(m.bias.new_zeros(up_rows), requires_grad=False)
    if conv:
        wide.out_channels, wide.in_channels, wide.groups = up_rows, up_columns, up_rows if depthwise else 1
    else:
        wide.out_features, wide.in_features = up_rows, up_columns
    return wide, grown, f"{up_columns}>{up_rows}"
