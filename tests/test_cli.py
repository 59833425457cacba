"""The command line: what users type, wrongly too, and what they read."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastprune
from fastprune import backends, cli, doctor, quickstart


def call(capsys, *argv):
    """Exit code, stdout, stderr."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # --version and --help
        code = stop.code
    return code, *capsys.readouterr()


def test_version(capsys):
    assert call(capsys, "--version") == (0, f"fastprune {fastprune.__version__}\n", "")


def test_no_command_shows_them_all(capsys):
    code, out, _ = call(capsys)
    assert code == 0
    for name, command in cli.COMMANDS.items():
        assert name in out and command.help.split()[0] in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(capsys, command):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0 and out.startswith(f"usage: fastprune {command}")
    for option, keywords in cli.COMMANDS[command].options.items():
        assert keywords.get("metavar", option) in out or option == "what"  # argparse shows its choices
    assert f"example: fastprune {command}" in " ".join(out.split())


def test_the_folder_of_a_data_set_goes_by_both_names():
    for name in ("--data", "--root"):
        assert cli._parse(["run", "x", name, "d"]).data == Path("d")
        assert cli._parse(["oracle", name, "d"]).root == Path("d")
        assert cli._parse(["eval", "x", "--dataset", "digits", name, "d"]).root == Path("d")


def test_examples_parse():
    for command in cli.COMMANDS.values():
        assert cli._parse(command.example.split()[1:]).run is command.run


