"""Markdown tables from result files: ``python -m bench.table bench/results/amd-epyc-2c/batch_norm_act.jsonl``.

One line per case and one column per implementation: microseconds, and how many times faster it is than its baselines
(ratio of the medians).  Of several rows for a case the last one counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path


def latest(paths: Iterable[Path]) -> list[dict]:
    """Rows of the files; of those with the same device, bench, case and implementation only the newest.

    Raises:
        ValueError: A line that is no row, by file and number.
    """
    found: dict[tuple, dict] = {}
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                key = (path.parent.name, row["bench"], json.dumps(row["case"], sort_keys=True), row["impl"])
                older = key in found and found[key]["provenance"]["date"] > row["provenance"]["date"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"table: {path.name}:{number} is not a result row ({error!r})") from None
            if not older:
                found[key] = row
    return list(found.values())


def where(rows: list[dict], conditions: Iterable[str]) -> list[dict]:
    """Rows whose case has each ``name=value``, values compared as text."""
    for condition in conditions:
        name, _, value = condition.partition("=")
        rows = [row for row in rows if str(row["case"].get(name)) == value]
    return rows


def render(rows: list[dict]) -> str:
    """A Markdown table.  What is the same in every case is said once, above it."""
    if not rows:
        return "no results\n"
    cases: dict[str, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault(json.dumps(row["case"], sort_keys=True), {})[row["impl"]] = row
    names = list(dict.fromkeys(name for row in rows for name in row["case"]))
    common = {n: rows[0]["case"].get(n) for n in names if len({str(r["case"].get(n)) for r in rows}) == 1}
    varied = [n for n in names if n not in common]
    impls = list(dict.fromkeys(row["impl"] for row in rows))
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("metrics", {})))
    lines = [_heading(rows, common), "", line([*varied, *(f"{i}, us" for i in impls), *metrics])]
    lines.append(line(["---"] * len(varied) + ["---:"] * (len(impls) + len(metrics))))
    for found in cases.values():
        case = next(iter(found.values()))["case"]
        cells = [str(case.get(n, "")) for n in varied]
        cells += [_cell(found[i]) if i in found else "" for i in impls]
        for metric in metrics:
            values = [f"{i} {r['metrics'][metric]:,}" for i, r in found.items() if metric in r.get("metrics", {})]
            cells.append("; ".join(values))
        lines.append(line(cells))
    return "\n".join(lines) + "\n"


def _heading(rows: list[dict], common: dict) -> str:
    facts = [row["provenance"] for row in rows]
    parts = [f"{name} {value}" for name, value in common.items()]
    for name in ("device", "isa", "torch", "commit"):
        parts.append(f"{name} {', '.join(sorted({str(f.get(name)) for f in facts}))}")
    if any(f["dirty"] for f in facts):
        parts.append("uncommitted changes")
    if not all(f["verified"] for f in facts):
        parts.append("NOT VERIFIED by tests")
    return f"**{rows[0]['bench']}**: " + ", ".join(parts) + f"; {min(f['date'] for f in facts)[:10]}."


def _cell(row: dict) -> str:
    text = f"{row['us']:,.0f}" if row["us"] >= 100 else f"{row['us']:.3g}"
    ratios = row.get("speedup", {})
    return text + "".join(f" ({s['ratio']:.2f}x {name})" for name, s in ratios.items())


def line(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="jsonl files")
    p.add_argument("--where", nargs="*", default=[], metavar="NAME=VALUE", help="only cases like this")
    args = p.parse_args()
    try:
        rows = where(latest(args.results), args.where)
    except (OSError, ValueError) as error:
        raise SystemExit(f"bench.table: {error}") from None
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["provenance"]["device"], row["bench"]), []).append(row)
    print("\n".join(render(group) for group in groups.values()) or "no results")


if __name__ == "__main__":
    main()
