"""The loop learns, repeats itself, resumes and stops on nonsense; RNI's two calls do what their README says."""

import inspect
import itertools
import json
import math
import time

import pytest
import torch
from torch import nn

from fastprune import data, methods, models
from fastprune import nn as fpnn
from fastprune.compact import compact
from fastprune.errors import DataError, TrainingError
from fastprune.train import (
    History,
    MetricsLog,
    evaluate,
    fit,
    from_scratch,
    loop,
    multistep,
    param_groups,
    prune_finetune,
    sgd,
    train,
)

DIGITS = data.load("digits", limit=256)
QUICK = {"batch_size": 64, "progress": False}


def tiny(bound=None, seed=0):
    torch.manual_seed(seed)
    norm = fpnn.SigmoidBatchNorm2d(8) if bound else nn.BatchNorm2d(8)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        norm,
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(128, 10),
    )


def run(model=None, epochs=2, lr=0.1, images=DIGITS, **kw):
    model = model or tiny()
    optimizer = sgd(model, lr)
    schedule = multistep(optimizer, 4)
    loaders = images.loaders(64, seed=0)
    return model, fit(model, loaders, epochs=epochs, optimizer=optimizer, schedule=schedule, progress=False, **kw)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- optimizer -----------------------------------------------------------------------------------------------------


def test_groups_are_rnis():
    model = models.create("vgg-small")
    by_name = {g["name"]: g for g in param_groups(model, 0.1)}
    assert set(by_name) == {"weights", "norms"}
    assert all((g["lr"], g["weight_decay"]) == (0.1, 1e-4) for g in by_name.values())
    model = models.create("vgg-small", bound="sigmoid")
    by_name = {g["name"]: g for g in param_groups(model, 0.1)}
    assert set(by_name) == {"weights", "bounded norms"}
    assert (by_name["bounded norms"]["lr"], by_name["bounded norms"]["weight_decay"]) == (1.0, 0.0)
    assert len(by_name["bounded norms"]["params"]) == 6 and len(by_name["weights"]["params"]) == 14
    assert sum(p.numel() for g in by_name.values() for p in g["params"]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("epochs, drops", [(160, [80, 120]), (4, [2, 3]), (1, [1, 1]), (10, [5, 8])])
def test_schedule_drops_at_half_and_three_quarters(epochs, drops):
    optimizer = sgd(tiny("sigmoid"), 0.1)
    schedule, seen = multistep(optimizer, epochs), []
    for _ in range(epochs):
        seen.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    for epoch, (weights, bounded) in enumerate(seen):
        expected = 0.1 * 0.1 ** sum(epoch >= d for d in drops)
        assert math.isclose(weights, expected) and math.isclose(bounded, 10 * expected)


# --- the loop ------------------------------------------------------------------------------------------------------


def test_it_learns_and_reports():
    model, history = run(epochs=4, images=data.load("digits"))
    assert history[-1]["test_acc"] > 0.9 and history[-1]["train_loss"] < history[0]["train_loss"]
    assert [row["epoch"] for row in history] == [0, 1, 2, 3] and history[-1]["step"] == 4 * 23
    assert [row["lr"] for row in history] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    assert {"penalty", "train_acc", "test_loss", "seconds", "images_per_s"} <= set(history[0])
    assert evaluate(model, data.load("digits").loaders(64).test)["acc"] == history[-1]["test_acc"]


def test_best_and_last_are_both_there():
    model, history = run(epochs=3)
    assert history[history.best]["test_acc"] == max(row["test_acc"] for row in history)
    last = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(history.best_state)
    assert evaluate(model, DIGITS.loaders(64).test)["acc"] == history[history.best]["test_acc"]
    assert (history.best == 2) == same(last, history.best_state)


def test_the_first_of_equally_good_epochs_is_the_best():
    history, model = History(), nn.Linear(1, 1)
    for acc in (0.5, 0.7, 0.7, 0.6):
        history.add({"test_acc": acc}, model)
        nn.init.constant_(model.weight, len(history))
    assert history.best == 1 and history.best_state["weight"].item() == 1


def test_same_seed_same_weights_bit_for_bit():
    (a, ha), (b, hb) = (run(tiny(seed=7)) for _ in range(2))
    assert same(a.state_dict(), b.state_dict()) and [r["train_loss"] for r in ha] == [r["train_loss"] for r in hb]


@pytest.mark.parametrize("name", ["rni", "slimming", "ucs"])
def test_a_killed_run_resumes_bit_for_bit(name, tmp_path):
    def start(epochs, path, resume=False):
        model = tiny("sigmoid" if name == "rni" else None)
        method = methods.create(name, model, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
        return run(model, epochs, method=method, checkpoint=path, resume=resume)

    whole, expected = start(4, tmp_path / "whole.pt")
    start(2, tmp_path / "part.pt")
    torch.rand(3)  # another process has another random state
    model, history = start(4, tmp_path / "part.pt", resume=True)
    assert same(model.state_dict(), whole.state_dict()) and same(history.best_state, expected.best_state)
    assert history.best == expected.best and [r["test_loss"] for r in history] == [r["test_loss"] for r in expected]
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


SCHEDULES = {
    "multistep": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3]),
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [8 * float(group["lr"]) for group in optimizer.param_groups], 6
    ),
    "cyclic": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(
        optimizer,
        [float(group["lr"]) for group in optimizer.param_groups],
        [8 * float(group["lr"]) for group in optimizer.param_groups],
        step_size_up=3,
    ),
    "sequential": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer, [SCHEDULES["lambda"](optimizer), SCHEDULES["cosine"](optimizer)], [3]
    ),
    "none": lambda optimizer: None,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tensor", [False, True])