@pytest.mark.parametrize(
    "argv, says",
    [
        (["quikstart"], "unknown command 'quikstart'; did you mean 'quickstart'?"),
        (["frobnicate"], f"unknown command 'frobnicate'. Known: {', '.join(sorted(cli.COMMANDS))}"),
        (["quickstart", "--epohcs", "3"], "unknown argument '--epohcs'; did you mean '--epochs'?"),
        (["quickstart", "--epohcs=3"], "did you mean '--epochs'?"),
        (["quickstart", "--epochs", "0"], "--epochs: expected a whole number, 1 or more, got '0'"),
        (["quickstart", "--epochs", "many"], "got 'many'"),
        (["quickstart", "--seed", "x"], "--seed: invalid int value: 'x'"),
        (["quickstart", "--epochs"], "--epochs: expected one argument"),
        (["list", "modles"], "invalid choice: 'modles'"),
        (["--verison"], "unknown argument '--verison'"),
        (["doctor", "--tracebak"], "unknown argument '--tracebak'"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(capsys, argv, says):
    code, out, err = call(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("fastprune: error: ") and err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    "error", [ValueError("ratio is 2"), fastprune.errors.DataError("cifar10:\n  missing"), OSError("disk full")]
)
def test_errors_of_commands_are_one_line_and_code_1(capsys, monkeypatch, error):
    def fail(args):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "doctor", cli.COMMANDS["doctor"]._replace(run=fail))
    code, out, err = call(capsys, "doctor")
    assert (code, out) == (1, "")
    assert err == f"fastprune: error: {' '.join(str(error).split())}\n"
    for argv in (["--traceback", "doctor"], ["doctor", "--traceback"]):
        with pytest.raises(type(error)):
            cli.main(argv)


def test_errors_of_the_system_name_their_file(capsys, monkeypatch, tmp_path):
    def fail(args):
        (tmp_path / "none" / "x").write_text("")

    monkeypatch.setitem(cli.COMMANDS, "doctor", cli.COMMANDS["doctor"]._replace(run=fail))
    _, _, err = call(capsys, "doctor")
    assert err == f"fastprune: error: {tmp_path / 'none' / 'x'}: No such file or directory\n"


def test_interrupt(capsys, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "list", cli.COMMANDS["list"]._replace(run=interrupt))
    assert call(capsys, "list") == (130, "", "fastprune: interrupted\n")
    monkeypatch.setitem(cli.COMMANDS, "run", cli.COMMANDS["run"]._replace(run=interrupt))
    assert call(capsys, "run", "x") == (130, "", "fastprune: interrupted; --resume continues the run\n")


def test_a_gpu_that_is_too_small(capsys, monkeypatch):
    def allocate(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setitem(cli.COMMANDS, "list", cli.COMMANDS["list"]._replace(run=allocate))
    says = (
        "fastprune: error: the GPU has too little memory (CUDA out of memory); lower the batch size, or free the GPU\n"
    )
    assert call(capsys, "list") == (1, "", says)


def test_bug_is_not_hidden(monkeypatch):
    def bug(args):
        raise TypeError("a bug of ours")

    monkeypatch.setitem(cli.COMMANDS, "list", cli.COMMANDS["list"]._replace(run=bug))
    with pytest.raises(TypeError):
        cli.main(["list"])


def test_list(capsys):
    code, out, _ = call(capsys, "list")
    assert code == 0
    for name in ("vgg16-rni", "resnet56", "densenet201", "rni", "slimming", "ucs", "digits", "cifar100", "imagefolder"):
        assert f" {name}" in out
    _, only, _ = call(capsys, "list", "methods")
    assert "rni" in only and "digits" not in only


def test_list_into_a_closed_pipe():
    code = "import os, sys; from fastprune.cli import main; os.close(1); r, w = os.pipe(); os.close(r); os.dup2(w, 1)"
    code += "; sys.exit(main(['list']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_doctor(capsys):
    code, out, err = call(capsys, "doctor")
    assert (code, err) == (0, "")
    assert f"fastprune {fastprune.__version__}" in out
    for name, line in backends.report().items():
        assert name in out and line in out
    checked = dict(line.split(None, 1) for line in out.partition("self-check")[2].splitlines()[1:])
    assert "eager" in checked and ("cpp" in checked) == bool(backends.build_info())
    for name, text in checked.items():
        assert "WRONG" not in text and "batch_norm_act ok" in text
        assert "scale_penalty ok" in text or name == "cuda"  # which has one op


def test_doctor_checks_every_op():
    assert set(doctor.CHECKS) == set(backends.PREFERENCE)


def test_doctor_notices_a_wrong_kernel(capsys, monkeypatch):
    truth = doctor.CHECKS["batch_norm_act"]
    wrong = lambda inputs, name: [t + (name == "cpp") * 1e-4 for t in truth(inputs, name)]  # noqa: E731
    monkeypatch.setitem(doctor.CHECKS, "batch_norm_act", wrong)
    monkeypatch.setattr(doctor, "_usable", lambda name: name == "cpp")
    code, out, _ = call(capsys, "doctor")
    assert code == 1 and "batch_norm_act WRONG (1.0e-04)" in out and "cpp computes wrong results" in out


def test_doctor_notices_nan(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "self_check", lambda op, name: float("nan"))
    assert call(capsys, "doctor")[0] == 1


def test_doctor_says_what_a_backend_lacks(monkeypatch, capsys):
    def refuse(op, name):
        raise fastprune.BackendError("scale_penalty: backend 'cpp' cannot take it: it has no kernel of this op")

    monkeypatch.setattr(doctor, "self_check", refuse)
    code, out, _ = call(capsys, "doctor")
    assert code == 0 and "scale_penalty not there (it has no kernel of this op)" in out


def test_doctor_names_the_command_for_a_missing_package(capsys, monkeypatch):
    monkeypatch.setitem(doctor.OPTIONAL, "no-such-package", "nothing")
    assert "not installed (nothing): pip install no-such-package" in call(capsys, "doctor")[1]


def test_quickstart_end_to_end(capsys, monkeypatch, tmp_path):
    """All nine runs on a few images for one epoch: files, rows, picture; the numbers themselves mean nothing."""
    whole = quickstart.data.load
    monkeypatch.setattr(quickstart.data, "load", lambda name: whole(name, limit=150))
    code, out, _ = call(capsys, "quickstart", "--out", str(tmp_path / "a" / "b"), "--epochs", "1", "--seed", "3")
    assert code == 0
    out_dir = tmp_path / "a" / "b"
    results = json.loads((out_dir / "results.json").read_text())
    assert results["setup"]["epochs"] == 1 and results["setup"]["seed"] == 3
    runs = [(row["method"], row["ratio"]) for row in results["rows"]]
    assert runs == list(itertools.product(("rni", "l1", "ucs"), (0.5, 0.9)))
    for row in results["rows"]:
        dense, pruned = row["dense"], row["pruned"]
        for key in ("macs", "params"):  # both shrink with the square of the width, the last layer with the width
            assert pruned[key] < dense[key] * (1 - row["ratio"])
        assert dense["latency_ms"] > 0 and pruned["latency_ms"] > 0
        assert 0 <= pruned["acc"] <= 1 and row["acc_best"] >= row["acc_last"]
    table = (out_dir / "results.md").read_text()
    assert table in out and table.count("\n") == 8
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned
    assert (out_dir / "importances.png").read_bytes()[:4] == b"\x89PNG"
    assert (out_dir / "l1" / "prune-0.9" / "metrics.jsonl").is_file()
    assert "before fine-tuning. 50% removed: rni " in out and "; 90% removed: rni " in out


def test_quickstart_names_missing_packages(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "find_spec", lambda module: None)
    code, _, err = call(capsys, "quickstart", "--out", str(tmp_path / "x"))
    assert code == 1 and "pip install scikit-learn matplotlib" in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_quickstart_into_a_file_says_so(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call(capsys, "quickstart", "--out", str(tmp_path / "file"))
    assert code == 1 and "file" in err and err.count("\n") == 1


def test_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "fastprune", "doctr"], capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'doctor'?" in done.stderr and "Traceback" not in done.stderr
