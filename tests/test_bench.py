"""The bench harness: its numbers, its refusal to time what is broken, its result files, what the benches compare."""

import json
import os
import platform
import re
import sys
import threading

import pytest
import torch
from bn_cases import BACKENDS, device_for
from PIL import Image
from step_recorder import Recorder
from torch import nn

import fastprune as fp
from bench import gpu_page, harness, table
from bench.e2e import (
    growing,
    growing_cifar10,
    iterative,
    latency,
    methods,
    recipes_cifar10,
    statistics,
    step,
    trainability,
)
from bench.ops import batch_norm_act as op_bench
from bench.ops import channel_gate as gate_bench
from bench.ops import filter_norm as filter_bench
from bench.ops import gram_penalty as gram_bench
from bench.ops import growing_sgd as sgd_bench
from bench.ops import masked_conv2d as conv_bench
from fastprune import backends, models, recipes
from fastprune.capture import CapturedStep

# ---- numbers


def test_spread_and_speedup():
    assert harness.spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == (3.5, 2.0, 5.0)
    samples = {"slow": [4.0, 8.0, 6.0, 6.0, 6.0, 6.0], "fast": [2.0, 2.0, 2.0, 3.0, 3.0, 6.0]}
    # medians 6 and 2.5; rounds 2, 4, 3, 2, 2, 1
    assert harness.speedup(samples, "fast", over="slow") == {"ratio": 2.4, "median": 2.0, "p20": 2.0, "p80": 3.0}


