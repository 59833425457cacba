"""The coverage bench: its oracle must see every wrong removal, and a crash is a row."""

import copy
import json
import multiprocessing
import os
import sys
import time

import pytest
import torch
from torch import nn

from bench import harness, table, zoo
from bench.e2e import coverage

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual block, a grouped convolution, a layer norm, and a head that only runs in training."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.inner, self.back = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 16, 3, groups=2)
        self.norm = nn.LayerNorm(16)
        self.head, self.aux = nn.Linear(16, zoo.CLASSES), nn.Linear(12, zoo.CLASSES)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = x + self.back(self.inner(x).relu())
        y = self.head(self.norm(self.grouped(x).mean((2, 3))))
        return (y, self.aux(x.mean((2, 3)))) if self.training else y


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    zoo.randomise(model, IMAGES, seed=0)
    return model


def cut(model, **dims):
    """Keep ``indices`` of ``dim`` of parameters: ``stem__weight=(0, indices)``."""
    for name, (dim, indices) in dims.items():
        p = model.get_parameter(name.replace("__", "."))
        p.data = p.data.index_select(dim, torch.tensor(indices))


def test_the_oracle_accepts_a_right_removal(net):
    pruned = copy.deepcopy(net)
    stays = [6, 0, 2, 3]  # in any order
    cut(pruned, inner__weight=(0, stays), inner__bias=(0, stays), back__weight=(1, stays))
    kept = coverage.kept_indices(dict(net.named_parameters()), dict(pruned.named_parameters()))
    assert {n: {d: i.tolist() for d, i in dims.items()} for n, dims in kept.items()} == {
        "inner.weight": {0: stays}, "inner.bias": {0: stays}, "back.weight": {1: stays},
    }  # fmt: skip
    found = coverage.judge(net, pruned, IMAGES)
    assert found["difference"] < 1e-12 and found["control"] > 1e-3


@pytest.mark.parametrize(
    "wrong, where",
    [
        ({"inner__weight": (0, [0, 2]), "inner__bias": (0, [0, 2]), "back__weight": (1, [0, 3])}, "back"),
        ({"inner__weight": (0, [0, 2]), "inner__bias": (0, [0, 3]), "back__weight": (1, [0, 2])}, "inner"),
        ({"inner__weight": (0, [0, 2]), "inner__bias": (0, [0, 2]), "back__weight": (1, [2, 0])}, "back"),
    ],
)
def test_the_oracle_sees_a_wrong_removal(net, wrong, where):
    pruned = copy.deepcopy(net)
    cut(pruned, **wrong)
    found = coverage.judge(net, pruned, IMAGES)
    assert found["difference"] > 1e-3 and found["where"] == where and "control" not in found


def test_the_oracle_sees_statistics_of_removed_channels(net):
    pruned = copy.deepcopy(net)
    half = [0, 1, 2, 3, 8, 9, 10, 11]
    cut(pruned, grouped__weight=(0, half), grouped__bias=(0, half), norm__weight=(0, half), norm__bias=(0, half))
    cut(pruned, head__weight=(1, half))
    pruned.norm.normalized_shape = (8,)
    found = coverage.judge(net, pruned, IMAGES)
    assert found["difference"] > 1e-3 and found["where"] == "norm"


def test_channels_are_looked_for_along_any_axis():
    class Last(nn.LayerNorm):  # of images, as in ConvNeXt
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), Last(8), nn.Conv2d(8, 4, 8))
    zoo.randomise(net, IMAGES, seed=0)
    pruned = copy.deepcopy(net)
    cut(pruned, **{"0__weight": (0, [0, 7]), "0__bias": (0, [0, 7]), "1__weight": (0, [0, 7]), "1__bias": (0, [0, 7])})
    cut(pruned, **{"2__weight": (1, [0, 7])})
    pruned[1].normalized_shape = (2,)
    assert coverage.judge(net, pruned, IMAGES)["where"] == "1"


