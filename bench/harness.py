"""Tests first, then interleaved timings, then one JSON line per case and implementation.

One case is timed by going round all implementations again and again, in an order shuffled anew (fixed seed) in every
round, so that a machine that slows down slows all of them.  A sample is a batch of calls long enough for the clock.
Beside the median over the rounds stands the ratio to the baseline twice: of the two medians, and per round, with its
20th and 80th percentile.  When those are far apart, the machine was busy: run again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastprune import backends, memory

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MIN_ROUNDS = 7

Call = Callable[[], object]
Samples = dict[str, list[float]]  # implementation to microseconds per call, one value per round


# ---- time


def wall_clock(call: Call, n: int, now: Callable[[], float] = time.perf_counter) -> float:
    """Microseconds per call over ``n`` calls."""
    start = now()
    for _ in range(n):
        call()
    return (now() - start) * 1e6 / n


def process_clock(call: Call, n: int) -> float:
    """CPU microseconds of this process per call, user and system: what others run on the same core is not counted."""
    return wall_clock(call, n, time.process_time)


class CudaClock:
    """Microseconds per call on the GPU, each call with an L2 cache full of something else.

    ``head_start`` keeps the GPU busy for about that many cycles before each call, so that a call of few operators is
    enqueued whole when its first kernel starts: what is measured then is the GPU, not Python.  0 for whole steps.
    """

    def __init__(self, head_start: int = 1_000_000) -> None:
        l2 = torch.cuda.get_device_properties().L2_cache_size
        self.flush = torch.empty(2 * l2, dtype=torch.int8, device="cuda")
        self.head_start = head_start

    def __call__(self, call: Call, n: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for start, end in events:
            self.flush.zero_()
            if self.head_start:
                torch.cuda._sleep(self.head_start)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) * 1e3 / n


def clock_for(args: argparse.Namespace, steps: bool = False) -> Callable[[Call, int], float]:
    """The clock for ``args.device``; ``steps``: of training steps, whose time on the host counts, too."""
    if args.device == "cuda":
        return CudaClock(head_start=0) if steps else CudaClock()
    return process_clock if args.cpu_time else wall_clock


def setting(args: argparse.Namespace, allocator: str) -> dict[str, Any]:
    """The part of a case that all cases of a run share; CPU time never replaces wall time in a table."""
    return {"threads": args.threads, "allocator": allocator} | ({"clock": "process"} if args.cpu_time else {})


def interleave(
    calls: dict[str, Call],
    *,
    rounds: int = 9,
    sample_s: float = 0.01,
    seed: int = 0,
    clock: Callable[[Call, int], float] = wall_clock,
) -> Samples:
    """Time implementations against each other.

    Args:
        calls: Implementation to a call without arguments; inputs are in place, outputs are dropped.
        rounds: Samples of each implementation.
        sample_s: Seconds a sample lasts at least (one call, if that takes longer).
        seed: Of the order within the rounds.
        clock: ``(call, n) -> microseconds per call``.

    Returns: Implementation to ``rounds`` values in microseconds; equal positions belong to the same round.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(f"interleave: expected at least {MIN_ROUNDS} rounds, got {rounds}")
    # Two calls warm up (allocator, caches, lazy initialisation), the second tells how many fill a sample.
    batch = {}
    for name, call in calls.items():
        clock(call, 1)
        batch[name] = max(1, round(sample_s * 1e6 / max(clock(call, 1), 1e-3)))
    order, draw = list(calls), random.Random(seed)
    samples: Samples = {name: [] for name in calls}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            samples[name].append(clock(calls[name], batch[name]))
    return samples


# ---- numbers


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile (linear between the sorted values)."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[3]


def speedup(samples: Samples, name: str, over: str) -> dict[str, float]:
    """How many times faster ``name`` is than ``over``: above 1 is faster.

    Returns: ``ratio`` of the medians, and ``median``, ``p20``, ``p80`` of the ratios within each round.
    """
    ratio = statistics.median(samples[over]) / statistics.median(samples[name])
    median, p20, p80 = spread([a / b for a, b in zip(samples[over], samples[name], strict=True)])
    return {"ratio": _short(ratio), "median": _short(median), "p20": _short(p20), "p80": _short(p80)}


def rows_of(
    bench: str,
    case: dict[str, Any],
    samples: Samples,
    over: dict[str, Sequence[str]],
    traffic: dict[str, int] | None = None,
    moved: dict[str, int] | None = None,
) -> list[dict]:
    """One row per implementation, without provenance.

    Args:
        bench: Name of the bench.
        case: What was timed; with ``impl`` it is the key of the row in tables.
        over: Implementation to those it is compared with.
        traffic: Implementation to the bytes one call must at least move; ``"copy"``, if timed, is the yardstick.
        moved: Implementation to the bytes its kernels do move, counted, where they say.
    """
    gb, counted = (
        {name: n / statistics.median(samples[name]) / 1e3 for name, n in (which or {}).items()}
        for which in (traffic, moved)
    )
    rows = []
    for name, values in samples.items():
        median, p20, p80 = map(_short, spread(values))
        row = {"bench": bench, "case": case, "impl": name, "us": median, "us_p20": p20, "us_p80": p80}
        row["rounds"] = len(values)
        if name in gb:
            row["gb_per_s"] = _short(gb[name])
            if "copy" in gb:
                row["of_copy"] = _short(gb[name] / gb["copy"])
        if name in counted:
            row["moved_gb_per_s"] = _short(counted[name])
            if "copy" in gb:
                row["moved_of_copy"] = _short(counted[name] / gb["copy"])
        if over.get(name):
            row["speedup"] = {other: speedup(samples, name, other) for other in over[name]}
        rows.append(row)
    return rows