def test_interleaving_goes_round_all_in_a_shuffled_order():
    durations, log = {"a": 10.0, "b": 2500.0, "c": 90000.0}, []

    def clock(call, n):
        log.append((call, n))
        return durations[call]

    calls = {name: name for name in durations}
    samples = harness.interleave(calls, rounds=8, sample_s=0.005, clock=clock)
    assert samples == {name: [us] * 8 for name, us in durations.items()}
    assert log[:6] == [("a", 1), ("a", 1), ("b", 1), ("b", 1), ("c", 1), ("c", 1)]
    rounds = [log[i : i + 3] for i in range(6, len(log), 3)]
    assert len(rounds) == 8 and all(sorted(r) == [("a", 500), ("b", 2), ("c", 1)] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1  # not always the same order
    first, log[:] = list(log), []
    harness.interleave(calls, rounds=8, sample_s=0.005, clock=clock)
    assert log == first  # but the same order in the next run
    with pytest.raises(ValueError, match="at least 7 rounds, got 6"):
        harness.interleave(calls, rounds=6, clock=clock)


@pytest.mark.parametrize("clock", [harness.wall_clock, harness.process_clock])
def test_the_clocks_divide_by_the_calls(clock):
    ticks, calls = iter([10.0, 10.5]), []
    assert clock(lambda: calls.append(1), 1000) > 0 and len(calls) == 1000
    assert harness.wall_clock(lambda: None, 1000, lambda: next(ticks)) == 500.0
    option = ["--cpu-time"] if clock is harness.process_clock else []
    assert harness.clock_for(harness.arguments("", []).parse_args(option)) is clock


def test_cpu_time_is_for_one_thread_and_has_rows_of_its_own():
    args = harness.arguments("", []).parse_args(["--cpu-time", "--threads", "2", "--no-gate"])
    with pytest.raises(SystemExit, match="one thread"):
        harness.start(args)
    assert harness.setting(args, "tuned") == {"threads": 2, "allocator": "tuned", "clock": "process"}


def test_rows_carry_traffic_and_ratios():
    samples = {"eager": [40.0] * 7, "ours": [10.0] * 7, "copy": [5.0] * 7}
    traffic = {"eager": 100_000, "ours": 100_000, "copy": 100_000}
    eager, ours, copied = harness.rows_of("op", {"shape": "1x2"}, samples, {"ours": ["eager"]}, traffic)
    assert ours["us"] == 10.0 and ours["gb_per_s"] == 10.0 and copied["gb_per_s"] == 20.0 and ours["of_copy"] == 0.5
    assert ours["speedup"]["eager"]["ratio"] == 4.0 and "speedup" not in eager
    assert ours["rounds"] == 7 and ours["case"] == {"shape": "1x2"}


# ---- tests first


@pytest.fixture
def fake_op(tmp_path):
    """A folder with the tests of an op, one green and one red."""
    (tmp_path / "test_green.py").write_text(
        "import os\ndef test_it(): assert 'eager' in os.environ['FASTPRUNE_TEST_BACKENDS']\n"
    )
    (tmp_path / "test_red.py").write_text("def test_it(): assert 1 + 1 == 3, 'wrong kernel'\n")
    return tmp_path


def test_a_green_op_may_be_timed(fake_op, capsys):
    harness.check(["test_green.py"], root=fake_op)
    assert "1 passed" in capsys.readouterr().out


@pytest.mark.parametrize("selection", [["test_red.py"], ["test_green.py", "-k", "nothing"], ["test_missing.py"]])
def test_a_red_or_untested_op_is_not_timed(fake_op, capsys, selection):
    with pytest.raises(SystemExit, match="nothing was timed"):
        harness.check(selection, root=fake_op)
    assert ("wrong kernel" in capsys.readouterr().err) == (selection == ["test_red.py"])


def test_a_bench_of_a_red_op_writes_nothing(fake_op, monkeypatch):
    monkeypatch.setattr(op_bench, "run", lambda *args: pytest.fail("it was timed"))
    arguments = harness.arguments
    monkeypatch.setattr(harness, "arguments", lambda text, tests: arguments(text, [str(fake_op / "test_red.py")]))
    monkeypatch.setattr(sys, "argv", ["bench", "--backend", "eager", "--quick", "--out", str(fake_op / "out")])
    with pytest.raises(SystemExit, match="nothing was timed"):
        op_bench.main()
    assert not (fake_op / "out").exists()


def test_a_backend_that_is_missing_is_not_timed(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda *args: "it was not built")
    for main in (op_bench.main, step.main, statistics.main):
        monkeypatch.setattr(sys, "argv", ["bench", "--no-gate"])
        with pytest.raises(SystemExit, match="backend cpp cannot run here: it was not built"):
            main()


# ---- results


def test_rows_are_appended_whole_by_many_writers(tmp_path):
    path = tmp_path / "new" / "op.jsonl"

    def write(writer):
        for n in range(20):
            harness.append(path, [{"writer": writer, "n": n, "row": r, "fill": "x" * 3000} for r in range(3)])

    writers = [threading.Thread(target=write, args=(w,)) for w in range(6)]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 6 * 20 * 3
    for i in range(0, len(rows), 3):  # the three of one call stay together
        assert [r["row"] for r in rows[i : i + 3]] == [0, 1, 2] and len(
            {(r["writer"], r["n"]) for r in rows[i : i + 3]}
        ) == 1


def test_a_bad_row_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "op.jsonl"
    harness.append(path, [{"us": 1.0}])
    with pytest.raises(ValueError):
        harness.append(path, [{"us": 2.0}, {"us": float("nan")}])
    assert path.read_text() == '{"us": 1.0}\n'


def test_provenance_says_enough_and_nothing_private(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["step.py", "--out", "/home/somebody/results", "--shapes", "1x2x3x4"])
    facts = harness.provenance("cpu", verified=False)
    for name in (
        "commit",
        "dirty",
        "device",
        "isa",
        "threads",
        "malloc",
        "load",
        "torch",
        "date",
        "command",
        "extension",
    ):
        assert name in facts
    assert facts["verified"] is False and facts["threads"] == torch.get_num_threads()
    text = json.dumps(facts)
    assert facts["command"].endswith("--out results --shapes 1x2x3x4")
    assert "somebody" not in text and str(harness.ROOT) not in text
    assert not platform.node() or platform.node() not in text.replace(facts["command"], "")


@pytest.mark.parametrize(
    "model, folder",
    [
        ("AMD EPYC", "amd-epyc-2c"),
        ("Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz", "intel-xeon-platinum-8370c-2c"),
        ("AMD EPYC 7763 64-Core Processor", "amd-epyc-7763-64-core-2c"),
    ],
)
def test_results_are_filed_by_device_model(monkeypatch, model, folder):
    monkeypatch.setattr(harness, "device_model", lambda device: model)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert harness.device_folder("cpu") == folder


def result(impl, us, date="2026-01-02T00:00:00Z", **extra):
    facts = {"device": "AMD EPYC", "isa": "AVX2", "torch": "2.11.0", "commit": "abc", "dirty": False, "verified": True}
    return {
        "bench": "op",
        "case": {"shape": "1x2", "dtype": "float32"},
        "impl": impl,
        "us": us,
        "provenance": facts | {"date": date},
    } | extra


def test_tables_show_the_latest_row_of_each_case(tmp_path, capsys, monkeypatch):
    faster = {"speedup": {"eager": {"ratio": 2.5}}, "metrics": {"calls": 1810}}
    rows = [result("eager", 99.0, "2026-01-01T00:00:00Z"), result("eager", 50.0), result("ours", 20.0, **faster)]
    rows += [r | {"case": {"shape": "3x4", "dtype": "float32"}} for r in (result("eager", 1234.5),)]
    path = tmp_path / "amd" / "op.jsonl"
    harness.append(path, rows)
    text = table.render(table.latest([path]))
    head, _, names, _, first, second = text.splitlines()
    assert "**op**: dtype float32, device AMD EPYC, isa AVX2, torch 2.11.0, commit abc; 2026-01-0" in head
    assert "NOT VERIFIED" not in head and "uncommitted" not in head
    assert names == "| shape | eager, us | ours, us | calls |"
    assert first == "| 1x2 | 50 | 20 (2.50x eager) | ours 1,810 |"
    assert second == "| 3x4 | 1,234 |  |  |"
    monkeypatch.setattr(sys, "argv", ["table", str(path), "--where", "shape=3x4"])
    table.main()
    printed = capsys.readouterr().out
    assert "1,234" in printed and "2.50x" not in printed


def test_tables_admit_what_is_not_verified():
    row = result("eager", 1.0)
    row["provenance"] |= {"verified": False, "dirty": True}
    assert "uncommitted changes, NOT VERIFIED by tests" in table.render([row])


def test_a_damaged_result_file_is_named_by_line(tmp_path):
    path = tmp_path / "op.jsonl"
    path.write_text(json.dumps(result("eager", 1.0)) + '\n{"bench": "op", "ca\n')
    with pytest.raises(ValueError, match=r"op\.jsonl:2 is not a result row"):
        table.latest([path])


# ---- the benches


@pytest.mark.parametrize("what", op_bench.TRAFFIC)
@pytest.mark.parametrize("layout", op_bench.LAYOUTS)
def test_contestants_compute_the_same(what, layout):
    x = torch.randn(4, 5, 6, 7).to(memory_format=op_bench.LAYOUTS[layout])
    others = [op_bench.PER_CHANNEL] if "triton" in BACKENDS else []
    calls = op_bench.contestants(what, x, {"fastprune": "eager"}, others)
    names = {"eager", "fastprune", "copy"} | (set(others) if what != "eval" else set())
    names |= {"eager+gates", "fastprune+gates", "fastprune+gates+abs"} if what in ("relu", "add") else set()
    names |= {"fastprune+gates+out"} if what == "add" else set()
    assert set(calls) == names
    with torch.set_grad_enabled(what != "eval"):
        results = {name: call() for name, call in calls.items()}
    assert torch.equal(results.pop("copy"), x)
    for found in results.values():
        assert len(found) == len(results["eager"])
        torch.testing.assert_close(found, results["eager"])


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not under test")
@pytest.mark.parametrize("layout", op_bench.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (5, 3, 1, 2), (2, 1, 50, 45)])  # ragged tiles of each kind
def test_the_batch_norm_per_channel_is_right(shape, dtype, layout):
    from bench.ops import per_channel

    device = device_for("triton")
    x = (2 + torch.randn(shape, device=device)).to(dtype, memory_format=op_bench.LAYOUTS[layout]).requires_grad_()
    weight, bias, dy = torch.rand(shape[1], device=device), torch.rand(shape[1], device=device), torch.randn_like(x)
    leaves = [x, weight.requires_grad_(), bias.requires_grad_()]
    stats = [torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)]
    y = per_channel.batch_norm(x, weight, bias, *stats)
    found = [y, *torch.autograd.grad(y, leaves, dy), *stats]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    stats = [torch.zeros_like(wide[1]), torch.ones_like(wide[1])]
    y = torch.nn.functional.batch_norm(wide[0], *stats, *wide[1:], training=True)
    exact = [y, *torch.autograd.grad(y, wide, dy.double()), *stats]
    rounding = 2e-3 if dtype == torch.float16 else 2e-5
    for mine, right in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=rounding, atol=rounding * right.abs().max().item())


