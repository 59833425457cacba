"""docs/results/gpu.md: what is wanted of a GPU, the goals, and what was measured: ``python -m bench.gpu_page``.

Reads the rows of GPUs in bench/results/*/ that bench/gpu_check.sh writes.  What has none says so; nothing is estimated.
``--summary ROWS...`` prints instead how many goals those files reach, and which they miss.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import harness, table
from bench.e2e.methods import COMPILED as COMPILED_STEP
from bench.e2e.methods import EAGER as EAGER_STEP
from bench.e2e.methods import GOALS as STEP_GOALS
from bench.ops.batch_norm_act import COMPILED, EAGER, GATES, PER_CHANNEL

PAGE = harness.ROOT / "docs" / "results" / "gpu.md"
BACKENDS = ("triton", "cuda")
SHAPES = ("256x64x112x112", "256x64x56x56", "256x256x56x56", "256x128x28x28", "256x512x28x28", "256x256x14x14")
SHAPES += ("256x1024x14x14", "256x512x7x7", "256x2048x7x7")  # of ResNet-50 at batch 256
ENDS = ("16x128x32x32", "64x256x112x112")  # few channels with large planes, where published kernels lose to PyTorch
LAYOUTS = ("nchw", "nhwc")
STEPS = {"resnet56": 128, "resnet50": 256}
FILES = ("batch_norm_act", "methods", "channel_gate", "filter_norm", "growing_sgd", "gram_penalty", "masked_conv2d")
FILES += ("statistics", "growing", "step")  # what gpu_check writes
METHODS = ("greg-1", "tpp", "rni", "taylor-gate")
NOTHING = "not yet measured"
HEAD = """\
# On a GPU

Written by `python -m bench.gpu_page` from the rows of `bench/gpu_check.sh`, which does everything on a machine with a
GPU in ten minutes. What has no row is not yet measured; nothing here is estimated. What is known of the kernels without
a GPU, registers and load widths, is in [aot.md](aot.md).

**batch_norm_act**: forward and backward with ReLU in training, bfloat16, by the faster of our backends. *Share of a
copy's GB/s*: bytes that the kernels move, by their own count, per time, over those of a device copy of x in the same
run. *x eager* and so on: how many times faster than cuDNN's batch norm and an in-place ReLU, than the same under
torch.compile, and than one Triton program per channel (`bench/ops/per_channel.py`). *With gate statistics*: time over
that without.

