"""The oracle and the gates' derivatives against networks written by hand, and the command that compares criteria."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastprune import cli, study
from fastprune.compact import compact
from fastprune.errors import DataError
from fastprune.gates import find_gates
from fastprune.graph import trace
from fastprune.methods import taylor
from fastprune.nn import convert_batchnorm
from fastprune.oracle import correlations, gate_hessian, loss_without


class Block(nn.Module):
    def __init__(self, cin, mid, cout):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, mid, 3, padding=1, bias=False), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = nn.Conv2d(mid, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout)
        self.relu = nn.ReLU()
        self.project = None
        if cin != cout:
            self.project = nn.Sequential(nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.project is None else self.project(x)))


class Net(nn.Module):
    """A stem, a projecting block, which starts a residual stream, and a block on it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.first, self.second = Block(4, 5, 6), Block(6, 3, 6)
        self.fc = nn.Linear(6, 7)

    def forward(self, x):
        x = self.second(self.first(self.relu(self.bn(self.conv(x)))))
        return self.fc(x.mean((2, 3)))


STEM, FIRST, STREAM, SECOND = "conv", "first.conv1", "first.conv2", "second.conv1"


def gated(net, x, gates):
    """The network with its gates written out."""
    gate = {name: value[:, None, None] for name, value in gates.items()}
    x = net.bn(net.conv(x)) * gate[STEM]
    x = F.relu(x)
    inner = F.relu(net.first.bn1(net.first.conv1(x)) * gate[FIRST])
    x = F.relu(net.first.bn2(net.first.conv2(inner)) + net.first.project(x)) * gate[STREAM]
    inner = F.relu(net.second.bn1(net.second.conv1(x)) * gate[SECOND])
    x = F.relu(net.second.bn2(net.second.conv2(inner)) + x) * gate[STREAM]
    return net.fc(x.mean((2, 3)))


def net(fuse=True, dtype=torch.float64):
    """As if trained: no parameter or statistic has its initial value."""
    made = Net().to(dtype).eval()
    with torch.no_grad():
        for m in made.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.uniform_(m.bias, -0.3, 0.6)
                nn.init.uniform_(m.running_mean, -0.2, 0.2)
                nn.init.uniform_(m.running_var, 0.2, 0.6)
    return convert_batchnorm(made, fuse=True) if fuse else made


def data(sizes=(5, 3), dtype=torch.float64):
    return [(torch.randn(n, 3, 6, 6, dtype=dtype), torch.randint(7, (n,))) for n in sizes]


def names_of(model):
    return list(find_gates(model, trace(model, data()[0][0].to(model.fc.weight.dtype)), stem=True))


@pytest.mark.parametrize("fuse", [False, True])
def test_loss_without_is_that_of_the_network_with_the_channel_removed(fuse):
    model, batches = net(fuse), data()
    names = names_of(model)
    assert set(names) == {STEM, FIRST, STREAM, SECOND}
    before = copy.deepcopy(model.state_dict())
    found = loss_without(model, names, batches, images=17, stem=True)  # three at once, some of two layers
    losses = [F.cross_entropy(model(x), y) for x, y in batches]
    for name in names:
        size = len(found.mean[name])
        for c in range(size):
            smaller = compact(copy.deepcopy(model), {name: torch.arange(size) != c}, batches[0][0], check=False)
            expected = [F.cross_entropy(smaller(x), y) - loss for (x, y), loss in zip(batches, losses, strict=True)]
            torch.testing.assert_close(found.per_batch[name][:, c], torch.stack(expected), rtol=1e-9, atol=1e-12)
            by_sample = (5 * expected[0] + 3 * expected[1]) / 8
            torch.testing.assert_close(found.mean[name][c], by_sample, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_loss_without_is_measured_in_eval_mode():
    model, batches = net(), data()
    names = names_of(model)
    evaluated = loss_without(model, names, batches, stem=True).mean
    trained = loss_without(model.train(), names, batches, stem=True).mean
    assert model.training and all(torch.equal(evaluated[name], trained[name]) for name in names)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_gate_hessian_is_autograds(fuse, training):
    model, batches = net(fuse).train(training), data()
    names = names_of(model)
    model.train(training)
    first, second = gate_hessian(model, names, batches, chunk=3, stem=True)
    sizes = [len(first[name]) for name in names]
    ones = torch.ones(sum(sizes), dtype=torch.float64)
    plain, expected = copy.deepcopy(model), [0, 0]
    for x, y in batches:

        def loss(flat, x=x, y=y):
            return F.cross_entropy(gated(plain, x, dict(zip(names, flat.split(sizes), strict=True))), y)

        expected[0] += torch.autograd.functional.jacobian(loss, ones) / len(batches)
        expected[1] += torch.autograd.functional.hessian(loss, ones).diagonal() / len(batches)
    for found, exact in zip((first, second), expected, strict=True):
        torch.testing.assert_close(torch.cat([found[name] for name in names]), exact, rtol=1e-8, atol=1e-12)


def test_no_batches_are_refused():
    model = net()
    for measure in (loss_without, gate_hessian):
        with pytest.raises(DataError, match="got none"):
            measure(model, [FIRST], [])
    with pytest.raises(DataError, match="got none"):
        study.compare(model, [])


def test_correlations_by_group_and_over_all():
    truth = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([11.0, 12, 13]), "one": torch.tensor([20.0])}
    scores = {"a": truth["a"] * 100, "b": -truth["b"], "one": torch.tensor([0.0])}
    found = correlations(scores, truth)
    assert found.keys() == {"a", "b", "all"}
    assert all(value == pytest.approx(1) for value in found["a"].values())
    assert all(value == pytest.approx(-1) for value in found["b"].values())
    # of 28 pairs agree the 6 within a and the 3 of b with the one
    assert found["all"]["kendall"] == pytest.approx((9 - 19) / 28)
    constant = correlations({**scores, "a": torch.ones(4)}, truth)
    assert all(math.isnan(value) for value in constant["a"].values())