def test_the_bench_on_a_gpu_times_every_backend(tmp_path):
    """As with --device cuda, on the CPU: both are eager, what is looked at is what is compared and counted."""
    args = harness.arguments("", []).parse_args(["--no-gate", "--rounds", "7", "--out", str(tmp_path)])
    vars(args).update(
        shapes=[(2, 3, 4, 4)], dtypes=["float32"], layouts=["nchw"], what=["relu"], sample_ms=0.1, compile=False,
        per_channel=False, names={"triton": "eager", "cuda": "eager"},
    )  # fmt: skip
    rows = {row["impl"]: row for row in op_bench.run(args, "default")}
    ours = {f"{b}{g}" for b in args.names for g in ("", op_bench.GATES, op_bench.ABS)}
    assert set(rows) == ours | {"eager", "eager+gates", "copy"}
    assert set(rows["cuda+gates"]["speedup"]) == {"cuda", "eager+gates"} and set(rows["triton"]["speedup"]) == {"eager"}
    text = op_bench.summary(list(rows.values()), list(args.names), op_bench.GPU_GOALS)
    for line in ("ReLU, bandwidth: cuda against copy, 1 cases", "gradients: triton+gates against triton, 1 cases"):
        assert line in text


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not under test")
def test_the_bench_counts_what_the_kernels_move(tmp_path):
    args = harness.arguments("", []).parse_args(["--no-gate", "--rounds", "7", "--out", str(tmp_path)])
    vars(args).update(
        shapes=[(1, 2, 2, 2)], dtypes=["float32"], layouts=["nhwc"], what=["bn"], sample_ms=0.1, compile=False,
        per_channel=False, device=device_for("triton"), names={"triton": "triton"},
    )  # fmt: skip
    rows = {row["impl"]: row for row in op_bench.run(args, "default")}
    mine = rows["triton"]
    assert set(mine["path"]) == {"forward", "backward"} and "moved_of_copy" not in rows["eager"]
    # a small layer is read and written once, which is also the least there is
    assert mine["moved_gb_per_s"] == mine["gb_per_s"] and mine["moved_of_copy"] == mine["of_copy"]


def test_gate_gradients_of_eager_hook_and_op_agree():
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(3, 4, 5, 6, requires_grad=True) for _ in range(3))
    weight, bias = torch.rand(4, requires_grad=True), torch.rand(4, requires_grad=True)
    state = [torch.zeros(4), torch.ones(4), torch.tensor(0)]
    gates = [torch.empty(3, 4) for _ in range(2)]
    y = op_bench.eager_with_hook(x, weight, bias, *state, residual, gates[0])
    torch.autograd.grad(y, (x, weight, bias, residual), dy)
    z = op_bench.ops.batch_norm_act(
        *(x, weight, bias, *state), residual=residual, act="relu", gate_grad=gates[1], backend="eager"
    )
    torch.autograd.grad(z, (x, weight, bias, residual), dy)
    torch.testing.assert_close(*gates)


@pytest.mark.parametrize("what", gate_bench.TRAFFIC)
def test_the_gate_bench_compares_equals(what):
    calls = gate_bench.contestants(what, torch.randn(4, 5, 6, 7), "eager")
    for a, b in zip(calls[gate_bench.EAGER](), calls[gate_bench.OURS](), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("what", ["l1", "l2", "l1 inputs", "taylor"])
def test_the_filter_bench_compares_equals(what):
    calls = filter_bench.contestants(what, [torch.randn(4, 3, 3, 3), torch.randn(5, 4)], "eager")
    torch.testing.assert_close(torch.cat(calls[filter_bench.EAGER]()), calls[filter_bench.OURS]())


def test_the_optimizer_bench_compares_equals():
    calls = sgd_bench.contestants([torch.randn(4, 3, 3, 3), torch.randn(5, 4), torch.randn(6)])
    for names in ((sgd_bench.LOOP, sgd_bench.OURS), (sgd_bench.FOREACH, sgd_bench.FUSED, sgd_bench.PLAIN)):
        first, *others = [calls[name]() for name in names]
        for other in others:
            torch.testing.assert_close(other, first)
    assert not first[0][:1].equal(calls[sgd_bench.OURS]()[0][:1])  # the first filter is cut


def test_the_gram_bench_compares_equals_and_counts_products():
    weights, keep = [torch.randn(4, 3, 3, 3), torch.randn(5, 4, 1, 1)], [torch.arange(4) > 2, torch.ones(5).bool()]
    values, grads = zip(*(call() for call in gram_bench.contestants(weights, keep, "eager").values()), strict=True)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads)
    # 3 of 4 cut, 27 columns: 6 + 3 products for G, 12 + 3 for the gradient
    assert gram_bench.operations(weights, keep) == {"eager": 6 * (16 * 27 + 25 * 4), "fastprune": 2 * 27 * 24}


