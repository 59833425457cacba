"""Kill tiny runs with SIGKILL at random moments, resume each, and compare its end with the uninterrupted run's.

    python -m bench.kill_resume                        # 18 + 2 kills, minutes; writes docs/results/resume.md
    python -m bench.kill_resume --kills 3 --recipe-kills 0 --seed 1 --out -

Compared bit for bit: weights, buffers, averaged weights, optimizer, schedule and method, loader and random state, every
row of metrics.jsonl but for its times, and the weights of the best epoch; of a whole ``fastprune run``, all files that
it leaves, but for times.  A seed fixes behind which step each kill comes, and after how many milliseconds; of a
``fastprune run``, after which share of the time.  The exit code is 1 if any run ends differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fastprune as fp
from fastprune.train import MetricsLog, fit, multistep
from fastprune.train.resume import read_state

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, BATCHES = 5, 8  # batches of an epoch, the last one smaller
RECIPE = "greg/vgg19-cifar100-greg1-0.7"
LATER_MS = 20.0  # a kill comes at most so long after a step: in the next ones, a test or a checkpoint
TIMES = ("seconds", "images_per_s")


class Case(NamedTuple):
    method: str
    options: dict[str, Any]
    minutes: float  # between two checkpoints within an epoch: 0 is one after each step
    fit: dict[str, Any]

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-BATCHES // self.fit.get("accumulate", 1))


CUTS = {"per_cut": 2, "frequency": 3, "max_removed": 12, "shrink_every": 2, "stem": True}
GROWS = {"update_interval": 2, "stabilize": 6, "reg_step": 0.1}
CASES = {
    "taylor-gate, gets smaller, a checkpoint per step": Case("taylor-gate", CUTS, 0.0, {}),
    "greg-1, a checkpoint per step": Case("greg-1", GROWS, 0.0, {}),
    "tpp, a checkpoint every 30 ms": Case("tpp", GROWS | {"zero_out_interval": 1}, 0.0005, {}),
    "slimming, a checkpoint every 30 ms": Case("slimming", {"reg_weight": 1e-3}, 0.0005, {}),
    "taylor-gate, bf16, accumulate=2": Case("taylor-gate", CUTS, 0.0, {"precision": "bf16", "accumulate": 2}),
    "slimming, compile=True": Case("slimming", {"reg_weight": 1e-3}, 0.0, {"compile": True}),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 10),
    )  # fmt: skip


def run(case: str, folder: Path, count: Callable[[], None]) -> dict[str, Any]:
    """Start the run, or go on where ``folder`` stands, to its end; hashes of all that is left.

    ``count`` is called after each step.
    """
    name, options, minutes, more = CASES[case]
    random.seed(0), np.random.seed(0)  # Python seeds anew when it forks
    model, images = network(), fp.data.load("digits", limit=32 * BATCHES - 12)
    method = fp.create(name, model, torch.zeros(2, 1, 8, 8), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.register_step_post_hook(lambda *_: count())
    schedule, loaders, log = multistep(optimizer, EPOCHS), images.loaders(32), MetricsLog(folder / "metrics.jsonl")
    if not (folder / "last.pt").exists():
        log.start({"run": case})
    history = fit(
        model, loaders, epochs=EPOCHS, optimizer=optimizer, schedule=schedule, method=method, log=log, ema=0.9,
        clip_norm=5.0, checkpoint=folder / "last.pt", checkpoint_minutes=minutes, resume=True, progress=False, **more,
    )  # fmt: skip
    left = {
        "weights": model.state_dict(),
        "averaged weights": history.ema.state_dict(),
        "best weights": history.best_state,
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "method": method.state_dict(),
        "loader": loaders.train.state_dict(),
        "random state": [torch.get_rng_state(), list(random.getstate()), list(np.random.get_state())],
        "rows": [timeless(row) for row in history],
        "metrics.jsonl": [timeless(row) for row in MetricsLog.read(folder / "metrics.jsonl")],
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return {key: digest(value) for key, value in left.items()}


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in TIMES}


def digest(value: Any) -> str:
    """Hash of nested dicts, lists and tuples of tensors, arrays and plain values, bit for bit."""
    h = hashlib.sha256()

    def add(v: Any) -> None:
        if isinstance(v, Tensor):
            h.update(f"{v.dtype} {tuple(v.shape)}".encode() + v.detach().contiguous().view(-1).numpy().tobytes())
        elif isinstance(v, np.ndarray):
            h.update(f"{v.dtype} {v.shape}".encode() + v.tobytes())
        elif isinstance(v, Mapping):
            for key in v:
                h.update(repr(key).encode())
                add(v[key])
        elif isinstance(v, (list, tuple)):
            h.update(f"{len(v)}".encode())
            for item in v:
                add(item)
        else:
            h.update(f"{type(v).__name__} {v!r}".encode())

    add(value)
    return h.hexdigest()


class Child:
    """A forked process that runs ``case`` in ``folder`` and writes end.json.

    Forking is safe here: this process itself never computes with PyTorch, so there are no threads to lose.
    """

    def __init__(self, case: str, folder: Path) -> None:
        self.folder = folder
        self.steps = mmap.mmap(-1, 1)  # that the child has made; shared with it
        self.pid = os.fork()
        if self.pid:
            return
        try:
            torch.set_num_threads(1)
            (folder / "end.json").write_text(json.dumps(run(case, folder, self._count)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _count(self) -> None:
        self.steps[0] += 1

    def end(self) -> dict[str, Any]:
        _, status = os.waitpid(self.pid, 0)
        if status:
            raise SystemExit(f"kill_resume: the run in {self.folder} failed, status {status}")
        return json.loads((self.folder / "end.json").read_text())

    def kill(self, step: int, later_ms: float) -> dict[str, Any]:
        """Kill it ``later_ms`` after its ``step``-th step, from 0; say where it stood."""
        while self.steps[0] <= step:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                raise SystemExit(f"kill_resume: the run in {self.folder} ended before step {step}")
            time.sleep(1e-4)
        time.sleep(later_ms / 1e3)
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"kill_resume: the run in {self.folder} was over before it was killed; lower LATER_MS")
        path = self.folder / "last.pt"
        where = read_state(path)["where"] if path.exists() else None
        return {"moment": f"{step} + {later_ms:.1f} ms", "checkpoint": where} | {
            "while_writing": (self.folder / "last.pt.tmp").exists()
        }


def recipe(runs: Path, seconds: float | None = None) -> tuple[dict[str, str] | None, str, float]:
    """``fastprune run``, new or resumed, in a process of its own, which is killed after so many seconds.

    Returns: Hashes of all that is left (None: it was killed), where it stands, and how long it took.
    """
    command = [sys.executable, "-m", "fastprune", "run", RECIPE, "--tiny", "--resume", "--device", "cpu"]
    start = time.monotonic()
    with subprocess.Popen([*command, "--out", str(runs)], stdout=subprocess.DEVNULL, cwd=ROOT) as child:
        try:
            if child.wait(seconds):
                raise SystemExit(f"kill_resume: fastprune run failed in {runs}, status {child.returncode}")
        except subprocess.TimeoutExpired:
            child.kill()
    took = time.monotonic() - start
    folders = sorted(path.parent for path in runs.rglob("run.json"))
    if child.returncode:
        files = [path for path in runs.rglob("*.pt") if path.is_file()]
        return None, "; ".join(f"{p.stem} {read_state(p)['where']}" for p in files) or "between phases", took
    left = {}
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        left |= {f"{folder.name} {name}": digest(timeless(block)) for name, block in result["phases"].items()}
        for name in ("metrics", "importances"):
            rows = MetricsLog.read(folder / f"{name}.jsonl")
            left[f"{folder.relative_to(runs)} {name}"] = digest([timeless(row) for row in rows])
        for path in (*folder.glob("*.safetensors"), *folder.glob("*.pt"), *folder.glob("*.tmp")):
            left[str(path.relative_to(runs))] = digest(list(path.read_bytes()))
    return left, "", took


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=18)
    p.add_argument("--recipe-kills", type=int, default=2, help="of a whole fastprune run --tiny")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default=str(ROOT / "docs" / "results" / "resume.md"), help="- for the terminal")
    args = p.parse_args()
    draw, rows = random.Random(args.seed), []
    base = Path(tempfile.mkdtemp(prefix="kill_resume-"))
    cases, expected = list(CASES)[: max(1, args.kills // 3)], {}
    for i in range(-len(cases), args.kills):
        case, folder = cases[i % len(cases)], base / str(i)
        folder.mkdir()
        if i < 0:
            expected[case] = Child(case, folder).end()
            continue
        moment = draw.randrange(EPOCHS * CASES[case].steps - 1), draw.uniform(0, LATER_MS)
        row = {"kill": i + 1, "case": case} | Child(case, folder).kill(*moment)
        end = Child(case, folder).end()
        row["different"] = [key for key in end if end[key] != expected[case][key]]
        if (folder / "last.pt.tmp").exists():
            row["different"].append("a temporary file is left")
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.recipe_kills:
        whole, _, took = recipe(base / "recipe")
    for i in range(args.recipe_kills):
        share = draw.uniform(0.3, 0.9)  # before, Python is still importing
        end, where, _ = recipe(base / f"recipe{i}", share * took)
        row = {"kill": len(rows) + 1, "case": f"fastprune run {RECIPE} --tiny", "moment": f"{share:.0%} of the time"}
        row |= {"checkpoint": where if end is None else "it was over", "while_writing": False}
        end, _, _ = recipe(base / f"recipe{i}")
        row["different"] = sorted(key for key in {**end, **whole} if end.get(key) != whole.get(key))
        rows.append(row)
        print(json.dumps(row), flush=True)
    bad = sum(bool(row["different"]) for row in rows)
    shutil.rmtree(base)
    text = page(rows, args.seed)
    if args.out == "-":
        print(text)
    else:
        Path(args.out).write_text(text)
    return 1 if bad else 0


def page(rows: list[dict[str, Any]], seed: int) -> str:
    cells = []
    for row in rows:
        where = "before the first checkpoint" if row["checkpoint"] is None else row["checkpoint"]
        where += ", while a file was written" * row["while_writing"]
        end = "the same" if not row["different"] else "DIFFERENT: " + ", ".join(row["different"])
        cells.append(f"| {row['kill']} | {row['case']} | {row['moment']} | {where} | {end} |")
    same = sum(not row["different"] for row in rows)
    what = (
        "weights, averaged weights, best weights, optimizer, schedule, method, loader, random states, rows of metrics"
    )
    return f"""# Killed and resumed

Written by `python -m bench.kill_resume`: {len(rows)} runs of {EPOCHS} epochs of {BATCHES} batches, each killed with
SIGKILL at a random moment (seed {seed}) and resumed to its end; torch {torch.__version__}, one CPU thread.
**{same} of {len(rows)}** ended as the uninterrupted run did, bit for bit ({what} but for their times).

| kill | run | after step | the checkpoint that was there | end |
|--:|---|--:|---|---|
{chr(10).join(cells)}
"""


if __name__ == "__main__":
    raise SystemExit(main())
