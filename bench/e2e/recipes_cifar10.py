"""One recipe of each system on real CIFAR-10 images, by a shortened schedule.

    python -m bench.e2e.recipes_cifar10 --images CIFAR10_FOLDER      # goes on where it stopped; two hours on one core
    python -m bench.e2e.recipes_cifar10 --render

``--images``: train/<class>/ and test/<class>/.  ``--system rni`` does only those of a system, and what they start from,
so that processes can share the work; TPP's and Taylor's start from GReg's base.  Runs lie in runs/recipes_cifar10; what
they say goes to docs/results/recipes_cifar10: rows.jsonl, and report.html of all; docs/results/recipes_cifar10.md is
rendered from the rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import fastprune as fp
import fastprune.run
from bench.harness import ROOT
from fastprune import recipes, report

OUT = ROOT / "docs" / "results" / "recipes_cifar10"
DATA = {"data.name": "imagefolder", "data.pad": 4, "data.flip": True}
GROWTH = {"prune.options.update_interval": 4, "prune.options.reg_step": 0.01, "prune.options.stabilize": 80}
RESNET56 = {  # in place of the recipe's network of ImageNet
    "data.mean": [0.485, 0.456, 0.406],  # those of the base
    "data.std": [0.229, 0.224, 0.225],
    "model.name": "resnet56",
    "model.weights": None,
    "base": "greg/resnet56-cifar10-base",
}
TAYLOR = {"prune.options.frequency": 20, "prune.options.per_cut": 20, "prune.options.max_removed": 300}
FISHER = {"prune.options.frequency": 8, "prune.options.per_cut": 20, "prune.options.max_removed": 400}
RUNS: dict[str, dict[str, Any]] = {  # recipe: what is changed besides DATA, in the order they are done
    "rni/resnet56-cifar10-rni-train": {"data.limit": 20000, "train.epochs": 6},
    "rni/resnet56-cifar10-rni-0.5": {"data.limit": 20000, "finetune.epochs": 4},
    "greg/resnet56-cifar10-base": {"data.limit": 20000, "train.epochs": 6, "train.batch_size": 64},
    "greg/resnet56-cifar10-greg1-0.5": {
        "data.limit": 20000, **GROWTH, "finetune.epochs": 2, "importances_every": 1,
    },
    "tpp/resnet56-cifar10-tpp-0.5": {
        "data.limit": 20000, **GROWTH, "prune.options.zero_out_interval": 1, "finetune.epochs": 2,
        "importances_every": 1,
    },
    "taylor/resnet50-imagenet-72": {
        "data.limit": 20000, **RESNET56, "prune.epochs": 2, "prune.batch_size": 64, "prune.schedule.at": [1], **TAYLOR,
    },
    "fisher/wrn-40-2-base": {"data.limit": 10000, "train.epochs": 4},
    "fisher/wrn-40-2-fisher": {
        "data.limit": 10000, **FISHER, "prune.options.max_cuts": 20, "importances_every": 1,
    },
}  # fmt: skip
INTRO = """# A recipe of each system on CIFAR-10, shortened

Written by `python -m bench.e2e.recipes_cifar10` from [recipes_cifar10/rows.jsonl](recipes_cifar10/rows.jsonl); curves,
widths, importances and costs of a step: [recipes_cifar10/report.html](recipes_cifar10/report.html), the page of
`fastprune report`. It needs no other file: save it, open it.