def test_the_op_bench_runs_and_files_its_rows(tmp_path, monkeypatch, capsys):
    argv = "bench --no-gate --backend eager --shapes 2x3x4x4 --dtypes float32 --sample-ms 0.1 --rounds 7 --out"
    monkeypatch.setattr(sys, "argv", [*argv.split(), str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        op_bench.main()
    finally:
        torch.set_num_threads(threads)
    rows = table.latest([tmp_path / "batch_norm_act.jsonl"])
    assert len(rows) == 2 * (6 + 7 + 3 + 3) and not any(r["provenance"]["verified"] for r in rows)
    assert {r["case"]["allocator"] for r in rows} == {"default"}
    assert "ReLU, x up to 8 MB: fastprune against eager, 2 cases: least" in capsys.readouterr().out


def test_the_summary_names_what_misses():
    def row(what, shape, ratio):
        case = {"what": what, "shape": shape, "dtype": "float32", "layout": "nchw", "allocator": "tuned"}
        return {"case": case, "impl": "fastprune", "speedup": {"eager": {"ratio": ratio}}}

    text = op_bench.summary([row("relu", "1x1x1x1", 1.5), row("relu", "2x1x1x1", 9.0), row("relu", "64x64x56x56", 2.1)])
    assert "ReLU, x up to 8 MB: fastprune against eager, 2 cases: least 1.50x (goal 2.00), median 5.25x" in text
    assert "1 missed\n    1.50x  relu 1x1x1x1 float32 nchw tuned" in text
    assert "x over 8 MB, allocator tuned: fastprune against eager, 1 cases: least 2.10x" in text
    assert "median missed" in text.splitlines()[-1]  # 2.1 against 3.5
    assert "batch norm alone" not in text  # nothing measured, nothing said


@pytest.mark.parametrize("layout", conv_bench.LAYOUTS)
def test_contestants_of_masked_conv2d_compute_the_same(layout):
    torch.manual_seed(0)
    calls = conv_bench.contestants((2, 8, 5, 4), 0.5, torch.float64, conv_bench.LAYOUTS[layout], "cpu", "eager")
    assert set(calls) == {"fastprune", "eager", "smaller"}
    results = {name: call() for name, call in calls.items()}
    torch.testing.assert_close(results["fastprune"], results["eager"])
    dx, dweight = results["eager"]
    live_in, live_out = dx.any(3).any(2).any(0), dweight.flatten(1).any(1)
    torch.testing.assert_close(results["smaller"], (dx[:, live_in], dweight[live_out][:, live_in]))


def test_the_bench_of_masked_conv2d_runs_and_files_its_rows(tmp_path, monkeypatch, capsys):
    argv = "bench --no-gate --backend eager --shapes 2x4x4x4 --dtypes float32 --sample-ms 0.1 --rounds 7 --out"
    monkeypatch.setattr(sys, "argv", [*argv.split(), str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        conv_bench.main()
    finally:
        torch.set_num_threads(threads)
    rows = table.latest([tmp_path / "masked_conv2d.jsonl"])
    assert len(rows) == 2 * 3 * 3 and "75% dead, 2 cases:" in capsys.readouterr().out


def test_calls_are_counted_forward_and_backward():
    x, w = torch.randn(2, 3), torch.randn(3, 4, requires_grad=True)

    def run():
        (x @ w).relu().sum().backward()

    # forward mm, relu, detach, sum; backward ones_like, expand, detach, threshold_backward, t, mm, detach
    assert step.count_calls(run) == {"aten": 11}
    model = nn.Sequential(*(nn.ReLU() for _ in range(5)))
    assert step.count_calls(lambda: model(x)) == {"aten": 5}


def test_peak_bytes_are_exact():
    def run():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(2 << 20, dtype=torch.uint8)
        del a
        c = torch.empty(4 << 20, dtype=torch.uint8)
        del b, c
        torch.empty(5 << 20, dtype=torch.uint8)

    assert step.peak_bytes(run) == 6 << 20


@pytest.mark.parametrize("impl", step.IMPLS)
def test_a_step_trains(impl):
    torch.manual_seed(0)
    model = models.create("vgg-small", in_channels=3)
    x, target = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
    before = [p.clone() for p in model.parameters()]
    run = step.make_step(impl, model, x, target)
    first, *_, last = [run() for _ in range(8)]
    assert last < first
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))  # it works on a copy
    if impl == "fused":
        torch.testing.assert_close(first, step.make_step("eager", model, x, target)(), rtol=1e-4, atol=1e-4)


def test_converted_steps_dispatch_less():
    torch.manual_seed(0)
    model = models.create("resnet20")
    x, target = torch.randn(2, 3, 16, 16), torch.randint(10, (2,))
    calls = {impl: step.count_calls(step.make_step(impl, model, x, target)) for impl in ("eager", "fused")}
    assert calls["eager"]["fastprune"] == 0 and calls["eager"]["aten"] > 200
    assert sum(calls["fused"].values()) < calls["eager"]["aten"]


def test_resident_memory_is_that_of_the_child_alone():
    args = harness.arguments("", []).parse_args([])
    args.batch = 2
    ours = torch.ones(200 << 20, dtype=torch.uint8)  # more than the child needs: ru_maxrss would inherit it
    grown = step.resident_elsewhere(args, "resnet56", "eager", tuned=False)
    assert 1 < grown < ours.nbytes / step.MB, grown


def small(name="resnet20", dtype=torch.float32):
    torch.manual_seed(0)
    return models.create(name).to(dtype), torch.randn(6, 3, 16, 16, dtype=dtype), torch.randint(10, (6,))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, statistics.TOLERANCE)])
def test_statistics_and_hooks_agree(dtype, bound):
    assert max(statistics.disagreement(*small(dtype=dtype)).values()) < bound


def test_statistics_that_differ_are_not_timed(monkeypatch):
    def half(self):
        return whole(self) / 2

    whole = statistics.HookStatistics.take
    monkeypatch.setattr(statistics.HookStatistics, "take", half)
    monkeypatch.setattr(statistics, "setup", lambda *args: small())
    monkeypatch.setattr(harness, "interleave", lambda *args, **kw: pytest.fail("it was timed"))
    args = harness.arguments("", []).parse_args([])
    args.batch = 6
    with pytest.raises(SystemExit, match=r"differ by .*nothing was timed"):
        statistics.bench(args, "resnet56", "default")


@pytest.mark.parametrize("impl", [impl for impl, base in statistics.BASES.items() if base])
def test_statistics_leave_the_training_as_it_is(impl):
    mine, plain = (statistics.make_step(i, *small())[0] for i in (impl, statistics.BASES[impl]))
    assert [mine() for _ in range(4)] == [plain() for _ in range(4)]


