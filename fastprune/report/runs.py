"""Read run folders as they are found: finished, still going, killed, damaged.

A run is a folder with a ``metrics.jsonl`` or a ``run.json``: of ``fastprune run`` (docs/recipes.md says what is in it),
of :func:`fastprune.train` and :func:`fastprune.prune_finetune`, or of your own loop with a ``MetricsLog``.  Files are
material to be shown, never trusted: a value of the wrong type is left out, a line that is no JSON is counted.
"""

from __future__ import annotations

import json
import math
import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 256 << 20  # of one file
MOST_RUNS = 200
_FILES = ("metrics.jsonl", "run.json")
Mark = tuple[str, float, float]  # what, MACs, accuracy
_ACC, _EPOCH, _STEP = "test_acc", "epoch", "step"


@dataclass
class Histogram:
    """How many channels of a group have an importance between two edges, at one moment."""

    phase: str
    epoch: float
    group: str
    edges: list[float]  # one more than counts, ascending
    counts: list[float]


@dataclass
class Phase:
    """One part of a run, such as the training or the fine-tuning.

    Attributes:
        rows: Of the log, one per epoch, in order.
        planned: Epochs it was to have, if known.
        method: In each of its steps, if known; "none".
        result: ``acc_last``, ``acc_best``, ``macs``, ``params``, ``seconds``: those known.
        kept: Layer to (channels left, channels before), where it cut.
    """

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    planned: int | None = None
    method: str | None = None
    result: dict[str, float] = field(default_factory=dict)
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) of a column, where there is one."""
        pairs = ((real(row.get(_EPOCH)), real(row.get(key))) for row in self.rows)
        return [(e, v) for e, v in pairs if e is not None and v is not None]

    def step_ms(self) -> list[float]:
        """Mean milliseconds of a training step, of each epoch."""
        times, before = [], 0.0
        for row in self.rows:
            step, seconds = real(row.get(_STEP)), real(row.get("seconds"))
            if step is not None and seconds is not None and step > before and seconds > 0:
                times.append(1e3 * seconds / (step - before))
            before = step if step is not None else before
        return times


@dataclass
class Run:
    """A run folder, read.

    Attributes:
        name: What runs that differ only in their seed share.
        phases: In order.
        points: (what, MACs, accuracy) on the way: dense, after the cut, at the end.
        published: What the paper says, as in ``run.json``.
        facts: What the run says of itself, flat: method, version, device and so on.
        remarks: What makes its numbers not comparable with published ones.
        state: "finished", or in words how far it came.
        problems: What could not be read, in words.
    """

    path: Path
    name: str
    seed: int | None = None
    phases: list[Phase] = field(default_factory=list)
    points: list[Mark] = field(default_factory=list)
    published: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    histograms: list[Histogram] = field(default_factory=list)
    state: str = "finished"
    remarks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    modified: datetime | None = None

    @property
    def kept(self) -> dict[str, tuple[int, int]]:
        """Widths of all layers that were cut, after the last cut and before the first."""
        widths: dict[str, tuple[int, int]] = {}
        for phase in self.phases:
            for layer, (now, before) in phase.kept.items():
                widths[layer] = (now, max(before, widths.get(layer, (0, 0))[1]))
        return widths if any(now < before for now, before in widths.values()) else {}

    @property
    def dense_acc(self) -> float | None:
        """Before anything was cut."""
        if self.points and self.points[0][0] == "dense":
            return self.points[0][2] if len(self.points) > 1 else None
        first = self.phases[0].result if self.phases else {}
        return first.get("acc_before") if self.phases and self.phases[0].name == "prune" else None

    def last(self, key: str) -> float | None:
        """What the last phase that knows has as its result."""
        return next((p.result[key] for p in reversed(self.phases) if key in p.result), None)


def find(folder: str | os.PathLike) -> list[Path]:
    """The run folders at and below ``folder``, sorted; none for what is no folder."""
    root = Path(folder)
    if not root.is_dir():
        return []
    found = []
    for where, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if any(f in files for f in _FILES):
            found.append(Path(where))
            if len(found) > MOST_RUNS:
                raise ValueError(f"report: more than {MOST_RUNS} runs below {root}; name the ones to show")
    return found


def read(path: Path) -> Run:
    """Read one run folder; what is missing or damaged is told in ``problems``."""
    path = path.resolve()
    seed = re.fullmatch(r"seed(\d{1,9})", path.name)
    run = Run(path, path.parent.name if seed else path.name, int(seed[1]) if seed else None)
    about, result = object_of(run, "run.json"), object_of(run, "result.json")
    ended = result.get("finished") is True if about or result else None
    lines = list(_lines(run, "metrics.jsonl"))
    times = [os.path.getmtime(path / f) for f in _FILES if (path / f).is_file()]
    run.modified = datetime.fromtimestamp(max(times), UTC) if times else None
    _read_recipe(run)
    _read_about(run, about)
    _read_rows(run, lines)
    for row in _lines(run, "importances.jsonl"):
        _read_histogram(run, row)
    _read_result(run, result)
    for phase in run.phases:
        accs = [acc for _, acc in phase.curve(_ACC)]
        if accs:
            phase.result.setdefault("acc_last", accs[-1])
            phase.result.setdefault("acc_best", max(accs))
        seconds = [v for _, v in phase.curve("seconds")]
        if seconds:
            phase.result.setdefault("seconds", sum(seconds))
    _find_points(run)
    _find_state(run, ended)
    return run


def real(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def _text_of(run: Run, name: str) -> str:
    path = run.path / name
    try:
        if not path.is_file():
            return ""
        if (size := path.stat().st_size) > MOST_BYTES:
            run.problems.append(f"{name}: {size >> 20} MB are too many to read")
            return ""
        return path.read_text(errors="replace")
    except OSError as error:
        run.problems.append(f"{name}: cannot be read: {error.strerror}")
        return ""


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def object_of(run: Run, name: str) -> dict[str, Any]:
    text = _text_of(run, name)
    value = _parsed(text) if text else {}
    if value is None:
        run.problems.append(f"{name}: is no JSON object")
    return value or {}


def _lines(run: Run, name: str) -> Iterator[dict[str, Any]]:
    bad = 0
    for line in _text_of(run, name).splitlines():
        if line.strip():
            row = _parsed(line)
            bad += row is None
            if row is not None:
                yield row
    if bad:
        run.problems.append(f"{name}: {bad} line{'s' * (bad > 1)} cut off or damaged, left out")


def _read_rows(run: Run, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "call" in row:  # fastprune.train and prune_finetune begin with what they were asked
            _read_call(run, row)
        elif _EPOCH not in row:  # what your own loop has to say
            run.facts |= row
            phase = _phase(run, str(row.get("phase", run.phases[-1].name if run.phases else "train")))
            phase.kept = _widths(row.get("kept")) or phase.kept
            phase.result |= {key: value for key in ("macs", "params") if (value := real(row.get(key))) is not None}
        else:
            name = str(row.get("phase", run.phases[-1].name if run.phases else "train"))
            phase = _phase(run, name)
            epoch = real(row[_EPOCH])
            while epoch is not None and phase.rows and (real(phase.rows[-1].get(_EPOCH)) or 0) >= epoch:
                phase.rows.pop()  # killed and resumed from before this row, or run anew in the same folder
            phase.rows.append(row)


def _phase(run: Run, name: str) -> Phase:
    for phase in run.phases:
        if phase.name == name:
            return phase
    run.phases.append(Phase(name))
    return run.phases[-1]


def _read_call(run: Run, row: dict[str, Any]) -> None:
    pruning = row["call"] == "prune_finetune"
    phase = _phase(run, "finetune" if pruning else "train")
    planned, seed = real(row.get("epochs")), real(row.get("seed"))
    phase.planned = int(planned) if planned else None
    phase.method = "none" if pruning else _word(row.get("method"))
    run.seed = int(seed) if seed is not None else run.seed
    run.facts |= row
    phase.kept = _widths(row.get("kept"))
    dense, pruned = (row.get(key) if isinstance(row.get(key), dict) else {} for key in ("dense", "pruned"))
    run.points = [
        (what, macs, acc)
        for what, of in (("dense", dense), ("after the cut", pruned))
        if (macs := real(of.get("macs"))) is not None and (acc := real(of.get("acc"))) is not None
    ]
    phase.result |= {key: value for key in ("macs", "params") if (value := real(pruned.get(key))) is not None}


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _widths(value: Any) -> dict[str, tuple[int, int]]:
    """Layer to (left, before) of ``{layer: [left, before]}``; what has another form is left out."""
    widths = {}
    for layer, pair in value.items() if isinstance(value, dict) else ():
        if isinstance(pair, list) and len(pair) == 2:
            left, before = map(real, pair)
            if left is not None and before is not None and 0 <= left <= before and before > 0:
                widths[str(layer)] = (int(left), int(before))
    return widths


def _read_histogram(run: Run, row: dict[str, Any]) -> None:
    edges, counts = row.get("edges"), row.get("counts")
    if not (isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1 > 1):
        return
    edges, counts, epoch = [real(e) for e in edges], [real(c) for c in counts], real(row.get(_EPOCH))
    if None in edges or None in counts or epoch is None or min(counts) < 0:
        return
    if all(a < b for a, b in pairwise(edges)):
        run.histograms.append(Histogram(str(row.get("phase", "")), epoch, str(row.get("group", "")), edges, counts))


def _read_recipe(run: Run) -> None:
    """Planned epochs and methods of the phases, and what the network is."""
    run.recipe = _text_of(run, "recipe.yaml")[:20_000]
    try:
        recipe = yaml.safe_load(run.recipe)
    except (yaml.YAMLError, RecursionError, ValueError):
        run.problems.append("recipe.yaml: is no YAML")
        return
    if not isinstance(recipe, dict):
        return
    for name, about in recipe.items():
        if isinstance(about, dict) and "epochs" in about:
            phase = _phase(run, str(name))
            planned = real(about["epochs"])
            phase.planned = None if planned is None else int(planned)
            phase.method = _word(about.get("method")) or "none"
            if phase.method != "none":
                run.facts["method"] = phase.method
            run.facts |= {key: about[key] for key in ("batch_size", "lr") if key in about and key not in run.facts}
    for key, part, inner in (
        ("arch", "model", "name"),
        ("dataset", "data", "name"),
        ("precision", "engine", "precision"),
    ):
        if isinstance(recipe.get(part), dict):
            run.facts[key] = recipe[part].get(inner)


def _read_about(run: Run, about: dict[str, Any]) -> None:
    seed = real(about.get("seed"))
    run.seed = int(seed) if seed is not None else run.seed
    run.name = _word(about.get("recipe")) or run.name
    run.facts |= about
    order = [str(name) for name in about["phases"]] if isinstance(about.get("phases"), list) else []
    run.phases = [_phase(run, name) for name in order] + [phase for phase in run.phases if phase.name not in order]
    if about.get("tiny") is True:
        run.remarks.append("tiny form, for trials")
    if isinstance(changes := about.get("set"), dict) and changes:
        short = (f"{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in changes.items())
        run.facts["changed"] = ", ".join(short)
        run.remarks.append(f"changed: {textwrap.shorten(run.facts['changed'], 90, placeholder=' …')}")
    run.published = about["published"] if isinstance(about.get("published"), dict) else {}


def _read_result(run: Run, result: dict[str, Any]) -> None:
    run.facts["dense"] = result.get("dense")
    phases = result.get("phases")
    for name, values in phases.items() if isinstance(phases, dict) else ():
        if isinstance(values, dict):
            phase = _phase(run, str(name))
            numbers = {key: real(value) for key, value in values.items()}
            phase.result |= {key: value for key, value in numbers.items() if value is not None}
            phase.kept = _widths(values.get("kept"))


def _find_points(run: Run) -> None:
    ended = [phase for phase in run.phases if "macs" in phase.result and _acc(phase) is not None]
    if run.points:  # a call of prune_finetune: before and after the cut
        ended = ended[-1:]
    elif ended and ended[0].name != "train" and "acc_before" in ended[0].result and (macs := _dense_macs(run)):
        run.points = [("dense", macs, ended[0].result["acc_before"])]
    names = {"train": "dense", "prune": "after the cut", "finetune": "fine-tuned", "scratch": "trained from scratch"}
    run.points += [(names.get(p.name, p.name), p.result["macs"], _acc(p)) for p in ended]


def _acc(phase: Phase) -> float | None:
    """Of the network that it left."""
    return phase.result.get("acc", phase.result.get("acc_last"))


def _dense_macs(run: Run) -> float | None:
    """MACs of the network that the run began with; of older runs, of the one that another run trained."""
    dense, base = run.facts.get("dense"), run.facts.get("base")
    if isinstance(dense, dict) and (macs := real(dense.get("macs"))):
        return macs
    if not isinstance(base, dict) or not isinstance(base.get("path"), str):
        return None
    text = _text_of(run, os.path.join(os.path.dirname(os.path.abspath(base["path"])), "result.json"))
    phases = (_parsed(text) or {}).get("phases")
    train = phases.get("train") if isinstance(phases, dict) else None
    return real(train.get("macs")) if isinstance(train, dict) else None


def _find_state(run: Run, ended: bool | None) -> None:
    """``ended``: what the run says itself; None: nothing."""
    if not any(phase.rows or phase.result for phase in run.phases):
        run.state = "no epoch finished yet"
        return
    began = [phase for phase in run.phases if phase.rows or phase.result]
    phase, done = began[-1], len(began[-1].rows)
    if ended is None and phase.planned is None:
        run.state = f"{done} epochs, no end recorded"
    elif ended is False or (ended is None and done < phase.planned):
        planned = "" if phase.planned is None else f" of {phase.planned}"
        run.state = f"unfinished: {phase.name}, epoch {done}{planned}"