def test_a_resumed_run_takes_the_rates_that_the_optimizer_has_now(schedule, tensor, tmp_path):
    def start(epochs, scale, **kwargs):
        model = tiny()
        groups = [{"params": [p], "lr": lr * scale} for p, lr in zip(model.parameters(), itertools.cycle([0.05, 0.2]))]
        for group in groups if tensor else ():
            group["lr"] = torch.tensor(group["lr"])
        optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9, foreach=False)
        history = fit(
            model, DIGITS.loaders(64), epochs=epochs, optimizer=optimizer, schedule=SCHEDULES[schedule](optimizer),
            checkpoint=tmp_path / "last.pt", progress=False, **kwargs,
        )  # fmt: skip
        return [row["lr"] for row in history], [float(group["lr"]) for group in optimizer.param_groups]

    rates, at_the_end = start(5, 1.0)
    start(2, 1.0)
    lower, also_at_the_end = start(5, 0.25, resume=True)
    assert lower == pytest.approx([*rates[:2], *(rate / 4 for rate in rates[2:])], rel=1e-5)
    assert also_at_the_end == pytest.approx([rate / 4 for rate in at_the_end], rel=1e-5)


@pytest.mark.parametrize("save_takes_s, saved", [(0.0, [0, 1, 2, 3, 4]), (10.0, [0, 4])])
def test_slow_checkpoints_are_rarer_but_the_first_and_last_are_written(save_takes_s, saved, tmp_path, monkeypatch):
    now, got, save = 0.0, [], torch.save

    def slow_save(state, file):
        nonlocal now
        now += save_takes_s
        got.append(len(state["rows"]))
        save(state, file)

    monkeypatch.setattr(torch, "save", slow_save)
    monkeypatch.setattr(time, "monotonic", lambda: now)  # training itself takes no time
    run(epochs=4, checkpoint=tmp_path / "last.pt")
    assert got == saved


def test_resume_without_a_checkpoint_starts_afresh_and_without_a_path_is_an_error(tmp_path):
    _, history = run(epochs=1, checkpoint=tmp_path / "none.pt", resume=True)
    assert len(history) == 1
    with pytest.raises(ValueError, match="needs checkpoint"):
        run(resume=True)


@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_loss_that_is_not_finite_names_the_step_and_the_learning_rate(bad_step):
    model, calls = tiny(), 0

    def spoil(module, _, y):
        nonlocal calls
        calls += 1
        return y * math.nan if calls == bad_step + 1 else y

    model.register_forward_hook(spoil)
    with pytest.raises(TrainingError, match=rf"loss is nan at step {bad_step} of epoch 0, learning rate 0\.1; lower"):
        run(model)


def test_the_number_of_steps_may_be_a_multiple_of_the_checks(monkeypatch):
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    _, logs = run(epochs=1)  # 256 images, 4 steps: nothing is left to check after the last one
    assert logs[0]["step"] == 4


def test_no_images_is_an_error():
    with pytest.raises(DataError, match="no training images"):
        run(images=data.load("digits", limit=0))


def test_the_penalty_is_logged_apart_from_the_loss():
    model = tiny("sigmoid")
    method = methods.create("rni", model, torch.randn(2, 1, 8, 8), reg_weight=1.0)
    with torch.no_grad():
        penalty = method.penalty().item()
    _, history = run(model, epochs=1, lr=1e-9, method=method)
    assert history[0]["penalty"] == pytest.approx(penalty, rel=1e-3) and history[0]["train_loss"] < 3