def _short(x: float) -> float:
    return float(f"{x:.4g}")


# ---- tests first


def check(selection: Sequence[str], *, device: str = "cpu", root: Path = ROOT) -> None:
    """Run the tests of what is about to be timed, in a process of their own.

    Args:
        selection: Arguments of pytest: files, ``-k`` expressions.
        device: ``"cpu"`` tests the eager and C++ backends, ``"cuda"`` the eager, Triton and CUDA ones.
        root: Where pytest runs.

    Raises:
        SystemExit: They fail, or there are none: nothing may be timed.
    """
    compiled = "triton,cuda" if device == "cuda" else "cpp"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selection],
        cwd=root,
        env=os.environ | {"FASTPRUNE_TEST_BACKENDS": f"eager,{compiled}"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        print(run.stdout[-4000:] + run.stderr[-2000:], file=sys.stderr)
        raise SystemExit(
            f"bench: `pytest {shlex.join(selection)}` fails, so nothing was timed; mend it, or pass --no-gate "
            "(rows will say that they are unverified)"
        )
    print(f"bench: tests passed: {run.stdout.strip().splitlines()[-1]}")


# ---- results


def provenance(device: str, verified: bool) -> dict[str, Any]:
    """What a row must carry to be believed: code, machine, settings, command.  No host names, no paths."""
    facts = {
        "verified": verified,
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!bench/results")),
        "device": device_model(device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "extension": backends.build_info(),
        "malloc": memory.report().get("C library", sys.platform),
        "environment": {k: v for k, v in os.environ.items() if re.match(r"(OMP|GOMP|KMP|MKL|MALLOC)_|GLIBC_TUN", k)},
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command(),
    }
    return facts | ({"cuda": torch.version.cuda} if device == "cuda" else {})


def commit() -> str:
    """The commit of this repository, 12 digits; without git what COMMIT says, or "unknown"."""
    return _git("rev-parse", "--short=12", "HEAD") or os.environ.get("COMMIT", "unknown")[:12]


def command() -> str:
    """The command line of this process, absolute paths cut down to their last part."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else f"python {Path(sys.argv[0]).name}"
    return " ".join([program, *(shlex.quote(re.sub(r"(?<![\w.])/\S*/", "", a)) for a in sys.argv[1:])])


def device_model(device: str) -> str:
    """The model of the processor or the GPU, ``AMD EPYC``."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def device_folder(device: str) -> str:
    """Folder of a device's results, from its model: ``amd-epyc-2c``, ``nvidia-h200``."""
    name = re.sub(r"\((r|tm)\)|\b(cpu|processor)\b|@.*", " ", device_model(device).lower())
    name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return name if device == "cuda" else f"{name}-{os.cpu_count()}c"


def append(path: Path, rows: Iterable[dict]) -> None:
    """Add rows to a JSON-lines file, all or none, also when several processes write: one write under a lock."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        start = file.seek(0, os.SEEK_END)
        try:
            if file.write(text.encode()) != len(text.encode()):
                raise OSError(f"bench: could not write all rows to {path.name}; disk full?")
        except OSError:
            file.truncate(start)
            raise


def _git(*args: str) -> str | None:
    """Output of git in this repository; None without git or outside a repository."""
    try:
        run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


# ---- command line


def arguments(description: str, tests: Sequence[str]) -> argparse.ArgumentParser:
    """The options that all benches share; :func:`start` acts on them."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    p.add_argument("--rounds", type=int, default=9, help=f"samples per implementation, at least {MIN_ROUNDS}")
    p.add_argument("--cpu-time", action="store_true", help="count CPU time, for a busy machine; one thread only")
    p.add_argument("--no-gate", action="store_true", help="time without testing first; rows are marked unverified")
    p.add_argument("--no-write", action="store_true", help="print only, append nothing to the results")
    p.add_argument("--out", type=Path, default=None, help="folder of results; default bench/results/<device>")
    p.set_defaults(tests=tests)
    return p


def start(args: argparse.Namespace) -> None:
    """Refuse what cannot be timed, run the tests, set the threads."""
    if args.rounds < MIN_ROUNDS:
        raise SystemExit(f"bench: expected at least {MIN_ROUNDS} rounds, got {args.rounds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench: no CUDA device here; use --device cpu")
    if args.cpu_time and (args.device == "cuda" or args.threads != 1):
        raise SystemExit("bench: --cpu-time is for the CPU and one thread; it would add up the time of all threads")
    if not args.no_gate and not os.environ.get("FASTPRUNE_TESTED"):  # bench/gpu_check.sh has run them all
        check(args.tests, device=args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)


def finish(args: argparse.Namespace, bench: str, rows: Iterable[dict]) -> None:
    """Append rows with their provenance."""
    if not args.no_write:
        facts = provenance(args.device, verified=not args.no_gate)
        folder = args.out or RESULTS / device_folder(args.device)
        append(folder / f"{bench}.jsonl", [row | {"provenance": facts} for row in rows])


def tune() -> None:
    """:func:`fastprune.memory.tune_cpu_memory`, for all contestants; a bench that asked for it must get it."""
    tuning = memory.tune_cpu_memory()
    if not tuning.active:
        raise SystemExit(f"bench: the allocator cannot be tuned here: {tuning}")
    print(f"bench: allocator tuned: {tuning}")
