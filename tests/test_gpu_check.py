"""bench/gpu_check.sh with a stand-in for Python: which steps run, and what becomes of failures; some of it for real."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench import harness
from bench.gpu_page import PAGE, wanted
from fastprune import backends

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu_check.sh"

STUB = """#!/usr/bin/env bash
echo "tested=${FASTPRUNE_TESTED:-} $*" >> "$CALLS"
echo "ext=${FASTPRUNE_EXT:-} backends=${FASTPRUNE_TEST_BACKENDS:-} $*" >> "$CALLS.env"
[[ -n "${REAL:-}" && "$*" =~ $REAL ]] && exec "$REAL_PYTHON" "$@"
case "$*" in
  *device_folder*) echo "$RESULTS" ;;
  *"$FAILING"*) echo "this went wrong"; exit 3 ;;
  *) echo fine ;;
esac
"""


def run(
    tmp_path: Path, failing: str = "nothing", budget: int = 570, sanitizer: str = 'exec "$@"', **environment: str
) -> tuple[int, str, str]:
    """Exit code, summary, and the calls of Python."""
    tools, results = tmp_path / "bin", tmp_path / "results"
    tools.mkdir()
    results.mkdir()
    (results / "step.jsonl").write_text("{}\n")
    (tools / "python").write_text(STUB)
    (tools / "python").chmod(0o755)
    if sanitizer:
        (tools / "compute-sanitizer").write_text(
            f'#!/usr/bin/env bash\nuntil [ "$1" = 9 ]; do shift; done; shift\n{sanitizer}\n'
        )
        (tools / "compute-sanitizer").chmod(0o755)
    env = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "CALLS": str(tmp_path / "calls"),
        "RESULTS": str(results), "FAILING": failing, "BUDGET_S": str(budget), **environment,
    }  # fmt: skip
    for name in ("FASTPRUNE_TESTED", "FASTPRUNE_TEST_BACKENDS"):
        env.pop(name, None)
    done = subprocess.run(["bash", SCRIPT, tmp_path / "out"], env=env, capture_output=True, text=True)
    out = tmp_path / "out"
    return done.returncode, (out / "summary.md").read_text(), (tmp_path / "calls").read_text()


def test_every_step_runs_and_rows_are_copied(tmp_path):
    code, summary, calls = run(tmp_path)
    assert code == 0 and "failed" not in summary and "not run" not in summary
    assert summary.count("| passed |") == summary.count("\n| ") - 1 >= 20 and summary.endswith("\nfine\n")
    assert "-m pytest -q -m gpu" in calls and "-m fastprune doctor" in calls
    assert "tested=1 -m bench.ops.batch_norm_act --device cuda --shapes" in calls
    warm = re.findall(
        r"tested= -m bench.ops.batch_norm_act --device cuda --shapes (\S+) .*--compile.*--no-write", calls
    )
    timed = re.search(r"tested=1 -m bench.ops.batch_norm_act --device cuda --shapes (.*) --dtypes", calls)
    assert sorted(warm) == sorted(timed[1].split())  # what is timed was compiled before
    assert (tmp_path / "out" / "step.jsonl").exists() and "fine" in (tmp_path / "out" / "tables.md").read_text()
    assert f"-m bench.gpu_page --page {tmp_path / 'out' / 'gpu.md'}" in calls


def test_what_the_sanitizer_runs_is_there(tmp_path):
    words = 'shift 3; printf "%s\\n" "$@" >> "$CALLS.sanitized"'
    _, _, _ = run(tmp_path, sanitizer=words, ONLY="check_tests")
    few = [line for line in (tmp_path / "calls.sanitized").read_text().splitlines() if "::" in line]
    assert len(few) == 2 * (2 + 4 * 2 + 3) and len(set(few)) == len(few) / 2
    env = os.environ | {"FASTPRUNE_TEST_BACKENDS": "eager,triton,cuda"}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *sorted(set(few))]
    done = subprocess.run(command, env=env, cwd=SCRIPT.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(few) // 2} tests collected" in done.stdout, done.stdout


class Parsed(Exception):
    pass


def test_the_benches_understand_their_arguments(tmp_path, monkeypatch):
    def stop(args):
        raise Parsed

    _, _, calls = run(tmp_path)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))  # there is no GPU to make them on
    monkeypatch.setattr(backends, "why_not", lambda *call: None)
    monkeypatch.setattr(harness, "start", stop)
    commands = [c.split() for c in re.findall(r"-m (bench\.\S+ --device cuda.*)", calls)]
    assert len({module for module, *_ in commands}) == 10
    for module, *arguments in commands:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            import_module(module).main()


def test_some_of_it_for_real_on_a_cpu(tmp_path):
    code, summary, calls = run(
        tmp_path, GPU_CHECK_DEVICE="cpu", WORKERS="0", REAL_PYTHON=sys.executable,
        REAL="^-m (pytest|bench.ops.batch_norm_act .*relu|bench.e2e.methods|bench.table|bench.gpu_page)",
    )  # fmt: skip
    logs = "\n".join(path.read_text() for path in (tmp_path / "out").glob("*.log"))
    assert code == 0 and "sanitizer" not in calls and "pip install" not in calls, logs
    assert re.search(r"\| tests_ops \| passed \| \d+ \| \d+ passed", summary), summary
    assert "resnet20 nhwc bf16 tpp" in summary and f"0 missed, {len(wanted([]))} not yet measured" in summary
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "**batch_norm_act**" in tables and "**methods**" in tables
    assert (tmp_path / "out" / "gpu.md").read_text() == PAGE.read_text()  # rows of a CPU say nothing about a GPU


def test_a_failure_stops_nothing_and_is_the_exit_code(tmp_path):
    code, summary, calls = run(tmp_path, failing="pytest -q -m gpu -n 12 -p no:cacheprovider tests/test_b")
    assert code == 1
    assert "| tests_batch_norm_act | failed (3) |" in summary and "this went wrong" in summary
    assert "tested= -m bench.ops.batch_norm_act --device cuda --no-gate" in calls  # so that rows are unverified
    assert "tested=1 -m bench.ops.channel_gate --device cuda --shapes" in calls


def test_some_steps_can_be_chosen(tmp_path):
    code, summary, calls = run(tmp_path, ONLY="doctor|compile_resnet50")
    assert code == 0 and summary.count("| passed |") == 2 and "pytest" not in calls.replace(str(tmp_path), "")
    assert "tested= -m bench.e2e.methods --device cuda --nets resnet50" in calls  # it runs its tests itself


def test_without_kernels_it_goes_on(tmp_path):
    code, summary, _ = run(tmp_path, failing="no-build-isolation")
    assert code == 1 and "| build | failed (3) |" in summary and "| build_without_kernels | failed (3) |" in summary
    assert "| bench_batch_norm_act | passed |" in summary
    calls = (tmp_path / "calls.env").read_text()
    assert re.findall(r"ext=(\w+) \S+ -m pip", calls) == ["cuda", "cpu", "none"]
    assert set(re.findall(r"backends=(\S*) -m pytest", calls)) == {"eager,triton"}  # no test asks for what is not there


def test_a_process_without_compiled_kernels_collects_its_tests(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['fastprune._C'] = None")
    env = os.environ | {
        "PYTHONPATH": str(tmp_path), "FASTPRUNE_TEST_BACKENDS": "eager",
        "PYTEST_ADDOPTS": re.search(r"PYTEST_ADDOPTS='(.*)'", SCRIPT.read_text())[1],
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/test_gates.py"]
    done = subprocess.run(command, env=env, cwd=SCRIPT.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("compute-sanitizer") is not None, reason="it is there")
def test_a_missing_tool_is_said(tmp_path):
    code, summary, _ = run(tmp_path, sanitizer="")
    assert code == 1 and "| memcheck | not run: command missing |" in summary


def test_no_time_left(tmp_path):
    code, summary, calls = run(tmp_path, budget=0)
    assert code == 1 and "| build | not run: no time left |" in summary and "pip install" not in calls


def test_refuses_without_a_gpu(tmp_path):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    done = subprocess.run(["bash", SCRIPT, tmp_path], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu_check: PyTorch sees no GPU here") and done.stderr.count("\n") == 1