def test_bf16_and_channels_last_learn_too():
    model, history = run(epochs=3, images=data.load("digits"), precision="bf16", channels_last=True)
    assert history[-1]["test_acc"] > 0.85
    assert model[0].weight.dtype == torch.float32
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16"):
        run(precision="fp8")


def test_evaluate_restores_the_mode_and_leaves_statistics_alone():
    model = tiny().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    got = evaluate(model, DIGITS.loaders(64).test)
    assert model.training and same(before, model.state_dict()) and set(got) == {"loss", "acc"}


def test_metrics_are_one_json_object_per_line(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    _, history = run(epochs=2, log=MetricsLog(path))
    assert MetricsLog.read(path) == [json.loads(line) for line in path.read_text().splitlines()] == list(history)
    with open(path, "a") as file:
        file.write('{"cut": 1')
    assert len(MetricsLog.read(path)) == 2


# --- RNI's two calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, seed",
    [
        (
            train,
            {
                "dataset": "cifar10",
                "arch": "vgg16",
                "method": "rni",
                "reg_weight": 1e-4,
                "b": 3,
                "epochs": 160,
                "lr": 0.1,
                "batch_size": 64,
                "seed": 0,
                "device": None,
            },
        ),
        (
            prune_finetune,
            {
                "model": inspect.Parameter.empty,
                "dataset": "cifar10",
                "method": "rni",
                "prune_pc": 0.5,
                "epochs": 160,
                "lr": 0.1,
                "batch_size": 64,
                "seed": 0,
                "device": None,
            },
        ),
    ],
    ids=["train", "prune_finetune"],
)
def test_signatures_are_the_readmes(call, seed):
    parameters = list(inspect.signature(call).parameters.values())
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(seed.items())
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[len(seed) :])


@pytest.mark.parametrize("method", ["rni", "l1", "ucs"])
def test_train_then_prune_and_finetune(method, tmp_path):
    images = data.load("digits", limit=512)
    args = {"dataset": images, "method": method, "lr": 0.05, "batch_size": 16, "progress": False}
    model, logs = train(arch="vgg-small", epochs=4, out_dir=tmp_path / "a", reg_weight=1e-3, **args)
    acc = evaluate(model, images.loaders(64).test)["acc"]
    assert acc == logs[logs.best]["test_acc"] > 0.6
    bounded = [m for m in model.modules() if getattr(m, "bound", None) == "sigmoid"]
    assert len(bounded) == (6 if method == "rni" else 0)
    assert (logs[0]["penalty"] > 0) == (method != "ucs")

    before = {k: v.clone() for k, v in model.state_dict().items()}
    small, tuned = prune_finetune(model, prune_pc=0.5, epochs=2, out_dir=tmp_path / "b", **args)
    assert same(before, model.state_dict())  # a copy was pruned
    dense, pruned = tuned.summary["dense"], tuned.summary["pruned"]
    assert dense["acc"] == acc and pruned["macs"] < 0.6 * dense["macs"] and pruned["params"] < 0.6 * dense["params"]
    assert sum(p.numel() for p in small.parameters()) == pruned["params"]
    kept = [k for k, _ in tuned.summary["kept"].values()]
    assert min(kept) >= 3 and abs(sum(kept) / 448 - 0.5) < 0.05
    if method == "ucs":
        assert kept == [16, 16, 32, 32, 64, 64]
    assert tuned[-1]["penalty"] == 0 and tuned[tuned.best]["test_acc"] > max(pruned["acc"], 0.5)
    assert evaluate(small, images.loaders(64).test)["acc"] == tuned[tuned.best]["test_acc"]
    rows = MetricsLog.read(tmp_path / "b" / "metrics.jsonl")
    assert rows[0]["call"] == "prune_finetune" and [r["epoch"] for r in rows[1:]] == [0, 1]


def test_train_repeats_itself_and_depends_on_the_seed(tmp_path):
    def go(seed, n):
        args = {"arch": "vgg-small", "dataset": "digits", "epochs": 1, "limit": 128, "out_dir": tmp_path / str(n)}
        return train(seed=seed, **args, **QUICK)[0].state_dict()

    first = go(0, 0)
    assert same(first, go(0, 1)) and not same(first, go(1, 2))


