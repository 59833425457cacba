"""What the report shows: tables and charts of runs, put together as one page."""

from __future__ import annotations

import math
import os
import platform
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import fastprune
from fastprune.errors import DataError
from fastprune.report.runs import Histogram, Mark, Run, real
from fastprune.report.svg import SERIES, SHAPES, Chart, Scale, number

MOST_RIDGES = 9  # moments of a histogram over time
BINS = 60
MOST_MOMENTS = 4  # of a layer's own histogram
LAYER_BINS = 24
UNKNOWN = "\N{EN DASH}"
FACTS = (  # of run.json and of the calls' first row, in the order shown
    "command", "source", "fastprune", "commit", "torch", "python", "device", "device_name", "threads", "dataset",
    "data", "changed", "arch", "method", "prune_pc", "reg_weight", "b", "epochs", "lr", "batch_size", "precision",
    "base", "started",
)  # fmt: skip


@dataclass
class Entry:
    """Runs that differ in their seed alone.  ``look`` is the number of its colour and shape."""

    name: str
    runs: list[Run]
    look: int = 0

    @property
    def css(self) -> str:
        return f"s{self.look % SERIES}" + (" dashed" if self.look >= SERIES else "")

    @property
    def shape(self) -> str:
        return SHAPES[(self.look + self.look // SERIES) % len(SHAPES)]  # another one when the colours begin anew

    @property
    def first(self) -> Run:
        return self.runs[0]

    def values(self, key: str) -> list[float]:
        return [value for run in self.runs if (value := run.last(key)) is not None]

    def fact(self, *keys: str) -> str:
        facts = self.first.facts
        return next((str(facts[key]) for key in keys if isinstance(facts.get(key), str | int | float)), "")

    @property
    def task(self) -> str:
        """What accuracies can be compared within: the data set."""
        return self.fact("dataset")


@dataclass
class Layer:
    """A small picture with a name and a line below it."""

    svg: str
    name: str
    about: str


@dataclass
class Figure:
    """``layers`` are shown on demand, ``summary`` says what they are; ``css`` has their colour."""

    svg: str
    caption: str
    legend: list[Entry] = field(default_factory=list)
    wide: bool = False
    layers: list[Layer] = field(default_factory=list)
    summary: str = ""
    css: str = ""


def build(runs: Sequence[Run], *, title: str | None = None, left_out: Sequence[str] = ()) -> str:
    """The page as text.

    Args:
        runs: At least one.
        title: Its headline; None: the experiments' names, or how many there are.
        left_out: What was asked for and is not shown, in words.

    Raises:
        DataError: jinja2 is missing.
    """
    if not find_spec("jinja2"):
        raise DataError("report: jinja2 is not installed; pip install jinja2")
    import jinja2

    entries = group(runs)
    names, one_task = [entry.name for entry in entries], len(tasks(entries)) == 1
    page = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    ).from_string(files("fastprune.report").joinpath("page.html").read_text())
    return page.render(
        title=title
        or (" · ".join(names) if len(names) <= 3 else f"{len(names)} experiments" + _on(entries * one_task)),
        entries=entries,
        rows=[row(entry) for entry in entries],
        published=any(real(run.published.get("acc")) is not None for run in runs),
        sections=list(sections(entries)),
        costs=costs(entries),
        count=len(runs),
        origins=[provenance(entry) for entry in entries],
        left_out=left_out,
        version=fastprune.__version__,
        python=platform.python_version(),
        made=datetime.now(UTC),
        series=range(SERIES),
    )


def group(runs: Iterable[Run]) -> list[Entry]:
    """Seeds of one thing together; folders of the same name are told apart by the folders they lie in."""
    by_place: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        place = run.path.parent if run.path.name.startswith("seed") else run.path
        by_place.setdefault((run.name, str(place)), []).append(run)
    places = {key: key[1].split("/") for key in by_place}
    entries = []
    for (name, place), members in by_place.items():
        label, parts = name, places[name, place]
        rivals = [other for key, other in places.items() if key[0] == name and key[1] != place]
        if rivals:
            depth = next((d for d in range(1, len(parts) + 1) if all(r[-d:] != parts[-d:] for r in rivals)), len(parts))
            tail = "/".join(parts[-depth:])
            label = tail if tail.endswith(name) else f"{name} ({tail})"
        entries.append(Entry(label, sorted(members, key=lambda run: (run.seed is None, run.seed or 0))))
    for look, entry in enumerate(entries):
        entry.look = look
    return entries


def spread(values: Sequence[float], unit: float = 1.0, digits: int = 2) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return UNKNOWN
    mean = f"{unit * statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {unit * statistics.stdev(values):.{digits}f}"


def row(entry: Entry) -> dict[str, Any]:
    """An entry's line of the summary table."""
    last, best = entry.values("acc_last"), entry.values("acc_best")
    dense = [run.points[0][1] for run in entry.runs if run.points and run.points[0][0] == "dense"]
    dense_acc = [acc for run in entry.runs if (acc := run.dense_acc) is not None]
    zeros = entry.values("zeros")
    cut = [acc for run in entry.runs for what, _, acc in run.points if what == "after the cut"]
    macs, params = entry.values("macs"), entry.values("params")
    paper = next((run.published for run in entry.runs if run.published), {})
    target, wide = real(paper.get("acc")), real(paper.get("acc_std"))
    compared = best if paper.get("which") == "best" else last
    comparable = target is not None and not any(run.remarks for run in entry.runs)
    ratio = statistics.fmean(dense) / statistics.fmean(macs) if macs and dense and min(macs) > 0 else None
    empty = statistics.fmean(zeros) / statistics.fmean(params) if zeros and params and min(params) > 0 else 0.0
    return {
        "entry": entry,
        "data": " · ".join(filter(None, (entry.task, entry.fact("arch", "model")))),
        "method": entry.fact("method"),
        "seeds": len(entry.runs),
        "dense": spread(dense_acc, 100),
        "cut": spread(cut, 100),
        "last": spread(last, 100),
        "best": spread(best, 100),
        "macs": number(statistics.fmean(macs)) if macs else UNKNOWN,
        "ratio": f"÷ {ratio:.2f}" if ratio and ratio > 1.005 else "",
        "params": number(statistics.fmean(params)) if params else UNKNOWN,
        "zeros": f"{empty:.1%} zero" if empty >= 0.001 else "",
        "published": UNKNOWN if target is None else f"{100 * target:.2f}" + (f" ± {100 * wide:.2f}" if wide else ""),
        "difference": f"{100 * (statistics.fmean(compared) - target):+.2f}" if compared and comparable else UNKNOWN,
        "source": " ".join(str(paper[key]) for key in ("where", "which") if isinstance(paper.get(key), str)),
        "states": sorted({run.state for run in entry.runs if run.state != "finished"})
        + list(dict.fromkeys(remark for run in entry.runs for remark in run.remarks)),
    }


def sections(entries: list[Entry]) -> Iterable[dict[str, Any]]:
    """The charts; a section without any says why."""
    n = iter(range(10**6))

    def ident() -> str:
        return f"f{next(n)}"

    papers = any(_paper_point(entry.first) for entry in entries)
    yield {
        "id": "macs", "title": "Accuracy against cost",
        "about": "Test accuracy over multiply-accumulates of one image: the dense network (hollow) and what came "
        "out at the end (filled), a mark per seed." + " Crosses are what the papers report." * papers,
        "figures": [f for task in tasks(entries) for f in accuracy_macs(task, ident)],
        "empty": "No run here has noted multiply-accumulates yet.",
    }  # fmt: skip
    yield {
        "id": "curves", "title": "Learning curves",
        "about": "Every seed is a line. Epochs count through all phases of a run; a dot marks the best epoch.",
        "figures": [
            f for task in tasks(entries) for key, label, percent in
            (("test_acc", "test accuracy", True), ("train_loss", "training loss", False))
            if (f := curves(task, key, label, percent, ident()))
        ],
        "empty": "No run here has finished an epoch.",
    }  # fmt: skip
    yield {
        "id": "widths", "title": "Widths per layer",
        "about": "Channels left (solid) of those there were (pale), in the network's order, mean over seeds.",
        "figures": sorted((f for entry in entries if (f := widths(entry, ident()))), key=lambda figure: figure.wide),
        "empty": "No run here has cut channels.",
    }  # fmt: skip
    yield {
        "id": "importances", "title": "Importances over time",
        "about": "How many channels have which importance, all layers together, from early (top) to late (bottom); "
        "heights grow with the square root, so that a few channels show. Below, each layer on a scale of its own.",
        "figures": [f for entry in entries for f in importances(entry, ident)],
        "empty": "No run here has recorded importances (importances.jsonl).",
    }  # fmt: skip


def tasks(entries: list[Entry]) -> list[list[Entry]]:
    """Entries by data set: only those are comparable."""
    by: dict[str, list[Entry]] = {}
    for entry in entries:
        by.setdefault(entry.task, []).append(entry)
    return list(by.values())


def accuracy_macs(entries: list[Entry], ident: Callable[[], str]) -> Iterable[Figure]:
    """Before and at the end, beside what the papers report; then, where it is known, what the cut alone did."""
    shown = [e for e in entries if any(run.points for run in e.runs)]
    ends = {id(run): [*run.points[:1], *run.points[1:][-1:]] for e in shown for run in e.runs}
    if not shown:
        return
    yield _scatter(shown, ends, "Accuracy against MACs", f"Test accuracy{_on(shown)} against MACs", True, ident())
    if any(len(run.points) > 2 for e in shown for run in e.runs):
        ways = {id(run): run.points for e in shown for run in e.runs}
        yield _scatter(
            shown, ways, "What the cut alone did", "The same, with the accuracy right after the cut", False, ident()
        )


def _scatter(
    entries: list[Entry], points: dict[int, list[Mark]], title: str, caption: str, papers: bool, ident: str
) -> Figure:
    marks = [p for e in entries for run in e.runs for p in points[id(run)]]
    published = [(e, paper) for e in entries if papers and (paper := _paper_point(e.first))]
    xs, ys = [p[1] for p in marks] + [p[0] for _, p in published], [p[2] for p in marks] + [p[1] for _, p in published]
    log = min(xs) > 0 and max(xs) > 8 * min(xs)
    x = Scale.of(xs, "multiply-accumulates" + (" (log scale)" if log else ""), pad=0.08, log=log)
    y = Scale.of(ys, "test accuracy", pad=0.08, percent=True)
    said = "; ".join(
        f"{e.name}: " + ", ".join(f"{what} {number(m)} at {100 * a:.2f}%" for what, m, a in points[id(e.first)])
        for e in entries
        if points[id(e.first)]
    )
    chart = Chart(f"{title}{_on(entries)}", said, x, y, height=300)
    for e in entries:
        for run in e.runs:
            way = points[id(run)]
            chart.line([(m, a) for _, m, a in way], f"{e.css} thin")
            for i, (what, m, a) in enumerate(way):
                style = "end" if i == len(way) - 1 else "start" if what == "dense" else "way"
                tip = f"{e.name}{_seed(run)}, {what}: {number(m)} MACs, {100 * a:.2f}%"
                chart.marker(m, a, f"{e.css} {style}", e.shape, tip, r=5 if style != "way" else 3)
    for e, (m, a) in published:
        px, py = chart.at(m, a)
        tip = f"{e.name}, published: {number(m)} MACs, {100 * a:.2f}%"
        chart.add("path", f"paper {e.css}", tip, d=f"M{px - 5:.1f} {py - 5:.1f}l10 10m0 -10l-10 10")
    return Figure(chart.svg(ident), f"{caption}.", entries)


def _paper_point(run: Run) -> tuple[float, float] | None:
    """(MACs, accuracy) that the paper reports; MACs as such, or by the speedup."""
    acc, macs, speedup = (real(run.published.get(key)) for key in ("acc", "macs", "speedup"))
    if macs is None and speedup and run.points:
        macs = run.points[0][1] / speedup
    return None if acc is None or not macs or run.remarks else (macs, acc)


def curves(entries: list[Entry], key: str, label: str, percent: bool, ident: str) -> Figure | None:
    lines = [(e, run, _through(run, key)) for e in entries for run in e.runs]
    lines = [(e, run, line) for e, run, line in lines if line]
    if not lines:
        return None
    values = [v for _, _, line in lines for _, v in line]
    log = not percent and min(values) > 0 and max(values) > 30 * min(values)
    x = Scale(0.5, max(1.5, max(x for _, _, line in lines for x, _ in line) + 0.5), "epoch")
    y = Scale.of(values, label + (" (log scale)" if log else ""), percent=percent, log=log)
    shown = list({e.name: e for e, _, _ in lines}.values())
    said = "; ".join(
        f"{e.name}{_seed(run)}: {_say(line[-1][1], percent)} at epoch {line[-1][0]:g}" for e, run, line in lines
    )
    chart = Chart(f"{label.capitalize()} by epoch{_on(shown)}", f"At the end: {said}.", x, y)
    for e, run, line in lines:
        done = 0.0
        for phase in run.phases[:-1]:
            done += len(phase.rows)
            if done and phase.rows:
                chart.bar(done + 0.5, done + 0.5, y.low, y.high, "phase", f"{run.name}: end of {phase.name}")
        chart.line(line, e.css, f"{e.name}{_seed(run)}: {_say(line[-1][1], percent)} at the end")
        if percent:
            at, best = max(line, key=lambda p: p[1])
            chart.marker(
                at, best, f"{e.css} end", e.shape, f"{e.name}{_seed(run)}: best {_say(best, True)}, epoch {at:g}", 3.2
            )
    return Figure(chart.svg(ident), f"{label.capitalize()}{_on(shown)}.", shown)


def _through(run: Run, key: str) -> list[tuple[float, float]]:
    """(epoch from 1 through all phases, value)."""
    line, done = [], 0.0
    for phase in run.phases:
        line += [(done + epoch + 1, value) for epoch, value in phase.curve(key)]
        done += len(phase.rows)
    return line


def _say(value: float, percent: bool) -> str:
    return f"{100 * value:.2f}%" if percent else number(value)


def _seed(run: Run) -> str:
    return "" if run.seed is None else f", seed {run.seed}"


def _on(entries: list[Entry]) -> str:
    return f" on {entries[0].task}" if entries and entries[0].task else ""


def widths(entry: Entry, ident: str) -> Figure | None:
    runs = [run for run in entry.runs if run.kept]
    if not runs:
        return None
    layers = list(dict.fromkeys(layer for run in runs for layer in run.kept))
    mean = {}
    for layer in layers:
        pairs = [run.kept[layer] for run in runs if layer in run.kept]
        mean[layer] = statistics.fmean(p[0] for p in pairs), statistics.fmean(p[1] for p in pairs), pairs
    most = max(before for _, before, _ in mean.values())
    wide = len(layers) > 27  # more do not have room for their names in half of the page
    step = max(9, min(40, (794 if wide else 354) // len(layers)))
    left, total = sum(m[0] for m in mean.values()), sum(m[1] for m in mean.values())
    said = "; ".join(f"{layer}: {m[0]:g} of {m[1]:g}" for layer, m in mean.items())
    named = step >= 13
    names = [layer if len(layer) <= 18 else f"…{layer[-17:]}" for layer in layers]
    below = 16 + round(6.3 * max(map(len, names))) if named else 24
    x = Scale(0, len(layers), "" if named else f"{len(layers)} layers, first to last", ticks=False)
    y = Scale(0, most * 1.04, "channels")
    width = max(860 if wide else 420, 66 + step * len(layers))
    chart = Chart(
        f"Channels per layer of {entry.name}", f"{left:g} of {total:g} channels left. {said}.", x, y,
        width=width, height=190 + below, below=below,
    )  # fmt: skip
    for i, (layer, (now, before, pairs)) in enumerate(mean.items()):
        seeds = "" if len(pairs) < 2 else f" (seeds: {', '.join(str(p[0]) for p in pairs)})"
        tip = f"{layer}: {now:g} of {before:g} left{seeds}"
        chart.bar(i + 0.12, i + 0.88, 0, before, f"before {entry.css}", tip)
        chart.bar(i + 0.12, i + 0.88, 0, now, f"after {entry.css}", tip)
        if named:
            px, py = chart.at(i + 0.5, 0)
            turn = f"rotate(-90 {px + 3.6:.1f} {py + 8:.1f})"
            chart.add("text", "tick", text=names[i], x=px + 3.6, y=py + 8, text_anchor="end", transform=turn)
    share = f"{entry.name}: {left:.0f} of {total:.0f} channels left ({left / total:.0%})."
    return Figure(chart.svg(ident), share, wide=wide)


def importances(entry: Entry, ident: Callable[[], str]) -> Iterable[Figure]:
    """A figure of the first seed for each phase that has some."""
    run = next((run for run in entry.runs if run.histograms), None)
    if run is None:
        return
    for phase in dict.fromkeys(h.phase for h in run.histograms):
        yield ridges(entry, run, [h for h in run.histograms if h.phase == phase], ident())


def ridges(entry: Entry, run: Run, histograms: list[Histogram], ident: str) -> Figure:
    low, high, log = _range(histograms)
    moments = _moments(histograms, MOST_RIDGES)
    x = Scale(low, high, "importance" + (" (log scale)" if log else ""), log=log)
    edges = histograms[0].edges
    if len(edges) > 2 * BINS or edges[-1] != high or any(h.edges != edges for h in histograms):
        edges = _edges(low, high, log, BINS)
    sums = {m: rebinned([h for h in histograms if h.epoch == m], edges) for m in moments}
    most = max(1.0, *(max(counts) for counts in sums.values()))
    n, overlap = len(moments), 2.4
    y = Scale(0, n + overlap, "epoch", ticks=False)
    phase = histograms[0].phase
    first, last = (_shape(sums[m], edges) for m in (moments[0], moments[-1]))
    title = f"Importances of {entry.name}{_seed(run)}" + (f", {phase}" if phase else "")
    said = f"Epoch {moments[0] + 1:g}: {first}. Epoch {moments[-1] + 1:g}: {last}."
    chart = Chart(title, said, x, y, height=80 + round(24 * (n + overlap)))
    for i, moment in enumerate(moments):
        base = n - 1 - i
        heights = [base + overlap * math.sqrt(c / most) for c in sums[moment]]
        outline = [chart.at(edges[0], base)]
        for j, height in enumerate(heights):
            outline += [chart.at(edges[j], height), chart.at(edges[j + 1], height)]
        outline.append(chart.at(edges[-1], base))
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in outline)
        chart.add(
            "polygon", f"ridge {entry.css}", f"epoch {moment + 1:g}: {_shape(sums[moment], edges)}", points=points
        )
        px, py = chart.at(low, base)
        chart.add("text", "tick", text=f"{moment + 1:g}", x=px - 6, y=py, text_anchor="end")
    groups = list(dict.fromkeys(h.group for h in histograms))
    caption = f"{title}: {number(sum(sums[moments[-1]]))} scores in {len(groups)} groups."
    figure = Figure(chart.svg(ident), caption, css=entry.css)
    if len(groups) > 1:
        by_group = {group: [h for h in histograms if h.group == group] for group in groups}
        figure.layers = [layer(group, of) for group, of in by_group.items()]
        epochs = [f"{m + 1:g}" for m in _moments(histograms, MOST_MOMENTS)]
        when = f"epochs {', '.join(epochs)} from top to bottom" if len(epochs) > 1 else f"epoch {epochs[0]}"
        figure.summary = f"each of the {len(groups)} groups, {when}; range, number of scores"
    return figure


def layer(group: str, histograms: list[Histogram]) -> Layer:
    """The histograms of one group, one below the other, the last one in full colour."""
    low, high, log = _range(histograms)
    moments, edges = _moments(histograms, MOST_MOMENTS), _edges(low, high, log, LAYER_BINS)
    sums = [rebinned([h for h in histograms if h.epoch == m], edges) for m in moments]
    most, wide, tall = max(1.0, *map(max, sums)), 10, 48  # of a bin, of the highest one
    bottom, paths = tall + 22 * (len(sums) - 1) + 2, []
    for i, counts in enumerate(sums):
        steps, at, run = [], 0, 0
        for height in (round(tall * math.sqrt(c / most)) for c in counts):
            if height != at:
                steps.append(f"h{run}" * (run > 0) + f"v{at - height}")
                at, run = height, 0
            run += wide
        base = bottom - 22 * (len(sums) - 1 - i) - 1
        last = " after" if i == len(sums) - 1 else ""
        paths.append(f'<path class="ridge{last}" d="M0 {base}{"".join(steps)}h{run}V{base}z"/>')
    said = f"{group}, epoch {moments[0] + 1:g}: {_shape(sums[0], edges)}"
    if len(moments) > 1:
        said += f"; epoch {moments[-1] + 1:g}: {_shape(sums[-1], edges)}"
    box = f'role="img" viewBox="-1 0 {wide * LAYER_BINS + 2} {bottom}" aria-label="{escape(said)}"'
    about = f"{number(low)} to {number(high)}, {number(sum(sums[-1]))}"
    return Layer(f"<svg {box}>{''.join(paths)}</svg>", group, about)


def _range(histograms: list[Histogram]) -> tuple[float, float, bool]:
    """Ends of a scale for nearly all scores, and whether it is logarithmic."""
    low, high = min(h.edges[0] for h in histograms), _most(histograms)
    return low, high, low > 0 and all(_geometric(h.edges) for h in histograms)


def _edges(low: float, high: float, log: bool, bins: int) -> list[float]:
    return [low * (high / low) ** (i / bins) if log else low + i * (high - low) / bins for i in range(bins + 1)]


def _moments(histograms: list[Histogram], most: int) -> list[float]:
    """Epochs that have some: first, last and evenly between."""
    moments = sorted({h.epoch for h in histograms})
    last = len(moments) - 1
    return moments if last < most else [moments[round(i * last / (most - 1))] for i in range(most)]


def _most(histograms: list[Histogram], share: float = 0.998) -> float:
    """A value that nearly all channels stay below: a few outliers would squeeze the others."""
    bins = sorted((b, c) for h in histograms for b, c in zip(h.edges[1:], h.counts, strict=True))
    left = share * sum(c for _, c in bins)
    for edge, count in bins:
        left -= count
        if left <= 0 and count:
            return edge
    return bins[-1][0]


def _geometric(edges: list[float]) -> bool:
    if edges[0] <= 0 or len(edges) < 3:
        return False
    steps = [b / a for a, b in pairwise(edges)]
    return max(steps) - min(steps) < 1e-3 * max(steps) and steps[0] > 1.01


def rebinned(histograms: Iterable[Histogram], edges: Sequence[float]) -> list[float]:
    """Counts over common edges: each count goes to the bins it overlaps, in proportion; what is beyond to the ends."""
    counts = [0.0] * (len(edges) - 1)
    for h in histograms:
        for (a, b), count in zip(pairwise(h.edges), h.counts, strict=True):
            first = max(0, min(bisect_right(edges, a) - 1, len(counts) - 1))
            last = max(first, min(bisect_left(edges, b) - 1, len(counts) - 1))
            ends = [a, *edges[first + 1 : last + 1], b]
            for k, (start, end) in enumerate(pairwise(ends), first):
                counts[k] += count * (end - start) / (b - a)
    return counts


def _shape(counts: Sequence[float], edges: Sequence[float]) -> str:
    """Quartiles of a histogram, in words."""
    total, seen, said = sum(counts), 0.0, []
    if not total:
        return "no channels"
    targets = iter((0.25, 0.5, 0.75))
    target = next(targets)
    for i, count in enumerate(counts):
        seen += count
        while target is not None and seen >= target * total:
            said.append(number((edges[i] + edges[i + 1]) / 2))
            target = next(targets, None)
    return f"a quarter of the channels below {said[0]}, half below {said[1]}, three quarters below {said[2]}"


def costs(entries: list[Entry]) -> list[dict[str, Any]]:
    """Time of a training step by phase; against a phase without a method on the same network, data and batch."""
    rows: list[dict[str, Any]] = []
    for entry in entries:
        for name in dict.fromkeys(phase.name for run in entry.runs for phase in run.phases):
            phases = [phase for run in entry.runs for phase in run.phases if phase.name == name]
            times = [t for phase in phases for t in phase.step_ms()]
            if not times:
                continue
            facts, method = entry.first.facts, phases[0].method
            rates = [v for phase in phases for _, v in phase.curve("images_per_s")]
            same = tuple(
                str(facts.get(key))
                for key in ("dataset", "arch", "batch_size", "precision", "device", "device_name", "threads")
            )
            dense = name == "train" and facts.get("arch") is not None
            rows.append(
                {
                    "entry": entry, "phase": name, "method": method or UNKNOWN, "ms": statistics.median(times),
                    "p20": _quantile(times, 0.2), "p80": _quantile(times, 0.8), "epochs": len(times),
                    "images": statistics.median(rates) if rates else None,
                    "plain": dense and method in ("none", "ucs"), "same": same if dense else None,
                    "against": None,
                }
            )  # fmt: skip
    for r in rows:
        plain = [p["ms"] for p in rows if p["plain"] and p["same"] == r["same"]]
        if plain and r["same"] and not r["plain"]:
            r["against"] = r["ms"] / statistics.median(plain)
    longest = max((r["p80"] for r in rows), default=1.0)
    for r in rows:
        r["share"] = 100 * r["ms"] / longest
        r |= {key: f"{r[key]:,.0f}" if r[key] >= 100 else f"{r[key]:.3g}" for key in ("ms", "p20", "p80")}
    return rows


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def provenance(entry: Entry) -> dict[str, Any]:
    """What is known of where an entry's runs come from: what they share, then what each has of its own."""
    facts = [_facts(run) for run in entry.runs]
    shared = {key: value for key, value in facts[0].items() if all(f.get(key) == value for f in facts[1:])}
    own = [
        (run, ", ".join(f"{key} {value}" for key, value in f.items() if key not in shared))
        for run, f in zip(entry.runs, facts, strict=True)
    ]
    return {"entry": entry, "shared": shared, "own": own}


def _place(path: str | Path) -> str:
    """Seen from here, or its end: the page is sent to people whom the folders of this machine do not concern."""
    seen = os.path.relpath(path)
    return "/".join(Path(path).parts[-3:]).lstrip("/") if seen.startswith("..") else seen


def _facts(run: Run) -> dict[str, str]:
    facts: dict[str, str] = {}
    for key in FACTS:
        value, name = run.facts.get(key), key.replace("_", " ")
        for inner, v in value.items() if isinstance(value, dict) else ((None, value),):
            if isinstance(v, str | int | float) and v != "":
                text = _place(v) if inner in ("root", "path") else str(v)
                facts[f"{name} {inner}".replace("_", " ") if inner else name] = text[:600]
    facts["folder"] = _place(run.path)
    if run.modified:
        facts["last written"] = f"{run.modified:%Y-%m-%d %H:%M} UTC"
    seconds = [phase.result["seconds"] for phase in run.phases if "seconds" in phase.result]
    return facts | ({"training time": f"{sum(seconds):.0f} s"} if seconds else {})