# Criteria against the oracle -------------------------------------------------------------------------------------


def test_a_channel_nobody_reads_is_worth_nothing():
    model = net(dtype=torch.float32)
    with torch.no_grad():
        model.second.conv2.weight[:, 1] = 0
    found = study.compare(model, data(dtype=torch.float32), [22, 23, 6, 11, 10])
    assert found.changes[SECOND][1] == 0 and (found.changes[SECOND][[0, 2]] != 0).all()
    for name, scores in found.scores.items():
        assert scores[SECOND][1] == 0 and (scores[SECOND][[0, 2]] != 0).all(), name
        if name != "obd":  # which may be negative
            everything = torch.cat(list(scores.values()))
            assert (everything <= 0).sum() == 1, name


def test_scores_are_those_of_the_gates_in_eval_mode():
    model, batches = net(), data((6,))
    names = [name for name in names_of(model) if name != STEM]
    first, second = gate_hessian(model, names, batches)
    found = study.compare(model.train(), batches, [11, 22])
    uses = {STREAM: 2}
    for name in names:
        expected = first[name].square() / uses.get(name, 1)
        torch.testing.assert_close(found.scores["taylor-gate"][name], expected, rtol=1e-9, atol=0)
        expected = (second[name] / 2 - first[name]).square() / uses.get(name, 1)
        torch.testing.assert_close(found.scores["taylor-gate-so"][name], expected, rtol=1e-9, atol=0)
    assert found.gates.keys() == set(names) == found.changes.keys()
    truth = {name: change.square() for name, change in found.changes.items()}
    assert found.agreement["taylor-gate"] == correlations(found.scores["taylor-gate"], truth)
    loss = F.cross_entropy(model.eval()(batches[0][0]), batches[0][1])
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_comparing_changes_nothing_and_makes_the_hessian_once(variant, monkeypatch):
    model = net(dtype=torch.float32).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made, measure = [], taylor.gate_hessian
    monkeypatch.setattr(taylor, "gate_hessian", lambda *args, **kw: made.append(1) or measure(*args, **kw))
    found = study.compare(model, data(dtype=torch.float32), variant=variant)
    assert len(made) == 1 and tuple(found.scores) == study.CRITERIA and len(study.CRITERIA) == 11
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m.__dict__.get("gate_slots") for m in model.modules())