These runs show that every system's recipe does on real images what it should. They do not repeat the published numbers:
training sees a few epochs of a part of the images, where the authors' networks see 160 to 200 epochs of all. The images
are CIFAR-10 as JPEG of quality 75, on which networks come out a little lower; by how much was not measured. One seed.
Seconds are of training without the tests, on a machine that did other work, too. The schedules in full, against the
published numbers, on a GPU: not yet measured.
"""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", help="folder with train/<class>/ and test/<class>/")
    p.add_argument("--runs", type=Path, default=Path("runs/recipes_cifar10"), help="folder of the runs")
    p.add_argument("--system", nargs="+", default=sorted({name.partition("/")[0] for name in RUNS}))
    p.add_argument("--device", default="cpu")
    p.add_argument("--collect", action="store_true", help="only gather what finished runs say")
    p.add_argument("--render", action="store_true", help="only write the page again")
    p.add_argument("--out", type=Path, default=OUT, help="folder of rows.jsonl; the page is written beside it")
    args = p.parse_args()
    if not args.render:
        if not args.collect:
            run(args)
        collect(args)
    args.out.with_suffix(".md").write_text(page(args.out / "rows.jsonl"), encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    if not args.images:
        raise SystemExit("bench: --images is needed: a folder with train/<class>/ and test/<class>/")
    fp.tune_cpu_memory()  # as the command does
    for name in of_systems(args.system):
        fastprune.run.run(
            name, changes=DATA | RUNS[name], device=args.device, root=args.images, resume=True, runs=args.runs
        )


def of_systems(systems: list[str]) -> list[str]:
    """Their runs, behind those that they start from: a base that is made on the way would not be shortened."""
    mine = [name for name in RUNS if name.partition("/")[0] in systems]
    bases = [recipes.load(name, changes=DATA | RUNS[name]).base for name in mine]
    needed = {*mine, *(base.recipe for base in bases if base is not None)}
    return [name for name in RUNS if name in needed]


def collect(args: argparse.Namespace) -> None:
    """rows.jsonl and report.html anew, from the runs that are finished."""
    args.out.mkdir(parents=True, exist_ok=True)
    rows, folders = [], []
    for name in RUNS:
        folder = args.runs / name / "seed0"
        path = folder / "result.json"
        result = json.loads(path.read_text()) if path.exists() else {"finished": False}
        if not result["finished"]:
            print(f"{name}: not finished")
            continue
        facts = json.loads((folder / "run.json").read_text())
        del facts["data"]["root"]
        facts |= {"base": facts["base"] and {key: facts["base"][key] for key in ("recipe", "acc")}}
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows.append({"bench": "recipes_cifar10", "run": facts, "result": result, "epochs": epochs})
        folders.append(folder)
    (args.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report.run(folders, args.out / "report.html", title="A recipe of each system on CIFAR-10 (JPEG q75), shortened")


def page(path: Path) -> str:
    """docs/results/recipes_cifar10.md from the rows."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    text = [INTRO, *table(rows)]
    for row in rows:
        text += section(row["run"], row["result"])
    return "\n".join([*text, ""])


def table(rows: list[dict]) -> list[str]:
    """A line per run that prunes."""
    lines = [
        "| recipe | dense | after the cut | tuned: best | last | MACs (M) | parameters (k) | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        phases = row["result"]["phases"]
        if "prune" not in phases:
            continue
        cut, last = phases["prune"], list(phases.values())[-1]
        tuned = phases.get("finetune", {})
        cells = [f"[{row['run']['recipe']}](#{anchor(row['run']['recipe'])})", percent(row["run"]["base"]["acc"])]
        cells += [percent(cut["acc"]), percent(tuned.get("acc_best")), percent(tuned.get("acc_last"))]
        first = macs_before(rows, row)
        cells += [f"{first['macs'] / 1e6:.1f} → {last['macs'] / 1e6:.1f}"]
        cells += [f"{first['params'] / 1e3:.0f} → {last['params'] / 1e3:.0f}"]
        cells.append(f"{sum(phase['seconds'] for phase in phases.values()) / 60:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def macs_before(rows: list[dict], row: dict) -> dict[str, int]:
    """The last block of the run that it starts from."""
    of = {other["run"]["recipe"]: other["result"]["phases"] for other in rows}
    return of[row["run"]["base"]["recipe"]]["train"]


def anchor(name: str) -> str:
    """Of a heading, as GitHub makes it."""
    return name.replace("/", "").replace(".", "")


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def section(run: dict, result: dict) -> list[str]:
    """What was run, and what each phase came to."""
    data, changes = run["data"], {k: v for k, v in run["set"].items() if k not in DATA}
    shown = " ".join(f"{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in changes.items())
    text = [
        "",
        f"## {run['recipe']}",
        "",
        f"Changed: `{shown}`. {data['train_images']} training images, {data['test_images']} test images; "
        f"{run['device_name']}, {run['device']}, {run['threads']} thread{'s' * (run['threads'] > 1)}, torch "
        f"{run['torch']}, fastprune {run['fastprune']}; {run['started'][:10]}.",
        "",
        *(f"- {name}: {line(block)}" for name, block in result["phases"].items()),
    ]
    if published := result["published"]:
        known = {"dense_acc": "dense {:.2%}", "acc": "accuracy {:.2%}", "speedup": "MACs {}x fewer"}
        words = [form.format(published[key]) for key, form in known.items() if key in published]
        whose = "of its own network on its own images" if "model.name" in changes else "by the schedule in full"
        text.append(f"- published, {whose} ({published['where']}): {', '.join(words)}")
    return text


def line(block: dict) -> str:
    words = [f"{block['epochs']} epochs, {block['steps']} steps, {block['seconds']:.0f} s"] if block["steps"] else []
    words.append(f"accuracy {percent(block['acc_before'])} before, {percent(block['acc'])} after")
    words.append(f"{block['macs'] / 1e6:.2f} M MACs, {block['params'] / 1e3:.1f} k parameters")
    if kept := block.get("channels"):
        groups = [(of, [n for n, _ in same]) for of, same in itertools.groupby(kept.values(), lambda pair: pair[1])]
        words.append("channels kept: " + ", ".join(f"{len(n)} x {span(n)} of {of}" for of, n in groups))
    return ", ".join(words)


def span(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"({min(values)} to {max(values)})"


if __name__ == "__main__":
    main()