def test_train_resumes(tmp_path):
    args = {"arch": "vgg-small", "dataset": "digits", "limit": 128, **QUICK}
    whole, _ = train(epochs=2, out_dir=tmp_path / "whole", **args)
    with pytest.raises(KeyboardInterrupt):
        write, MetricsLog.write = MetricsLog.write, lambda self, row: stop(write, self, row)
        try:
            train(epochs=2, out_dir=tmp_path / "part", **args)
        finally:
            MetricsLog.write = write
    part, logs = train(epochs=2, out_dir=tmp_path / "part", resume=True, **args)
    assert len(logs) == 2 and same(whole.state_dict(), part.state_dict())


def stop(write, log, row):
    if row.get("epoch") == 1:
        raise KeyboardInterrupt
    write(log, row)


def test_fusing_changes_rounding_only(tmp_path):
    args = {"arch": "resnet20", "dataset": "synthetic", "limit": 64, "epochs": 1, "lr": 0.01, **QUICK}
    losses = []
    for fuse in (True, False):
        _, logs = train(fuse=fuse, out_dir=tmp_path / str(fuse), **args)
        losses.append((logs[0]["train_loss"], logs[0]["test_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_torchvisions_networks_train_with_bounded_norms(tmp_path):
    args = {"dataset": "synthetic", "limit": 16, "epochs": 1, "batch_size": 8, "out_dir": tmp_path, "progress": False}
    model, _ = train(arch="resnet18", **args)
    assert all(m.bound == "sigmoid" for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_wrong_names_and_values_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown method 'l2'.*Known: l1, rni, ucs"):
        train(method="l2")
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        train(dataset="cifar")
    with pytest.raises(ValueError, match="unknown model 'vgg17'"):
        train(dataset="digits", arch="vgg17")
    with pytest.raises(ValueError, match="epochs >= 1"):
        train(dataset="digits", arch="vgg-small", epochs=0, out_dir=tmp_path)
    with pytest.raises(ValueError, match="no sigmoid norm"):
        prune_finetune(models.create("vgg-small"), dataset="digits", limit=20, out_dir=tmp_path)
    with pytest.raises(DataError, match="root is missing"):
        train()


def test_from_scratch_keeps_the_shape_only():
    model, x = models.create("wrn-40-2", depth=10, width=1), torch.randn(2, 3, 16, 16)
    small = compact(model, methods.create("maskblock-l1", model, x, 0.5).keep_masks(), x)
    with torch.no_grad():
        small.layer1[0].bn1.running_mean.fill_(3.0)
    a, b, c = (from_scratch(small, seed=seed) for seed in (1, 1, 2))
    assert [p.shape for p in a.parameters()] == [p.shape for p in small.parameters()]
    for (name, p), q, r, was in zip(
        a.named_parameters(), b.parameters(), c.parameters(), small.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        if p.dim() > 1:
            assert not torch.equal(p, r) and not torch.equal(p, was), name
    conv = a.layer3[0].conv2.weight  # N(0, sqrt(2 / (k k Cout))) of the pruned shape
    assert conv.std().item() == pytest.approx((2 / (9 * len(conv))) ** 0.5, rel=0.1)
    assert not a.layer1[0].bn1.running_mean.any() and not a.fc.bias.any()


def test_from_scratch_names_what_it_cannot_initialise():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match=r"0 \(Scaled\) has parameters but no reset_parameters"):
        from_scratch(nn.Sequential(Scaled()))
    filled = from_scratch(nn.Sequential(Scaled()), init=lambda m: nn.init.zeros_(m[0].scale))
    assert not filled[0].scale.any()


@pytest.mark.parametrize("shrink_every", [0, 1])
def test_fit_resumes_a_run_that_shrinks(tmp_path, shrink_every):
    def start():
        torch.manual_seed(0)
        model = fpnn.convert_batchnorm(models.create("vgg-small"))
        x, _ = next(iter(DIGITS.loaders(4).test))
        options = {"per_cut": 30, "frequency": 3, "max_removed": 90, "shrink_every": shrink_every}
        return model, methods.create("taylor-gate", model, x[:2], **options), sgd(model, 0.01)

    runs = []
    for stops in ((2,), (1, 2)):
        folder = tmp_path / str(len(stops))
        for epochs in stops:  # each in a process of its own, as it were
            model, method, optimizer = start()
            fit(
                model, DIGITS.loaders(64, 0), epochs=epochs, optimizer=optimizer, method=method,
                checkpoint=folder / "last.pt", resume=True, progress=False,
            )  # fmt: skip
        runs.append((model, method))
    (a, whole), (b, resumed) = runs
    assert whole.cuts.removed >= 60
    assert all(torch.equal(x, y) for x, y in zip(whole.survivors().values(), resumed.survivors().values(), strict=True))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