def test_statistics_add_few_operators_whatever_the_depth():
    added = {}
    for net in ("resnet20", "resnet56"):
        calls = {}
        for impl in ("fused", "statistics", "statistics-code", "method"):
            run, _ = statistics.make_step(impl, *small(net))
            run(), run()  # the second has buffers and momentum, as any later one
            calls[impl] = statistics.count_calls(run)
        plain = calls.pop("fused")
        added[net] = {
            impl: (c["aten"] - plain["aten"], c["fastprune"] - plain["fastprune"]) for impl, c in calls.items()
        }
    assert added["resnet20"] == added["resnet56"]
    assert all(aten <= 10 and ours <= 2 for aten, ours in added["resnet20"].values()), added


def test_the_statistics_bench_runs_and_writes_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "setup", lambda *args: small())
    argv = f"bench --no-gate --batch 6 --allocator default --rounds 7 --out {tmp_path} --page {tmp_path / 'page.md'}"
    monkeypatch.setattr(sys, "argv", argv.split())
    monkeypatch.setattr(backends, "why_not", lambda *args: None)
    threads = torch.get_num_threads()
    try:
        statistics.main()
    finally:
        torch.set_num_threads(threads)
    rows = {row["impl"]: row for row in table.latest([tmp_path / "statistics.jsonl"])}
    assert set(rows) == set(statistics.BASES)
    assert {impl for impl, row in rows.items() if "cost" in row} == {"statistics", "statistics-code", "method", "hooks"}
    assert rows["hooks"]["cost"]["over"] == "eager" and max(rows["statistics"]["disagreement"].values()) < 1e-2
    text = (tmp_path / "page.md").read_text()
    assert "| goal | | | statistics | fused | at most 1.03x | at most 1.01x | at most 10 |" in text
    assert "NOT VERIFIED" in text


def test_the_statistics_page_shows_what_was_missed():
    cost = {"over": "fused", "time": {"ratio": 1.2, "median": 1.2, "p20": 1.1, "p80": 1.3}, "peak": 1.005}
    row = result("statistics", 1.0, cost=cost, metrics={"aten_calls_added": 11})
    row["case"] |= {"net": "resnet56", "allocator": "tuned"}
    text = statistics.page([row])
    assert "| resnet56 | AMD EPYC | tuned | statistics | fused | 1.200x (1.200, 1.100-1.300) | 1.0050x | 11 |" in text
    missed = [line for line in text.splitlines() if line.startswith("- resnet56")]
    assert [line.split(": ")[1] for line in missed] == ["time 1.2, goal 1.03", "aten_calls_added 11, goal 10"]
    cost["time"]["ratio"], row["metrics"]["aten_calls_added"] = 1.03, 10
    assert "No goal was missed." in statistics.page([row])


def test_the_iterative_bench_runs_and_writes_its_page(tmp_path, monkeypatch):
    argv = "bench --arch wrn-40-2 --depth 10 --width 0.5 --limit 200 --epochs 1 --steps 30 --frequency 3 --per-cut 4"
    argv += " --ratio 0.5 --shrink-every 2 --batch-size 20 --points 3 --scratch 1 --out"
    monkeypatch.setattr(sys, "argv", [*argv.split(), str(tmp_path / "iterative")])
    monkeypatch.setattr(iterative.fp, "tune_cpu_memory", lambda: None)  # it would stay on for the tests that follow
    threads = torch.get_num_threads()
    try:
        iterative.main()
    finally:
        torch.set_num_threads(threads)
    rows = iterative.newest(tmp_path / "iterative" / "rows.jsonl")
    assert [row["case"]["method"] for row in rows] == ["fisher", "taylor-gate"]
    for row in rows:
        for setting in ("on", "off"):
            found = row[setting]
            assert found["repeats_agree"] and len(found["seconds_each"]) == 2
            assert found["removed"] >= 28 and found["cuts"] >= 7
            assert found["test_acc"] == found["test_acc_compact"]
            assert found["params"] < row["before"]["params"] and found["macs"] < row["before"]["macs"]
            assert [mark["step"] for mark in found["over_time"]] == [10, 20, 30]
        # Up to the first removal, at the second cut, both do the same arithmetic.
        assert (row["masks"]["first_cut_that_differs"] or 3) > 2
        assert 0 <= row["scratch"]["test_acc"] <= 1
    page = (tmp_path / "iterative.md").read_text()
    assert page.count("| fisher | on |") == page.count("| taylor-gate | off |") == 1
    assert "digits, wrn-40-2, depth 10, width 0.5" in page and "from scratch, 1 epochs" in page


def test_masks_are_compared_cut_by_cut():
    def masks(*lost):
        return {"a": torch.tensor([i not in lost for i in range(4)]), "b": torch.ones(2, dtype=torch.bool)}

    on = masks(0, 1, 2), {"history": [masks(0), masks(0, 1), masks(0, 1, 2)]}
    off = masks(0, 3, 2), {"history": [masks(0), masks(0, 3), masks(0, 3, 2)]}
    assert iterative.compare(on, on) == {"identical": True, "differ": 0, "of": 6, "first_cut_that_differs": None}
    assert iterative.compare(on, off) == {"identical": False, "differ": 2, "of": 6, "first_cut_that_differs": 2}


@pytest.mark.parametrize("name", ["greg-1", "tpp"])
@pytest.mark.parametrize("arch", ["resnet20", "vgg19"])
def test_growing_methods_and_loops_move_the_weights_alike(name, arch):
    torch.manual_seed(0)
    model = models.create(arch, **({"width": 0.25} if arch == "vgg19" else {}))
    for m in model.modules():
        if isinstance(m, nn.Conv2d):  # as where there are biases
            m.bias = nn.Parameter(torch.randn(m.out_channels))
    assert growing.disagreement(name, model, torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) < 1e-10


def test_growing_methods_that_differ_are_not_timed(monkeypatch):
    def half(self):
        return whole(self) / 2

    whole = growing.LayerLoop.penalty
    monkeypatch.setattr(growing.LayerLoop, "penalty", half)
    monkeypatch.setattr(growing, "setup", lambda *args: small())
    monkeypatch.setattr(harness, "interleave", lambda *args, **kw: pytest.fail("it was timed"))
    args = harness.arguments("", []).parse_args([])
    args.batch = 6
    with pytest.raises(SystemExit, match=r"differ by .*nothing was timed"):
        growing.bench(args, "resnet56", "default")


