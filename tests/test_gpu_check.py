"""bench/gpu_check.sh with a stand-in for Python: which steps run, and what becomes of failures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu_check.sh"

STUB = """#!/usr/bin/env bash
echo "tested=${FASTPRUNE_TESTED:-} $*" >> "$CALLS"
case "$*" in
  *device_folder*) echo "$RESULTS" ;;
  *"$FAILING"*) echo "this went wrong"; exit 3 ;;
  *) echo fine ;;
esac
"""


def run(tmp_path: Path, failing: str = "nothing", budget: int = 570, sanitizer: bool = True) -> tuple[int, str, str]:
    """Exit code, summary, and the calls of Python."""
    tools, results = tmp_path / "bin", tmp_path / "results"
    tools.mkdir()
    results.mkdir()
    (results / "step.jsonl").write_text("{}\n")
    (tools / "python").write_text(STUB)
    (tools / "python").chmod(0o755)
    if sanitizer:
        (tools / "compute-sanitizer").write_text('#!/usr/bin/env bash\nshift 4\nexec "$@"\n')
        (tools / "compute-sanitizer").chmod(0o755)
    env = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "CALLS": str(tmp_path / "calls"),
        "RESULTS": str(results), "FAILING": failing, "BUDGET_S": str(budget),
    }  # fmt: skip
    env.pop("FASTPRUNE_TESTED", None)
    done = subprocess.run(["bash", SCRIPT, tmp_path / "out"], env=env, capture_output=True, text=True)
    out = tmp_path / "out"
    return done.returncode, (out / "summary.md").read_text(), (tmp_path / "calls").read_text()


def test_every_step_runs_and_rows_are_copied(tmp_path):
    code, summary, calls = run(tmp_path)
    assert code == 0 and "failed" not in summary and "not run" not in summary
    assert summary.count("| passed |") == summary.count("\n") - 2 >= 16
    assert "-m pytest -q -m gpu" in calls and "-m fastprune doctor" in calls
    assert "tested=1 -m bench.ops.batch_norm_act --device cuda --shapes" in calls
    assert (tmp_path / "out" / "step.jsonl").exists() and "fine" in (tmp_path / "out" / "tables.md").read_text()


def test_a_failure_stops_nothing_and_is_the_exit_code(tmp_path):
    code, summary, calls = run(tmp_path, failing="pytest -q -m gpu")
    assert code == 1
    assert "| tests | failed (3) |" in summary and "this went wrong" in summary
    assert "tested= -m bench.ops.batch_norm_act --device cuda --no-gate" in calls  # so that rows are unverified


@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="it is there")
def test_a_missing_tool_is_said(tmp_path):
    code, summary, _ = run(tmp_path, sanitizer=False)
    assert code == 1 and "| memcheck | not run: command missing |" in summary


def test_no_time_left(tmp_path):
    code, summary, calls = run(tmp_path, budget=0)
    assert code == 1 and "| build | not run: no time left |" in summary and "pip install" not in calls


def test_refuses_without_a_gpu(tmp_path):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(["bash", SCRIPT, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu_check: PyTorch sees no GPU here") and done.stderr.count("\n") == 1
