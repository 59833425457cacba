"""What each option of ``fit`` does to a run."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from step_recorder import Recorder
from torch import nn

import fastprune as fp
from fastprune import data, parallel
from fastprune.capture import CapturedStep
from fastprune.errors import TrainingError
from fastprune.train import History, MetricsLog, evaluate, fit, resume, step

DIGITS = data.load("digits", limit=128)
CUTTING = {"per_cut": 2, "frequency": 2, "max_removed": 4, "stem": True, "shrink_every": 2}
EXAMPLE = torch.zeros(2, 1, 8, 8)


def net(norms=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1)]
    layers += [nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)]
    return nn.Sequential(*(m for m in layers if norms or not isinstance(m, nn.BatchNorm2d)))


def run(model=None, method=None, epochs=2, lr=0.05, momentum=0.9, batch_size=32, loaders=None, **options):
    model = model or net()
    if method is not None:
        name, more = method
        method = fp.create(name, model, EXAMPLE, **more)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    loaders = loaders or DIGITS.loaders(batch_size)
    history = fit(model, loaders, epochs=epochs, optimizer=optimizer, method=method, progress=False, **options)
    return model, history


def close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("method", [("taylor-gate", CUTTING), ("slimming", {"reg_weight": 0.01})], ids=lambda m: m[0])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
def test_compiling_changes_nothing_through_cuts(method):
    plain, expected = run(method=method)
    model, history = run(method=method, compile={"backend": "aot_eager"})
    close(model.state_dict(), plain.state_dict())
    assert history[-1]["train_loss"] == pytest.approx(expected[-1]["train_loss"], rel=1e-5)
    if method[0] == "taylor-gate":
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in net().parameters())


def test_a_last_batch_of_another_size_does_not_change_what_whole_batches_run():
    """Else a resumed run, whose compiler has not seen it yet, would end with other bits."""
    of_any_size = []

    def backend(graph, inputs):
        values = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        sizes = [n for v in values for n in (v.shape if isinstance(v, torch.Tensor) else [v])]
        of_any_size.append(any(isinstance(n, torch.SymInt) for n in sizes))
        return graph.forward

    loaders = data.load("digits", limit=72).loaders(32)  # the last batch has 8
    run(loaders=loaders, compile={"backend": backend})
    assert of_any_size == [False, False]
    torch.compiler.reset()  # it would remember that the size changed
    run(loaders=loaders, compile={"backend": backend, "dynamic": None})  # PyTorch's own way
    assert of_any_size[2:] == [False, True]


GROWING = {"update_interval": 1, "stabilize": 3, "reg_step": 0.25}


@pytest.mark.parametrize(
    "method, options",
    [
        (None, {"precision": "bf16"}),
        (("taylor-gate", CUTTING), {"ema": 0.9, "clip_norm": 1.0}),
        (("taylor-gate", CUTTING), {"compile": True}),
        (("greg-1", GROWING), {"channels_last": True, "ema": 0.9}),
        (("slimming", {"reg_weight": 0.01}), {"precision": "fp16", "clip_norm": 1.0}),
    ],
    ids=["plain", "cuts", "compiled", "grows", "fp16"],
)
def test_steps_replayed_from_a_graph_are_those_without(method, options, monkeypatch, tmp_path):
    made = []

    def recorded(*args, **kw):
        made.append(CapturedStep(Recorder(), *args, **kw))
        return made[-1]

    monkeypatch.setitem(step.CAPTURE, "cpu", recorded)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: nn.Sequential(model))  # new after each shrink

    def go(graph, epochs=3, **more):
        model = net()
        pruner = fp.create(method[0], model, EXAMPLE, **method[1]) if method else None
        optimizer = fp.optim.GrowingSGD(model.parameters(), 0.05, 0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        options_ = options | {"schedule": schedule, "schedule_every": "step", "progress": False} | more
        loaders = data.load("digits", limit=116).loaders(16)  # 7 whole batches and one of 4
        kw = {"optimizer": optimizer, "method": pruner, "epochs": epochs, "cuda_graph": graph}
        history = fit(model, loaders, **kw, **options_)
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in history]
        return model.state_dict(), rows, history.ema

    state, rows, ema = go(False)
    assert not made
    got, got_rows, got_ema = go(True)
    close(got, state, rtol=0, atol=0)
    assert got_rows == rows and sum(one._graph.replays for one in made) >= 8
    if ema is not None:
        close(got_ema.state_dict(), ema.state_dict(), rtol=0, atol=0)
    go(True, epochs=1, checkpoint=tmp_path / "last.pt")
    resumed, resumed_rows, _ = go(True, checkpoint=tmp_path / "last.pt", resume=True)
    close(resumed, state, rtol=0, atol=0)
    assert resumed_rows == rows


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "cuda_graph=True expects a model on a CUDA device, got one on cpu; train without cuda_graph"),
        ({"accumulate": 2}, "cuda_graph=True expects accumulate=1, got 2"),
        ({"compile": "reduce-overhead"}, "cuda_graph=True expects another mode of compile than 'reduce-overhead'"),
        ({"compile": {"mode": "reduce-overhead"}}, "another mode of compile than 'reduce-overhead'"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_before_anything_happens(options, said, monkeypatch, tmp_path):
    if options:
        monkeypatch.setitem(step.CAPTURE, "cpu", None)
    with pytest.raises(ValueError, match=said):
        run(checkpoint=tmp_path / "last.pt", cuda_graph=True, **options)
    assert not (tmp_path / "last.pt").exists()


def test_what_would_hang_or_leave_a_folder_behind_is_refused_at_once(monkeypatch, tmp_path):
    images = data.load("digits", limit=32)
    with pytest.raises(ValueError, match="cuda_graph=True expects a model on a CUDA device"):
        fp.train(images, "vgg-small", epochs=1, device="cpu", cuda_graph=True, out_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="clip_norm must be above 0, got -1"):
        fp.train(images, "vgg-small", epochs=1, device="cpu", clip_norm=-1, out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(parallel, "gathered", lambda mine: [mine, 3])  # another process has fewer batches
    with pytest.raises(ValueError, match=r"as many training batches in each process, got \[4, 3\]"):
        run()


def test_fp16_scales_the_loss_and_keeps_the_scale_over_a_resumption(tmp_path):
    def go(folder, epochs, resumed=False):
        path = tmp_path / folder
        model, _ = run(method=("slimming", {}), epochs=epochs, precision="fp16", checkpoint=path, resume=resumed)
        return model.state_dict(), resume.read_state(path)["scaler"]

    whole, scaler = go("whole", 3)
    assert whole["0.weight"].dtype == torch.float32 and scaler["_growth_tracker"] == 12
    go("part", 1)
    model, again = go("part", 3, resumed=True)
    assert again == scaler
    close(model, whole, rtol=0, atol=0)


def test_fp16_and_scores_of_gradients_are_refused_before_anything_happens(tmp_path):
    model = net()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"fit: taylor-gate scores by gradients, .*take precision='bf16'"):
        run(model, ("taylor-gate", CUTTING), precision="fp16", checkpoint=tmp_path / "last.pt")
    assert not (tmp_path / "last.pt").exists()
    close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_limits_the_norm_of_all_gradients(precision):
    model = net()
    before = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
    loaders = data.load("digits", limit=32).loaders(32)
    run(model, epochs=1, lr=1.0, momentum=0.0, clip_norm=1e-2, loaders=loaders, precision=precision)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert moved.norm().item() == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("method", [None, ("taylor-gate", CUTTING | {"max_removed": 2})], ids=["plain", "gates"])
def test_accumulated_batches_are_one_large_batch(method):
    """But for norms, which see each batch on its own; in eval mode gates have none."""
    model, history = run(net(norms=method is not None), method, batch_size=16, accumulate=2, epochs=1)
    one, expected = run(net(norms=method is not None), method, batch_size=32, epochs=1)
    assert history[-1]["step"] == expected[-1]["step"] == 4
    assert history[-1]["penalty"] == expected[-1]["penalty"] == 0
    if method is None:
        close(model.state_dict(), one.state_dict(), rtol=1e-4, atol=1e-6)
        assert history[-1]["train_loss"] == pytest.approx(expected[-1]["train_loss"], rel=1e-5)
    else:
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in one.parameters())


def test_a_last_group_with_fewer_batches_counts_by_its_images():
    """40 images in batches of 16: two batches, then one of 8."""
    images = data.load("digits", limit=40)
    model, history = run(net(norms=False), loaders=images.loaders(16), accumulate=2, epochs=1, momentum=0.0)
    one, _ = run(net(norms=False), loaders=images.loaders(32), epochs=1, momentum=0.0)
    assert history[-1]["step"] == 2
    close(model.state_dict(), one.state_dict(), rtol=1e-4, atol=1e-6)


def test_the_average_is_the_formulas_and_is_what_is_best():
    model, weights = net(), []
    x, y = next(iter(DIGITS.loaders(128).train))

    class Same(list):
        """The same batch in each step."""

    loaders = (Same([(x, y)] * 3), DIGITS.loaders(128).test)
    model.register_forward_hook(lambda m, *_: weights.append(m[0].weight.detach().clone()) if m.training else None)
    _, history = run(model, loaders=loaders, epochs=1, ema=0.75)
    after = [*weights[1:], model[0].weight.detach()]  # the first average is the weights after the first step
    expected = after[0]
    for w in after[1:]:
        expected = 0.75 * expected + 0.25 * w
    torch.testing.assert_close(history.ema[0].weight.detach(), expected)
    assert torch.equal(history.best_state["0.weight"], history.ema[0].weight)
    assert history[0]["ema_test_acc"] == evaluate(history.ema, loaders[1])["acc"]
    with pytest.raises(ValueError, match=r"ema must lie between 0 and 1, got 1\.5"):
        run(ema=1.5)


def test_buffers_that_are_no_floats_are_not_averaged():
    """As Swin's relative_position_index: 0.1 * i + 0.9 * i may be a little less than i."""
    model = net()
    model.register_buffer("index", torch.arange(1000))
    _, history = run(model, epochs=1, ema=0.9)
    assert torch.equal(history.ema.index, torch.arange(1000))
    assert torch.equal(history.ema[1].num_batches_tracked, model[1].num_batches_tracked)
    assert not torch.equal(history.ema[1].running_mean, model[1].running_mean)