@pytest.mark.parametrize("name", growing.METHODS)
def test_growing_adds_few_operators_whatever_the_depth(name):
    try:
        growing.need_kernels("cpu")
    except SystemExit as missing:
        pytest.skip(str(missing))
    added = {"aten_calls": [], "aten_calls_update": []}
    for blocks in (1, 3):
        model = models.resnet_cifar.ResNetCIFAR(blocks, 10, 3, None, stem_relu=True)
        problem = model, torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
        plain, mine = (growing.metrics_of(impl, *problem) for impl in ("eager", name))
        for kind, found in added.items():
            found.append(mine[kind] - plain["aten_calls"])
    for shallow, deep in added.values():
        assert shallow == deep <= growing.CALLS_GOAL, added


def test_the_growing_bench_runs_and_writes_its_page(tmp_path, monkeypatch):
    torch.manual_seed(0)
    problem = models.create("vgg-small", in_channels=3), torch.randn(6, 3, 8, 8), torch.randint(10, (6,))
    monkeypatch.setattr(growing, "setup", lambda *args: problem)
    argv = "bench --no-gate --batch 6 --interval 2 --allocator default --rounds 7"
    monkeypatch.setattr(sys, "argv", [*argv.split(), "--out", str(tmp_path), "--page", str(tmp_path / "page.md")])
    monkeypatch.setattr(growing, "need_kernels", lambda device: None)
    threads = torch.get_num_threads()
    try:
        growing.main()
    finally:
        torch.set_num_threads(threads)
    rows = {row["impl"]: row for row in table.latest([tmp_path / "growing.jsonl"])}
    assert set(rows) == set(growing.BASES)
    assert {impl for impl, row in rows.items() if "calls_added" in row["metrics"]} == {
        impl for impl, base in growing.BASES.items() if base
    }
    assert set(rows["tpp-fused"]["speedup"]) == {"eager", "loop-tpp"} and rows["tpp"]["disagreement"] < 1e-6
    assert rows["loop-tpp"]["metrics"]["calls_added"] > 10  # it works layer by layer
    text = (tmp_path / "page.md").read_text()
    assert text.count("| greg-2-fused |") == 1 and "at most 1.05x" in text and "NOT VERIFIED" in text


def test_the_bench_of_methods_runs_and_files_its_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(methods.NETS, "resnet56", (4, 8))
    monkeypatch.setattr(methods.models, "create", lambda net: fp.models.resnet_cifar.ResNetCIFAR(1, 10, 3, None, True))
    argv = "bench --no-gate --amp --interval 2 --layouts nhwc --rounds 7 --impls eager greg-1 tpp rni taylor-gate --out"
    monkeypatch.setattr(sys, "argv", [*argv.split(), str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        methods.main()
    finally:
        torch.set_num_threads(threads)
    rows = {row["impl"]: row for row in table.latest([tmp_path / "methods.jsonl"])}
    assert set(rows) == {"eager", *methods.METHODS} and rows["eager"]["cost"] == {}
    for name in methods.METHODS:
        cost = rows[name]["cost"]["eager"]
        assert cost["time"]["ratio"] > 0 and rows[name]["metrics"]["peak_mb"] > 0 and rows[name]["case"]["amp"]
        assert cost["peak"] == round(rows[name]["metrics"]["peak_mb"] / rows["eager"]["metrics"]["peak_mb"], 4)


@pytest.mark.parametrize("impl", methods.METHODS)
def test_steps_with_methods_train(impl):
    model, x, target = small()
    before = [p.clone() for p in model.parameters()]
    run = methods.make_step(impl, model, x, target, interval=2, amp=False)
    first, *_, last = [run().item() for _ in range(8)]
    assert last < first
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))  # it works on a copy


@pytest.mark.parametrize("impl", ["eager+graph", "greg-1+graph", "tpp+graph", "taylor-gate+graph"])
def test_steps_that_are_replayed_train(impl, monkeypatch):
    made = []

    def capture_step(model, criterion, optimizer, method, autocast):
        assert autocast is None
        made.append(CapturedStep(Recorder(), model, criterion, optimizer, method))
        return made[-1]

    model, x, target = small()
    with pytest.raises(ValueError, match="capture_step: expected a model on a CUDA device"):
        methods.make_step(impl, model, x, target, interval=2, amp=False)
    monkeypatch.setattr(methods.fp, "capture_step", capture_step)
    run = methods.make_step(impl, model, x, target, interval=2, amp=False)
    captures, replays = made[0].captures, made[0]._graph.replays
    first, *_, last = [run().item() for _ in range(8)]
    assert last < first and made[0].captures == captures >= 1 and made[0]._graph.replays == replays + 8


def test_the_committed_page_of_the_gpu_is_what_the_rows_say():
    rows = gpu_page.gpu_rows(sorted(harness.RESULTS.glob("*/*.jsonl")))
    assert gpu_page.PAGE.read_text() == gpu_page.page(rows)


def gpu_result(bench, impl, us, case, **extra):
    row = result(impl, us, **extra) | {"bench": bench, "case": case}
    row["provenance"] |= {"device": "NVIDIA H200", "cuda": "13.0"}
    return row