def test_the_oracle_looks_at_heads_of_training():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.side = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 1)
            self.head, self.aux = nn.Linear(6, zoo.CLASSES), nn.Linear(6, zoo.CLASSES)

        def forward(self, x):
            y = self.head(self.stem(x).mean((2, 3)))
            return (y, self.aux(self.side(x).mean((2, 3)))) if self.training else y

    torch.manual_seed(0)
    net = Heads()
    for aux, seen in (([0, 2], False), ([0, 3], True)):
        pruned = copy.deepcopy(net)
        cut(pruned, side__weight=(0, [0, 2]), side__bias=(0, [0, 2]), aux__weight=(1, aux))
        assert (coverage.judge(copy.deepcopy(net), pruned, IMAGES)["difference"] > 1e-3) == seen


def test_what_is_no_selection_is_refused(net):
    whole = dict(net.named_parameters())
    for part in ({"bias": whole["head.bias"]}, whole | {"head.bias": 2 * whole["head.bias"][:5]}):
        with pytest.raises(ValueError, match=r"came or went|head.bias \(5,\) is no selection"):
            coverage.kept_indices(whole, part)
    long = torch.randint(1, 1_000_000, (4, 50_000), generator=torch.Generator().manual_seed(0)).float()  # full of twins
    assert coverage._selection("long", long, long[[0, 2]][:, :400])[1].tolist() == list(range(400))
    mixed = copy.deepcopy(whole["stem.weight"].detach())[:4]
    mixed[0, 0] = mixed[1, 0].clone()  # a slice of another row
    with pytest.raises(ValueError, match=r"stem.weight \(4, 3, 3, 3\) is no selection from \(12, 3, 3, 3\)"):
        coverage.kept_indices(whole, whole | {"stem.weight": mixed})


def test_weights_leave_nothing_to_chance(net):
    for name, p in net.named_parameters():
        assert (p != 0).all() and p.unique().numel() > 0.99 * p.numel(), name
        assert p.dim() > 1 or p.unique().numel() == p.numel(), name
    assert net.bn.running_var.unique().numel() == 12 and net.bn.momentum == 0.1 and not net.training
    assert set(zoo.prunable(net)) == {"stem", "inner", "back", "grouped"}
    assert zoo.classifiers(net) == [net.head, net.aux]


# ---- the tools


@pytest.fixture
def tiny(monkeypatch, net):
    monkeypatch.setattr(zoo, "build", lambda source, name: (copy.deepcopy(net), IMAGES))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


def examine(tool):
    rows = []
    coverage.examine("timm", "net", tool, lambda row: rows.append(copy.deepcopy(row)))
    assert [r["stage"] for r in rows][:2] == ["build", "prune"] and rows[-1]["stage"] == "done"
    return rows[-1]


def test_fastprune_is_examined(tiny):
    row = examine("fastprune")
    assert row["errors"] == {} and coverage.faithful(row) and row["trains"]
    assert (row["layers"], row["pruned"]) == (4, 3) and not coverage.complete(row)
    assert row["alone"] == {"layer norm averages over it": [1, ["grouped"]]}
    assert 0 < row["macs"] < row["macs_before"] and 0 < row["params"] < row["params_before"]
    assert coverage.verdict(row).startswith("faithful, 3 of 4 layers, ")


def test_torch_pruning_is_examined(tiny):
    pytest.importorskip("timm")
    pytest.importorskip("torch_pruning")
    row = examine("torch-pruning")
    assert row["pruned"] == 4 and coverage.unfaithful(row)
    assert row["where"] == "norm" and "unfaithful: " in coverage.verdict(row)
    assert "train" in row["errors"] and "trains" not in row  # the auxiliary head is not in its graph