def test_the_average_follows_cuts():
    model, history = run(method=("taylor-gate", CUTTING), ema=0.9)
    assert [p.shape for p in history.ema.parameters()] == [p.shape for p in model.parameters()]
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in net().parameters())
    history.ema.load_state_dict(history.best_state)


def test_an_epoch_before_the_model_got_smaller_is_not_the_best():
    history = History()
    history.add({"test_acc": 0.9}, nn.Linear(3, 2))
    history.add({"test_acc": 0.5}, nn.Linear(2, 2))
    history.add({"test_acc": 0.4}, nn.Linear(2, 2))
    assert history.best == 1 and history.best_state["weight"].shape == (2, 2)


def test_the_schedule_may_follow_steps():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.8)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    kw = {"optimizer": optimizer, "schedule": schedule, "progress": False}
    history = fit(model, DIGITS.loaders(32), epochs=2, schedule_every="step", **kw)
    assert [row["lr"] for row in history] == [0.8, 0.8 / 2**4]
    with pytest.raises(ValueError, match="schedule_every must be 'epoch' or 'step', got 'batch'"):
        fit(model, DIGITS.loaders(32), epochs=1, schedule_every="batch", **kw)


def test_deterministic_mode_holds_during_the_run_only():
    torch.backends.disable_global_flags()  # PyTorch's own test modules do so on import, for good
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    names = ("enabled", "benchmark", "deterministic", "allow_tf32")
    flags = [getattr(torch.backends.cudnn, name) for name in names]
    model, seen = net(), []
    model.register_forward_hook(
        lambda *_: seen.append(torch.is_deterministic_algorithms_warn_only_enabled() or torch.backends.cudnn.benchmark)
    )
    with torch.backends.cudnn.flags(*flags[:1], True, None, *flags[2:], None):
        run(model, epochs=1, deterministic=True)
        assert torch.backends.cudnn.benchmark
    assert seen and not any(seen)
    assert was == (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    assert flags == [getattr(torch.backends.cudnn, name) for name in names]

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            out = self.linear(x.flatten(1))
            return out + torch.zeros(64).put_(torch.zeros(64).long(), x.flatten(1)[0]).sum()  # no fixed order

    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        run(Pooled(), epochs=1, deterministic=True)


def test_tensorboard_gets_the_numbers_of_each_epoch(tmp_path, monkeypatch):
    got = []

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path / "board")

        def add_scalar(self, key, value, step):
            got.append((key, value, step))

        def flush(self):
            pass

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    _, history = run(log=MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "board"))
    assert ("test_acc", history[1]["test_acc"], 8) in got and ("train_loss", history[0]["train_loss"], 4) in got
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match="pip install tensorboard"):
        MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "board")


@pytest.mark.parametrize(
    "option, said",
    [
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"clip_norm": 0.0}, r"clip_norm must be above 0, got 0\.0; None clips nothing"),
        ({"precision": "tf32"}, "precision must be one of fp32, bf16, fp16, got 'tf32'"),
    ],
)
def test_values_out_of_range_are_named(option, said):
    with pytest.raises(ValueError, match=said):
        run(**option)


def test_images_per_second_and_rows_count_all_images():
    _, history = run(epochs=1)
    assert history[0]["images_per_s"] == pytest.approx(128 / history[0]["seconds"])
    x, y = next(iter(DIGITS.loaders(128).test))
    model, history = run(epochs=1)
    with torch.no_grad():
        assert history[0]["test_loss"] == pytest.approx(F.cross_entropy(model.eval()(x), y).item(), rel=1e-5)