def test_the_page_of_the_gpu_shows_what_was_reached_and_what_not():
    nothing = gpu_page.page([])
    assert nothing.count(gpu_page.NOTHING) > 150 and "**missed**" not in nothing and "No GPU yet" in nothing
    case = {"what": "relu", "shape": "256x64x56x56", "dtype": "bfloat16", "layout": "nhwc", "allocator": "default"}
    over = {"eager": {"ratio": 1.3}, "torch.compile": {"ratio": 0.98}}
    rows = [
        gpu_result("batch_norm_act", "triton", 9.0, case, speedup=over, of_copy=0.7, moved_of_copy=0.91),
        gpu_result("batch_norm_act", "triton+gates", 9.3, case, speedup={"triton": {"ratio": 0.968}}),
        gpu_result("batch_norm_act", "cuda", 10.0, case, speedup={"eager": {"ratio": 1.2}}, of_copy=0.99),
    ]
    case = {"net": "resnet50", "batch": 256, "layout": "nhwc", "amp": True}
    cost = {"eager": {"time": {"ratio": 0.95}, "peak": 1.01}}
    rows.append(gpu_result("methods", "tpp", 1.0, case, cost=cost, metrics={"peak_mb": 2}))
    text = gpu_page.page(rows)
    cells = "0.910 | 1.300 | 0.980 **missed** | not yet measured | 1.033 **missed**"
    assert f"| 256x64x56x56 nhwc, triton | {cells} |" in text and "## NVIDIA H200" in text
    assert "| resnet50 nhwc tpp | 0.950 | 1.010 **missed** | not yet measured |" in text
    first, *missed = gpu_page.summary(rows).splitlines()
    assert first.startswith("3 goals reached, 3 missed, ") and len(missed) == 3
    assert "missed: 256x64x56x56 nhwc, triton: x torch.compile 0.980, goal 1" in "\n".join(missed)
    assert gpu_page.gpu_rows([]) == []


def test_the_growing_page_shows_what_was_missed():
    cost = {"over": "eager", "time": {"ratio": 1.06, "median": 1.06, "p20": 1.0, "p80": 1.1}, "peak": 1.005}
    speedup = {"eager": {"ratio": 0.943}, "loop-tpp": {"ratio": 1.5}}
    metrics = {"calls_added": 11, "our_calls": 2, "calls_added_update": 14, "our_calls_update": 3}
    row = result("tpp", 1.0, cost=cost, speedup=speedup, metrics=metrics)
    row["case"] |= {"net": "resnet56", "allocator": "tuned", "interval": 5}
    row["rounds"] = 7
    text = growing.page([row])
    cells = "1.060x (1.060, 1.000-1.100) | at most 1.05x | 1.500x | 1.0050x | 11 (2) | 14 (3) |"
    assert f"| resnet56 | AMD EPYC | tuned | 5 | 7 | tpp | {cells}" in text
    missed = [line for line in text.splitlines() if line.startswith("- resnet56")]
    assert [line.split(": ")[1] for line in missed] == ["time 1.06, goal 1.05", "11 ATen calls added, goal 10"]
    cost["time"]["ratio"], metrics["calls_added"] = 1.05, 10
    assert "No goal was missed." in growing.page([row])


def run_growing_cifar10(tmp_path, monkeypatch, *more):
    argv = "bench --arch resnet20 --limit 40 --batch-size 20 --epochs-base 1 --epochs 1 --reg-step 0.5 --pick-step 0.01"
    argv += f" --stabilize 4 --zero-out-interval 0 --runs {tmp_path} --out {tmp_path / 'growing'}"
    monkeypatch.setattr(sys, "argv", [*argv.split(), *more])
    monkeypatch.setattr(growing_cifar10.fp, "tune_cpu_memory", lambda: None)
    threads = torch.get_num_threads()
    try:
        growing_cifar10.main()
    finally:
        torch.set_num_threads(threads)
    return iterative.newest(tmp_path / "growing" / "rows.jsonl")


def test_growing_on_images_runs_goes_on_and_writes_its_page(tmp_path, monkeypatch, capsys):
    first = run_growing_cifar10(tmp_path, monkeypatch, "--seeds", "0", "--methods", "l1", "greg-1")
    assert "done before" not in capsys.readouterr().out
    rows = run_growing_cifar10(tmp_path, monkeypatch, "--seeds", "0", "1")
    assert capsys.readouterr().out.count("done before") == 2 and rows[:2] == first
    cases = [(row["case"]["method"], row["case"]["seed"]) for row in rows]
    assert sorted(cases) == sorted((method, seed) for method in growing_cifar10.OPTIONS for seed in (0, 1))
    for row in rows:
        assert list(row["kept"].values()) == [1, 1, 1, 3, 3, 3, 6, 6, 6]  # what 0.9 leaves of 16, 32, 64
        assert row["macs"] < row["base"]["macs"] / 5 and row["base"] == first[0]["base"]
        assert row["acc_last"] <= row["acc_best"] and (row["steps"] > 0) == (row["case"]["method"] != "l1")
    steps = {row["case"]["method"]: row["steps"] for row in rows}
    assert steps["l1+steps"] == steps["tpp"]
    text = (tmp_path / "growing.md").read_text()
    assert "3x1, 3x3, 3x6" in text and text.count("| tpp | 2 |") == 1 and "Seeds 0, 1." in text
    assert text.count(" here, ") == len(growing_cifar10.CLAIMS)


def test_growing_says_whether_the_papers_order_holds():
    def runs(best, last):
        return [{"acc_best": b, "acc_last": x} for b, x in zip(best, last, strict=True)]

    of = {"l1": runs([0.5, 0.6], [0.4, 0.5]), "tpp": runs([0.6, 0.7], [0.4, 0.4]), "greg-1": runs([0.5, 0.4], [0, 0])}
    first, second = growing_cifar10.verdicts(of)
    assert "greg-1 above l1" in first and "does not hold here, -10.00 points" in first
    assert "tpp above l1" in second and "holds here, +10.00 points after fine-tuning (last epoch -5.00)" in second