**Steps**: whole training steps, autocast to bfloat16, over plain training (`bench/e2e/methods.py`)."""


@dataclass(frozen=True)
class Wanted:
    """A number and its goal: ``found`` is None where it was not measured."""

    what: str
    column: str
    goal: float
    at_most: bool
    found: float | None

    @property
    def reached(self) -> bool | None:
        if self.found is None:
            return None
        return self.found <= self.goal if self.at_most else self.found >= self.goal

    @property
    def excess(self) -> float:
        """How far beyond the goal: above 1 is missed."""
        return self.found / self.goal if self.at_most else self.goal / self.found

    def cell(self) -> str:
        if self.found is None:
            return NOTHING
        return f"{self.found:.3f}" + ("" if self.reached else " **missed**")


def _match(rows: Sequence[dict], bench: str, impl: str, **case: object) -> dict | None:
    """The row of a case; what is not named may be anything."""
    for row in rows:
        if row["bench"] == bench and row["impl"] == impl and case.items() <= row["case"].items():
            return row
    return None


def _ratio(row: dict | None, over: str) -> float | None:
    return row["speedup"][over]["ratio"] if row and over in row.get("speedup", {}) else None


def norm_goals(rows: Sequence[dict]) -> Iterator[list[Wanted]]:
    """Of batch_norm_act with ReLU, forward and backward, in bfloat16, by the faster backend, per shape and layout."""
    for shape in (*SHAPES, *ENDS):
        for layout in LAYOUTS:
            case = {"what": "relu", "shape": shape, "dtype": "bfloat16", "layout": layout}
            ours = [row for b in BACKENDS if (row := _match(rows, "batch_norm_act", b, **case))]
            best = min(ours, key=lambda row: row["us"], default=None)
            gates = _match(rows, "batch_norm_act", best["impl"] + GATES, **case) if best else None
            cost = _ratio(gates, best["impl"]) if best else None
            what = f"{shape} {layout}" + (f", {best['impl']}" if best else "")
            copied = best.get("moved_of_copy", best.get("of_copy")) if best else None
            yield [
                Wanted(what, "share of a copy's GB/s", 0.9, False, copied),
                *(Wanted(what, f"x {over}", 1.0, False, _ratio(best, over)) for over in (EAGER, COMPILED, PER_CHANNEL)),
                Wanted(what, "with gate statistics, time", 1.02, True, 1 / cost if cost else None),
            ]


def step_goals(rows: Sequence[dict]) -> Iterator[list[Wanted]]:
    """Of training steps with a method on; a list per network, layout and method."""
    for net, batch in STEPS.items():
        for layout in LAYOUTS:
            for method in METHODS:
                case = {"net": net, "batch": batch, "layout": layout, "amp": True}
                plain, compiled = (_match(rows, "methods", impl, **case) for impl in (method, f"{method}+compile"))
                what = f"{net} {layout} {method}"
                cost = plain["cost"].get(EAGER_STEP) if plain else None
                over = compiled["cost"].get(COMPILED_STEP) if compiled else None
                found = [
                    Wanted(what, "time over eager", STEP_GOALS[EAGER_STEP], True, cost and cost["time"]["ratio"]),
                    Wanted(what, "peak memory over eager", 1.0, True, cost and cost["peak"]),
                ]
                if method != "taylor-gate":
                    found.append(
                        Wanted(
                            what,
                            "compiled, time over torch.compile",
                            STEP_GOALS[COMPILED_STEP],
                            True,
                            over and over["time"]["ratio"],
                        )
                    )
                yield found


def _table(title: str, groups: Sequence[list[Wanted]]) -> list[str]:
    columns = list(dict.fromkeys(w.column for group in groups for w in group))
    goals = {w.column: f"at {'most' if w.at_most else 'least'} {w.goal:g}" for group in groups for w in group}
    text = [table.line([title, *columns]), table.line(["---"] + ["---:"] * len(columns))]
    text.append(table.line(["goal", *(goals[column] for column in columns)]))
    for group in groups:
        cells = {w.column: w.cell() for w in group}
        text.append(table.line([group[0].what, *(cells.get(column, "") for column in columns)]))
    return text


def wanted(rows: Sequence[dict]) -> list[Wanted]:
    return [w for groups in (norm_goals(rows), step_goals(rows)) for group in groups for w in group]


def summary(rows: Sequence[dict]) -> str:
    """How many goals are reached, and what misses, the worst first."""
    goals = wanted(rows)
    missed = sorted((w for w in goals if w.reached is False), key=lambda w: w.excess, reverse=True)
    reached = sum(w.reached is True for w in goals)
    left = len(goals) - reached - len(missed)
    text = f"{reached} goals reached, {len(missed)} missed, {left} {NOTHING}, of {len(goals)}"
    return "\n".join([text, *(f"    missed: {w.what}: {w.column} {w.found:.3f}, goal {w.goal:g}" for w in missed)])


def page(rows: Sequence[dict]) -> str:
    """docs/results/gpu.md from rows."""
    devices = sorted({row["provenance"]["device"] for row in rows})
    text = [HEAD]
    for device in devices or [None]:
        mine = [row for row in rows if row["provenance"]["device"] == device]
        text += ["", f"## {device or 'No GPU yet'}", "", *summary(mine).splitlines()[:1], ""]
        text += _table("batch_norm_act", list(norm_goals(mine)))
        text += ["", *_table("step", list(step_goals(mine)))]
        groups: dict[str, list[dict]] = {}
        for row in mine:
            groups.setdefault(row["bench"], []).append(row)
        for group in groups.values():
            text += ["", *table.render(group).rstrip("\n").splitlines()]
    return "\n".join(text) + "\n"


def gpu_rows(paths: Sequence[Path]) -> list[dict]:
    paths = [path for path in paths if path.stem in FILES]
    return [row for row in table.latest(paths) if "cuda" in row["provenance"]]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--summary", type=Path, nargs="*", default=None, metavar="ROWS", help="jsonl files; writes nothing")
    p.add_argument("--page", type=Path, default=PAGE)
    args = p.parse_args()
    try:
        if args.summary is not None:
            print(summary(table.latest(args.summary)))
        else:
            args.page.write_text(page(gpu_rows(sorted(harness.RESULTS.glob("*/*.jsonl")))))
    except (OSError, ValueError) as error:
        raise SystemExit(f"bench.gpu_page: {error}") from None


if __name__ == "__main__":
    main()