def test_a_criterion_that_leaves_layers_out_and_constant_scores_print_a_dash():
    model = net(dtype=torch.float32)
    nn.init.ones_(model.first.bn1.weight)
    found = study.compare(model, data(dtype=torch.float32), ["bn-scale", "maskblock-l1"])
    result = study.as_json(found)
    scale, masked = result["criteria"]
    assert scale["spearman"]["layers"][FIRST] is None and scale["kendall"]["all"] is not None
    assert scale["spearman"]["mean"] == pytest.approx(
        (scale["spearman"]["layers"][STREAM] + scale["spearman"]["layers"][SECOND]) / 2
    )
    assert masked["id"] is None and masked["spearman"]["layers"].keys() == {FIRST, SECOND}
    table = study.summary(result)
    assert "| maskblock-l1 |  - |" in table
    setup = {"arch": "net", "data": "noise", "image_shape": [3, 6, 6], "epochs": 1, "lr": 0.1}
    setup |= {"batch_size": 5, "seed": 0, "images": 8, "variant": "paper", "train_images": 8}
    setup |= {"seconds": {"train": 1.0, "compare": 1.0}, "environment": study.environment()}
    network = {"test_acc": 0.5, "loss": found.loss, "channels": 14, "layers": 3}
    lines = study.page({"setup": setup, "network": network} | result).splitlines()
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in lines) if len(cells) == 7}
    assert rows[FIRST][4].strip() == "-" and rows[STREAM][5].strip() == "-" and rows[STREAM][4].strip() != "-"


# The command -----------------------------------------------------------------------------------------------------

SMALL = ("--epochs", "1", "--limit", "80", "--images", "24", "--batch-size", "16", "--device", "cpu")


def test_command_end_to_end(capsys, tmp_path):
    argv = ["oracle", *SMALL, "--methods", "22", "taylor-weight-abs", "1", "--seed", "3", "--out", str(tmp_path / "a")]
    argv += ["--name", "ten digits"]
    assert cli.main(argv) == 0
    out, page = capsys.readouterr().out, (tmp_path / "a" / "oracle.md").read_text()
    result = json.loads((tmp_path / "a" / "oracle.json").read_text())
    assert study.summary(result) in out and page == study.page(result)
    assert page.startswith("# Criteria against the oracle: resnet20 on ten digits\n")
    assert [row["id"] for row in result["criteria"]] == [22, 3, 1]
    setup = result["setup"]
    assert (setup["images"], setup["train_images"], setup["epochs"], setup["seed"]) == (24, 80, 1, 3)
    assert len(result["layers"]) == 10 and result["network"]["channels"] == 352
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())
    tensors = [{name: torch.tensor(v, dtype=torch.float64) for name, v in by.items()} for by in scores.values()]
    again = correlations(tensors[1], {name: change.square() for name, change in tensors[0].items()})
    row = result["criteria"][0]
    assert row["criterion"] == list(scores)[1] == "taylor-gate"
    for measure in study.MEASURES:
        assert row[measure]["all"] == again["all"][measure]
        assert row[measure]["layers"] == {name: values[measure] for name, values in again.items() if name != "all"}
    # the trained network is there to be used again, and the same comes out
    assert cli.main([*argv, "--resume"]) == 0
    twice = json.loads((tmp_path / "a" / "oracle.json").read_text())
    assert twice["criteria"] == result["criteria"] and twice["network"] == result["network"]
    assert cli.main([*argv, "--resume", "--arch", "resnet56"]) == 1
    assert "holds resnet20 on digits, not resnet56 on digits" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "a" / "train" / "metrics.jsonl").read_text().splitlines()]
    assert sum("train_loss" in row for row in rows) == 1


@pytest.mark.parametrize(
    "argv, code, says",
    [
        (["--methods", "5"], 2, "unknown criterion 5; known numbers: [0, 1, 2, 3, 6, 10, 11, 22, 23, 30, 31]"),
        (["--methods", "taylor-gat"], 2, "unknown criterion 'taylor-gat'; did you mean 'taylor-gate'?"),
        (["--methods", "oracle"], 2, "unknown criterion 'oracle'"),
        (["--dataset", "digit"], 2, "unknown data set 'digit'; did you mean 'digits'?"),
        (["--images", "0"], 2, "--images: expected a whole number, 1 or more, got '0'"),
        (["--variant", "authors"], 2, "--variant: invalid choice: 'authors'"),
        (["--device", "gpu"], 2, "no device 'gpu' here"),
        (["--imgaes", "8"], 2, "did you mean '--images'?"),
        (["--arch", "resnet21", *SMALL], 1, "unknown model 'resnet21'"),
        (["--dataset", "imagefolder"], 1, "imagefolder: root is missing"),
    ],
)
def test_bad_input_is_one_line(capsys, tmp_path, argv, code, says):
    assert cli.main(["oracle", "--out", str(tmp_path), *argv]) == code
    err = capsys.readouterr().err
    assert err.startswith("fastprune: error: ") and err.count("\n") == 1 and says in err