def test_shortened_recipes_run_go_on_and_write_their_pages(tmp_path, monkeypatch, capsys):
    for name, changes in recipes_cifar10.RUNS.items():
        assert recipes.load(name, changes=recipes_cifar10.DATA | changes).name == name
    assert recipes_cifar10.of_systems(["taylor"]) == ["greg/resnet56-cifar10-base", "taylor/resnet50-imagenet-72"]
    for i in range(40):
        folder = tmp_path / "images" / ("train" if i < 30 else "test") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 50).convert("RGB").save(folder / f"{i}.png")
    small = {"train.batch_size": 10, "train.epochs": 1}
    quick = {"prune.options.update_interval": 1, "prune.options.reg_step": 0.5, "prune.options.stabilize": 2}
    runs = {
        "greg/resnet56-cifar10-base": {"model.name": "resnet20", **small},
        "greg/resnet56-cifar10-greg1-0.5": {**quick, "prune.batch_size": 10, "finetune.epochs": 1},
    }
    monkeypatch.setattr(recipes_cifar10, "RUNS", {**runs, "tpp/resnet56-cifar10-tpp-0.5": {}})
    monkeypatch.setattr(recipes_cifar10.fp, "tune_cpu_memory", lambda: None)
    argv = f"bench --images {tmp_path / 'images'} --runs {tmp_path / 'runs'} --out {tmp_path / 'out'} --system greg"
    monkeypatch.setattr(sys, "argv", argv.split())
    recipes_cifar10.main()
    assert "tpp/resnet56-cifar10-tpp-0.5: not finished" in capsys.readouterr().out
    text, rows = (tmp_path / "out.md").read_text(), (tmp_path / "out" / "rows.jsonl").read_text()
    cut = json.loads(rows.splitlines()[1])["result"]["phases"]["prune"]
    assert f"40.6 → {cut['macs'] / 1e6:.1f}" in text and "9 x 16 of 16" not in text
    assert "channels kept: 3 x 8 of 16, 3 x 16 of 32, 3 x 32 of 64" in text and str(tmp_path) not in rows
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()
    recipes_cifar10.main()  # finished runs stay as they are
    assert (tmp_path / "out" / "rows.jsonl").read_text() == rows


def test_the_trainability_study_runs_and_writes_its_page(tmp_path, monkeypatch):
    argv = (
        "bench --seeds 0 1 --limit 300 --epochs-base 8 --epochs 2 --depth 4 --hidden 30 --reg-step 0.02 --stabilize 40"
    )
    argv += f" --zero-out-interval 10 --out {tmp_path / 'trainability.json'}"
    monkeypatch.setattr(sys, "argv", argv.split())
    threads = torch.get_num_threads()
    try:
        trainability.main()
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "trainability.json").read_text())
    assert found["setup"]["layers"] == [[30, 64], [30, 30], [30, 30], [10, 30]]
    assert found["setup"]["left"] == [[6, 64], [6, 6], [6, 6], [10, 6]]
    assert len(found["rows"]) == 2 * 4 * 2
    trained = {row["method"]: row["steps"] for row in found["rows"]}
    assert trained["tpp"] == trained["l1+steps"]
    for row in found["rows"]:
        if row["method"] == "l1+orthp":
            assert abs(row["before"]["max"] - 1) < 1e-5
        assert (row["steps"] > 0) == (row["method"] in ("tpp", "l1+steps")) and 0 <= row["first"] <= row["best"] <= 1
    text = (tmp_path / "trainability.md").read_text()
    assert "Network 64-30-30-30-10" in text and "leaves 64-6-6-6-10" in text and text.count("| tpp |") == 2


def test_the_latency_bench_runs_and_writes_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "setup", lambda net: models.create("resnet20").eval())
    monkeypatch.setitem(latency.ROUND_TO, "half-16", 4)
    interleave = harness.interleave
    monkeypatch.setattr(harness, "interleave", lambda calls, **options: interleave(calls, **options | {"sample_s": 0}))
    argv = "bench --no-gate --rounds 7 --nets resnet50 --batches 1 2 --layouts channels_last --size 32"
    monkeypatch.setattr(sys, "argv", [*argv.split(), "--out", str(tmp_path), "--page", str(tmp_path / "page.md")])
    threads = torch.get_num_threads()
    try:
        latency.main()
    finally:
        torch.set_num_threads(threads)
    rows = {(row["case"]["batch"], row["impl"]): row for row in table.latest([tmp_path / "latency.jsonl"])}
    impls = [f"{impl}{fold}" for fold in ("", "-folded") for impl in ("dense", "half", "half-16")]
    assert set(rows) == {(1, impl) for impl in impls} | {(2, impl) for impl in impls[:3]}
    dense = rows[1, "dense"]["metrics"]
    for impl in ("half", "half-16", "half-folded"):
        assert 0.35 * dense["mmacs"] < rows[1, impl]["metrics"]["mmacs"] <= 0.5 * dense["mmacs"] + 0.1
    assert rows[1, "half-folded"]["speedup"].keys() == {"dense-folded"} and "layers" not in rows[2, "half"]
    assert rows[1, "half"]["layers"].keys() == {"Conv2d", "BatchNorm2d", "Linear", "all else"}
    text = (tmp_path / "page.md").read_text()
    assert text.count("| resnet50 | 1 | channels_last |") >= 3 and "NOT VERIFIED" in text


def test_the_latency_page_names_what_gains_too_little():
    rows = []
    for impl, us, mmacs in (("dense", 10000.0, 100.0), ("half", 6250.0, 50.0), ("half-16", 6251.0, 50.0)):
        row = result(impl, us, metrics={"mmacs": mmacs})
        row["case"] = {"net": "n", "batch": 1, "layout": "nchw", "size": 8, "threads": 1, "allocator": "default"}
        row["impl"] = impl
        if impl != "dense":
            gain = 10000.0 / us
            row["speedup"] = {"dense": {"ratio": gain, "median": gain, "p20": 1.5, "p80": 1.7}}
            row["layers"] = {"Conv2d": [8.0, 4.0], "all else": [2.0, 2.25]}
        rows.append(row)
    text = latency.page(rows)
    assert "| n | 1 | nchw | 0.500 | 10.0 | 6.2 (1.60x, 1.50-1.70) | 6.3 (1.60x, 1.50-1.70) |" in text
    behind = text.split("## Not faster in proportion")[1].split("##")[0]
    assert "| n | 1 | nchw | 1 | half-16 | 2.00x | 1.60x |" in behind and "| half |" not in behind
    assert "| n | 1 | nchw | 1 | half | 8 > 4 | 2 > 2.25 |" in text
    rows[2]["speedup"]["dense"]["ratio"] = 1.9
    assert "None." in latency.page(rows) and "## Where the time goes" in text
    plain = [{key: value for key, value in row.items() if key != "layers"} for row in rows]
    assert "Where the time goes" not in latency.page(plain)


def test_committed_results_are_verified_and_name_no_place():
    for path in harness.RESULTS.glob("*/*.jsonl"):
        for row in table.latest([path]):
            assert row["provenance"]["verified"], f"{path.name}: {row['case']} was timed without tests"
            assert not re.search(r"(?<!\S)/", row["provenance"]["command"])
