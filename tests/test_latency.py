"""fp.latency: what is timed and how it adds up, by a clock that counts the work that was done."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from torch import nn

import fastprune as fp
from fastprune.latency import REST, WARM_UP, Stopwatch, interleaved

X = torch.randn(2, 3, 8, 8)


class Spin(nn.Module):
    """Takes as many milliseconds as it is told, by the simulated clock; has a parameter, and maybe a layer inside."""

    now = 0.0

    def __init__(self, ms: float, inside: nn.Module | None = None) -> None:
        super().__init__()
        self.ms, self.inside, self.weight = ms, inside, nn.Parameter(torch.ones(round(100 * ms)))

    def forward(self, x):
        Spin.now += self.ms
        return x if self.inside is None else self.inside(x)


class Free(Spin):
    def __init__(self, ms: float) -> None:
        super().__init__(ms)
        del self.weight


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    monkeypatch.setattr(Stopwatch, "mark", lambda self: Spin.now)
    monkeypatch.setattr(Stopwatch, "ms", lambda self, start, end: end - start)


def conv_net(*widths):
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in zip((3, *widths), widths, strict=False)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * widths[-1], 5))


def test_rows_are_the_layers_and_add_up():
    model = nn.Sequential(Spin(2.0, Spin(1.5)), Free(0.75), Spin(4.0))
    model.append(model[2])  # runs twice
    report = fp.latency(model, X, repeats=3)
    assert [(row["name"], row["kind"], row["after"]["ms"]) for row in report.rows] == [
        ("0", "Spin", 2.0), ("0.inside", "Spin", 1.5), ("2", "Spin", 8.0), (REST, "", 0.75),
    ]  # fmt: skip
    assert report.ms == 12.25 and report.before_ms is report.speedup is None
    assert all(row["before"] is row["speedup"] is None and row["note"] == "" for row in report.rows)


def test_before_and_after():
    before = nn.Sequential(Spin(4.0), Spin(2.0), Spin(1.0), Free(1.0))
    after = nn.Sequential(Spin(2.0), Spin(1.0), nn.Identity(), Free(0.5))
    after[1].ms = 3.0  # smaller, and slower
    report = fp.latency(after, X, compare=before, repeats=4)
    rows = {row["name"]: row for row in report.rows}
    assert list(rows) == ["0", "1", "2", REST]
    assert rows["0"]["speedup"] == (2.0, 2.0, 2.0) and rows["0"]["note"] == ""
    assert rows["1"]["speedup"][0] == pytest.approx(2 / 3) and rows["1"]["note"] == "slower"
    assert rows["2"]["after"] is None and rows["2"]["before"]["ms"] == 1.0 and rows["2"]["speedup"] is None
    assert (report.before_ms, report.ms) == (8.0, 5.5) and report.speedup[0] == pytest.approx(8 / 5.5)


def test_widths_and_macs_are_those_of_flops():
    dense = conv_net(16, 24)
    keep = {"0": torch.arange(16) < 7, "1": torch.arange(24) % 2 == 0}
    small = fp.compact(copy.deepcopy(dense), keep, X)
    report = fp.latency(small, X, compare=dense, repeats=1)
    for side, model in (("before", dense), ("after", small)):
        counted = {layer["name"]: layer for layer in fp.flops(model, X)["layers"]}
        for row in report.rows[:-1]:
            layer = counted[row["name"]]
            assert (row[side]["out"], row[side]["in"]) == (layer["out_channels"], layer["in_channels"])
            assert row[side]["macs"] == layer["macs"]
    assert [row["name"] for row in report.rows] == ["0", "1", "3", REST]


CONVOLVE = nn.Conv2d.forward


def convolutions_take(monkeypatch, cost):
    def timed(self, x):
        Spin.now += cost(self)
        return CONVOLVE(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", timed)


def test_a_layer_that_gains_little_is_named_and_the_reason_measured(monkeypatch):
    # odd widths cost half as much again
    convolutions_take(monkeypatch, lambda m: m.out_channels / 16 * (1.0 if m.out_channels % 16 == 0 else 1.9))
    dense = conv_net(32, 64)
    keep = {"0": torch.arange(32) < 31, "1": torch.arange(64) < 40}
    small = fp.compact(copy.deepcopy(dense), keep, X)
    rows = {row["name"]: row for row in fp.latency(small, X, compare=dense, repeats=3).rows}
    assert rows["0"]["note"] == "slower: with 3>32 channels it would take 0.54 of that"
    assert rows["1"]["note"] == "slower: with 32>48 channels it would take 0.63 of that"
    convolutions_take(monkeypatch, lambda m: 5.0)  # whatever the width: no reason can be given
    rows = {row["name"]: row for row in fp.latency(small, X, compare=dense, repeats=3).rows}
    assert rows["1"]["note"] == "gains little" and rows["0"]["note"] in ("", "gains little")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_depthwise_layers_can_be_widened_too(monkeypatch, layout):
    seen = []
    convolutions_take(monkeypatch, lambda m: seen.append((m.groups, tuple(m.weight.shape))) or 1.0)
    dense = nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 8, 1), nn.Flatten(), nn.Linear(288, 2)
    ).to(memory_format=layout)
    x = X.to(memory_format=layout)
    small = fp.compact(copy.deepcopy(dense), {"0": torch.arange(32) < 10}, x)
    fp.latency(small, x, compare=dense, repeats=1)
    assert (10, (10, 1, 3, 3)) in seen and (16, (16, 1, 3, 3)) in seen


def test_rounds_alternate_after_a_warm_up():
    calls = []
    samples = interleaved(Stopwatch(torch.device("cpu")), [lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert "".join(calls) == "ab" * WARM_UP + "ab" + "ba" + "ab" and [len(s) for s in samples] == [3, 3]


def test_as_many_rounds_as_a_second_takes():
    for ms, rounds in ((500.0, 7), (50.0, 20), (0.1, 50)):
        spin = Spin(ms)
        assert len(interleaved(Stopwatch(torch.device("cpu")), [lambda spin=spin: spin(X)])[0]) == rounds


def test_the_models_are_left_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2))
    model[2].eval()
    before, other = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    fp.latency(model, X, compare=other, repeats=1)
    assert [m.training for m in model] == [True, True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for m in (*model.modules(), *other.modules()):
        assert not m._forward_hooks and not m._forward_pre_hooks
    broken = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(99, 2)).train()
    with pytest.raises(RuntimeError):
        fp.latency(broken, X)
    assert broken.training and not any(m._forward_hooks or m._forward_pre_hooks for m in broken.modules())


def test_the_table_is_aligned():
    dense = conv_net(16, 24)
    small = fp.compact(copy.deepcopy(dense), {"0": torch.arange(16) < 7}, X)
    for report, columns in ((fp.latency(small, X, compare=dense, repeats=1), 9), (fp.latency(small, X, repeats=1), 5)):
        head, *lines = str(report).splitlines()
        assert head.startswith("milliseconds, medians; cpu, threads ") and head.endswith("inputs 2x3x8x8")
        assert lines[0].split() == ["layer", "kind", *(
            ["channels", "after", "MMACs", "after", "ms", "after", "speedup"] if columns == 9 else
            ["channels", "MMACs", "ms"]
        )]  # fmt: skip
        assert [line.split()[0] for line in lines[1:]] == ["0", "1", "3", "(all", "sum,", "whole,"]
        end = lines[0].index("speedup") + 7 if columns == 9 else len(lines[0])
        numbers = [line[:end].rstrip() for line in lines[1:] if not line.startswith("sum")]
        assert len({len(line) for line in numbers}) == 1
        assert ("3>16" in lines[1]) == (columns == 9) and "3>7" in lines[1]


def test_what_cannot_be_timed():
    with pytest.raises(ValueError, match="repeats of at least 1, got '2'"):
        fp.latency(conv_net(4), X, repeats="2")
    with pytest.raises(ValueError, match="repeats of at least 1, got 0"):
        fp.latency(conv_net(4), X, repeats=0)
    with pytest.raises(ValueError, match="inputs on a CPU or a CUDA device, got meta"):
        fp.latency(conv_net(4), X.to("meta"))
    with pytest.raises(ValueError, match="got no tensor"):
        fp.latency(conv_net(4), {})
    model = conv_net(4)
    with pytest.raises(ValueError, match="got the model itself; compact works in place, so"):
        fp.latency(model, X, compare=model)


def test_the_real_clock_runs(monkeypatch):
    monkeypatch.undo()
    watch = Stopwatch(torch.device("cpu"))
    (samples,) = interleaved(watch, [lambda: torch.ones(1000).sum()], 5)
    assert len(samples) == 5 and statistics.median(samples) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_timed_by_events(monkeypatch):
    monkeypatch.undo()
    dense, x = conv_net(32, 64).cuda(), X.cuda()
    small = fp.compact(copy.deepcopy(dense), {"0": torch.arange(32) < 16}, x)
    report = fp.latency(small, x, compare=dense, repeats=5)
    assert report.device.startswith("cuda") and min(report.ms, report.before_ms) > 0
    assert all(row["after"]["ms"] > 0 for row in report.rows if row["name"] != REST)
    # made where the model is, measured where the inputs are
    method = fp.create("l1", dense.cpu(), X, target_latency_ms=1e9, latency_inputs=x)
    assert all(mask.all() for mask in method.keep_masks().values()) and len(method.budget.measured) == 2
    assert next(dense.parameters()).device.type == "cpu"