def test_kept_indices_of_torch_pruning_are_found():
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    whole = coverage._tiny().eval()
    zoo.randomise(whole, IMAGES, seed=0)
    pruned = copy.deepcopy(whole)
    coverage.prune_torch_pruning(pruned, IMAGES)
    kept = coverage.kept_indices(dict(whole.named_parameters()), dict(pruned.named_parameters()))
    assert len(kept["0.weight"][0]) == 4 and kept["0.weight"][0].equal(kept["3.weight"][1])
    assert kept["3.weight"][0].equal(kept["5.weight"][1].view(-1, 16)[:, 0] // 16) and "5.bias" not in kept
    assert coverage.judge(whole, pruned, IMAGES)["difference"] < 1e-12


def test_a_wrong_tool_is_found_out(tiny, monkeypatch):
    def prune(model, images):
        if isinstance(model, Net):
            cut(model, inner__weight=(0, [0, 2]), inner__bias=(0, [0, 2]), back__weight=(1, [0, 3]))
        return {"seconds": {"graph": 1.0}, "frozen": {}}

    monkeypatch.setitem(coverage.PRUNE, "fastprune", prune)
    row = examine("fastprune")
    assert coverage.unfaithful(row) and row["where"] == "back" and row["trains"]
    assert row["alone"] == {"it is in no group": [3, ["stem", "back", "grouped"]]}


@pytest.mark.parametrize("stage", ["build", "prune", "run", "compare", "train"])
def test_an_error_is_part_of_the_row(tiny, monkeypatch, stage):
    def fail(*_):
        raise RuntimeError("one\n  /a/b/two")

    monkeypatch.setitem(coverage.STAGES, stage, fail)
    row = examine("fastprune") if stage != "build" else {}
    if stage == "build":
        coverage.examine("timm", "net", "fastprune", row.update)
    assert row["errors"] == {stage: "RuntimeError: one two"}
    assert coverage.faithful(row) == (stage == "train")
    assert row.get("trains", False) == (stage == "compare")
    assert "RuntimeError: one two" in coverage.verdict(row)


def finish(report):
    report({"stage": "build", "errors": {}})
    report({"stage": "done", "errors": {"run": "no"}})


def hang(report):
    report({"stage": "prune", "errors": {}})
    while True:
        time.sleep(0)


def sleep(report):
    time.sleep(60)


def die(report):
    report({"stage": "compare", "errors": {"build": "x"}})
    os._exit(7)


def devour(report):
    report({"stage": "run", "errors": {}})
    try:
        bytearray(2**40)
    except MemoryError:
        os._exit(8)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # these run no kernels
@pytest.mark.parametrize(
    "work, seconds, stage, errors",
    [
        (finish, 60, "done", {"run": "no"}),
        (hang, 1, "prune", {"prune": "more than 1 s"}),
        (sleep, 0.05, "start", {"start": "more than 0.05 s"}),
        (die, 60, "compare", {"build": "x", "compare": "the process died (exit code 7)"}),
        (devour, 60, "run", {"run": "the process died (exit code 8)"}),
    ],
)
def test_processes_that_die_or_hang_are_rows(monkeypatch, work, seconds, stage, errors):
    if work is sleep:  # limits of CPU time are whole seconds
        monkeypatch.setattr(coverage.resource, "setrlimit", lambda *_: None)
    row = coverage.in_a_process(work, seconds, 64, multiprocessing.get_context("fork"))
    assert (row["stage"], row["errors"]) == (stage, errors)


# ---- networks, rows, page


def test_the_list_of_networks():
    names = zoo.names()
    assert len(set(names)) == len(names) and len(set(zoo.TIMM)) == len(zoo.TIMM) >= 60
    kinds = [zoo.kind(*n) for n in names]
    assert kinds.count("torchvision transformers") == 12 and kinds.count("torchvision CNNs") >= 68
    assert zoo.HEAVY | set(zoo.SIZES) <= {net for _, net in names}
    timm = pytest.importorskip("timm")
    assert set(zoo.TIMM) <= set(timm.list_models())


def row(net, tool, source="torchvision", **extra):
    facts = {"torch": "2", "torchvision": "0.26", "timm": "1", "torch-pruning": "1.6.1", "commit": "abc"}
    facts |= {"device": "AMD EPYC", "dirty": False, "verified": True, "date": "2026-01-02T00:00:00Z"}
    done = {"stage": "done", "errors": {}, "layers": 10, "pruned": 10, "alone": {}, "seconds": {"graph": 0.5}}
    done |= {"macs_before": 200, "macs": 50, "params_before": 2e6, "params": 5e5, "trains": True}
    done |= {"difference": 2e-15, "control": 0.1}
    case = {"source": source, "net": net, "ratio": 0.5}
    return {"bench": "coverage", "case": case, "impl": tool} | done | extra | {"provenance": facts}


def test_the_page_counts_and_names():
    crashed = row("vgg11", "torch-pruning", errors={"run": "RuntimeError: 3 channels"}, seconds={"graph": 0.25})
    del crashed["macs"], crashed["difference"], crashed["trains"]
    rows = [
        row("alexnet", "fastprune", pruned=8, alone={"it is an output": [2, ["a", "b"]]}),
        row("alexnet", "torch-pruning", seconds={"graph": 0.1, "step": 0.1}),
        row("vgg11", "fastprune"),
        crashed,
        row("vit_b_16", "fastprune", difference=0.25, where="norm", errors={"train": "ValueError: no gradient for x"}),
        row("dla34", "fastprune", "timm", control=1e-9),
    ]
    del rows[4]["trains"]
    text = coverage.page(rows)
    assert "| torchvision CNNs | fastprune | 2 of 2 | 2 of 2 | 1 of 2 | 0 of 2 | 2 of 2 | 1.0 |" in text
    assert "| torchvision CNNs | torch-pruning | 1 of 2 | 1 of 2 | 1 of 2 | 0 of 2 | 1 of 2 | 0.5 |" in text
    assert "| torchvision transformers | fastprune | 1 of 1 | 0 of 1 | 0 of 1 | 1 of 1 | 0 of 1 | 0.5 |" in text
    assert "| alexnet | 2.0 | yes, 2e-15 | 8/10 | yes | 0.50 | 25 % | 25 % | yes, 2e-15 | 10/10 | yes | 0.20 |" in text
    assert (
        "| vgg11 | 2.0 | yes, 2e-15 | 10/10 | yes | 0.50 | 25 % | 25 % | **does not run** |  |  | 0.25 |  |  |" in text
    )
    assert "| vit_b_16 | 2.0 | **no**, 2e-01 | 10/10 | **no** | 0.50 | 25 % | 25 % |  |  |  |  |  |  |" in text
    assert "- alexnet, 2 of 10: it is an output (2: a, b)" in text
    assert "- vgg11, torch-pruning: does not run: RuntimeError: 3 channels" in text
    assert "- vit_b_16, fastprune: unfaithful: 2e-01 from norm on, 10 of 10 layers" in text
    assert "does not train: ValueError: no gradient for x" in text
    assert "- dla34, fastprune: undecided: the comparison would not have seen a mistake" in text
    assert "Torch-Pruning is faster on: alexnet (0.50 s against 0.20 s)." in text
    assert "It prunes more layers, and faithfully, on: alexnet (8 against 10 of 10)." in text
    assert "commit abc.\n" in text and text.index("## Torchvision CNNs") < text.index("## Timm CNNs")
    rows[0]["provenance"] |= {"dirty": True, "verified": False}
    assert "with uncommitted changes, NOT VERIFIED by tests" in coverage.page(rows)


def test_a_run_is_taken_up_again(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    argv = ["bench", "--no-gate", "--only", "vgg1[13]", "--out", str(folder), "--page", str(tmp_path / "page.md")]
    asked = []

    def in_a_process(work, *_):
        _, net, tool = work.args
        asked.append((net, tool))
        return {k: v for k, v in row(net, tool).items() if k not in ("bench", "case", "impl", "provenance")}

    monkeypatch.setattr(coverage, "in_a_process", in_a_process)
    monkeypatch.setattr(coverage.metadata, "version", lambda name: "1")
    monkeypatch.setattr(sys, "argv", [*argv, "--tool", "fastprune"])
    coverage.main()
    assert sorted(asked) == [("vgg11", "fastprune"), ("vgg13", "fastprune")]
    monkeypatch.setattr(sys, "argv", [*argv, "--resume"])
    coverage.main()
    assert sorted(asked[2:]) == [("vgg11", "torch-pruning"), ("vgg13", "torch-pruning")]
    rows = table.latest([folder / "coverage.jsonl"])
    assert len(rows) == 4 and {r["provenance"]["commit"] for r in rows} == {harness.commit()}
    assert "| vgg13 |" in (tmp_path / "page.md").read_text()
    assert str(tmp_path) not in json.dumps(rows)
    monkeypatch.setattr(sys, "argv", ["bench", "--list", "--only", "resnet18"])
    capsys.readouterr()
    coverage.main()
    assert capsys.readouterr().out == "torchvision resnet18\n"
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "nothing"])
    with pytest.raises(SystemExit, match="no network is called 'nothing'"):
        coverage.main()
