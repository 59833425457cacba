"""A captured step trains as the plain one does, to the bit; and nothing in it asks the host."""

from __future__ import annotations

import copy
import warnings
from contextlib import ExitStack, contextmanager

import pytest
import torch
from fastprune.kernels import tables
from step_recorder import HostSync, NoHost, NoLook, Recorder
from torch import nn
from torch.nn import functional as F

import fastprune as fp
from fastprune import backends
from fastprune.capture import CapturedStep, capture_step
from fastprune.errors import TrainingError
from fastprune.optim import GrowingSGD

X = torch.randn(2, 3, 8, 8)
STEPS = 26


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.conv2, self.norm2 = nn.Conv2d(10, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.BatchNorm2d(12)
        self.linear = nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + x)
        return self.linear(F.relu(self.norm3(self.conv3(x))).mean((2, 3)))


CUTS = {"ratio": 0.4, "per_cut": 3, "frequency": 7, "shrink_every": 1}
MASKS = CUTS | {"shrink_every": 0, "frequency": 5}
GROW = {"ratio": 0.5, "update_interval": 2, "stabilize": 6, "reg_step": 0.2, "reg_limit": 0.9}
TPP = GROW | {"zero_out_interval": 1, "update_interval": 1, "reg_limit": 2.0, "weight": 1.0}
DATA = [(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(4))]
METHODS = {
    "rni": ("rni", {}),
    "slimming": ("slimming", {}),
    "ucs": ("ucs", {}),
    "l1": ("l1", {}),
    "random": ("random", {}),
    "max": ("max", {}),
    "greg-1": ("greg-1", GROW),
    "greg-1 weights": ("greg-1", GROW | {"group": "weight"}),
    "greg-1 columns": ("greg-1", GROW | {"group": "channel"}),
    "greg-2": ("greg-2", GROW | {"pick_step": 0.1, "pick_limit": 0.25}),
    "fix-reg": ("fix-reg", GROW | {"fixed_steps": 8}),
    **{f"tpp {scheme}": ("tpp", TPP | {"scheme": scheme}) for scheme in ("v1", "v2", "v3", "v4", "v5", "v5_2", "v6")},
    "orth-kernel": ("orth-kernel", {}),
    "orth-conv": ("orth-conv", {}),
    "fisher": ("fisher", CUTS),
    "maskblock-l1": ("maskblock-l1", CUTS),
    "maskblock-random": ("maskblock-random", CUTS),
    **{
        name: (name, CUTS)
        for name in (
            "taylor-weight", "taylor-random", "taylor-weight-norm", "taylor-weight-abs", "taylor-output",
            "taylor-gate-persample", "taylor-gate", "bn-scale", "bn-taylor",
        )
    },
    "taylor-gate masks": ("taylor-gate", MASKS),
    "taylor-gate late": ("taylor-gate", CUTS | {"start_after": 3, "loss_threshold": 10.0}),
    "taylor-gate code": ("taylor-gate", CUTS | {"variant": "code"}),
    "taylor-gate once": ("taylor-gate", {"ratio": 0.4}),
    "taylor-output code": ("taylor-output", CUTS | {"variant": "code"}),
    "bn-taylor shift": ("bn-taylor", CUTS | {"shift": True}),
    "obd": ("obd", CUTS | {"data": DATA}),
    "taylor-gate-so": ("taylor-gate-so", CUTS | {"data": DATA}),
    "oracle": ("oracle", MASKS | {"data": DATA}),
}  # fmt: skip


def test_every_method_is_here():
    assert {name for name, _ in METHODS.values()} == set(fp.methods.METHODS)


class Run:
    """A network in training, by the lines of the documentation or by a step that is replayed."""

    def __init__(self, name, options, optimizer=GrowingSGD, dtype=torch.float32, lr=0.1, scaled=False, network=Residual,
                 device="cpu", **settings):  # fmt: skip
        torch.manual_seed(0)
        self.model = network()
        if name == "rni":
            fp.nn.convert_batchnorm(self.model, bound="sigmoid")
        self.model.to(device, dtype)
        if "data" in options:
            options = options | {"data": [(x.to(device), y.to(device)) for x, y in options["data"]]}
        self.method = fp.create(name, self.model, X.to(device, dtype), **options) if name else None
        settings = {"momentum": 0.9, "weight_decay": 1e-3, **settings}
        self.optimizer = optimizer(self.model.parameters(), lr, **settings)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.scaler = torch.amp.GradScaler(device, init_scale=16.0, growth_interval=3) if scaled else None
        self.losses, self.dtype, self.device, self.clip_norm = [], dtype, device, None

    def batch(self, i):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(4, 3, 8, 8, generator=generator).to(self.dtype)
        return x.to(self.device), torch.randint(4, (4,), generator=generator).to(self.device)

    def plain(self, x, y):
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        total = loss + self.method.penalty() if self.method else loss
        (self.scaler.scale(total) if self.scaler else total).backward()
        if self.clip_norm:
            if self.scaler:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        if self.method:
            self.method.step(self.optimizer, loss.detach(), self.scaler)
        elif self.scaler:
            self.scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        if self.scaler:
            self.scaler.update()
        return loss.detach()

    def captured(self, criterion=F.cross_entropy):
        self.graph = Recorder()
        settings = {"scaler": self.scaler, "clip_norm": self.clip_norm}
        return CapturedStep(self.graph, self.model, criterion, self.optimizer, self.method, 2, **settings)

    def train(self, step, steps=STEPS):
        for i in range(steps):
            self.losses.append(step(*self.batch(i)))
            self.schedule.step()
        return self

    def state(self):
        state = {f"model {key}": t for key, t in self.model.state_dict().items()}
        for i, entry in self.optimizer.state_dict()["state"].items():
            state |= {f"{key} of {i}": t for key, t in entry.items() if isinstance(t, torch.Tensor)}
        return state | {"losses": torch.stack(self.losses)}


def assert_alike(a: Run, b: Run) -> None:
    mine, theirs = a.state(), b.state()
    assert mine.keys() == theirs.keys() and all(t.isfinite().all() for t in mine.values())
    wrong = [key for key, t in mine.items() if not torch.equal(t, theirs[key])]
    assert not wrong, wrong


EACH = pytest.mark.parametrize("name, options", METHODS.values(), ids=METHODS)


@EACH
def test_replays_train_as_the_plain_step(name, options):
    """Over updates and cuts, with momentum and a schedule, to the bit."""
    plain, run = Run(name, options), Run(name, options)
    plain.train(plain.plain)
    step = run.captured()
    run.train(step)
    assert_alike(run, plain)
    assert run.graph.replays >= 5 and step.captures >= 1
    for a, b in zip(plain.model.parameters(), run.model.parameters(), strict=True):
        assert a.shape == b.shape
    if "per_cut" in options or "reg_step" in options:  # something was cut, and the run goes on behind it
        assert run.method.finished or run.method.cuts.cuts >= 2
        mine, theirs = run.method.keep_masks(), plain.method.keep_masks()
        assert all(torch.equal(mine[group], theirs[group]) for group in theirs)
    if name.startswith("taylor") and "per_cut" not in options:
        for group, score in plain.method.scores().items():
            assert torch.equal(score, run.method.scores()[group])


KINDS = {
    "sgd": (torch.optim.SGD, {"foreach": False}),
    "foreach": (torch.optim.SGD, {"foreach": True, "nesterov": True}),
    "fused": (torch.optim.SGD, {"fused": True}),
    "without momentum": (GrowingSGD, {"momentum": 0.0}),
    "nesterov": (GrowingSGD, {"nesterov": True}),
}


@pytest.mark.parametrize("optimizer, settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", ["greg-2", "tpp v5", "taylor-gate", "taylor-gate masks"])
def test_other_optimizers(name, optimizer, settings):
    """What a number in the graph would freeze is captured anew: SGD's learning rate here changes every third step."""
    runs = Run(*METHODS[name], optimizer, **settings), Run(*METHODS[name], optimizer, **settings)
    for run in runs:
        run.schedule = torch.optim.lr_scheduler.StepLR(run.optimizer, 9, 0.5)
    runs[0].train(runs[0].plain)
    runs[1].train(runs[1].captured())
    assert_alike(*runs) if not settings.get("fused") else compare(*runs)  # fused: the rate is a float32 in the graph
    assert runs[1].graph.replays >= 4


def compare(a, b):
    for key, t in a.state().items():
        torch.testing.assert_close(t, b.state()[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["rni", "taylor-gate", "greg-1", "tpp v5"])
def test_float64_on_eager(name):
    """Plain PyTorch in the place of the kernels; a rate on the device rounds once more there."""
    runs = [Run(*METHODS[name], dtype=torch.float64, lr=torch.tensor(0.1, dtype=torch.float64)) for _ in range(2)]
    with backends.force("eager"):
        runs[0].train(runs[0].plain)
        runs[1].train(runs[1].captured())
    assert_alike(*runs)
    assert runs[1].graph.replays >= 5


@pytest.mark.parametrize("name", ["greg-1", "tpp v5", "slimming"])
@pytest.mark.parametrize("overflow", [False, True])
def test_with_a_scaler(name, overflow):
    """A step that is skipped, and a scale that shrinks and grows, all on the device."""
    runs = [Run(*METHODS[name], scaled=True) for _ in range(2)]
    batches = Run.batch

    def batch(run, i):
        x, y = batches(run, i)
        return (x * torch.inf if overflow and i in (0, 12) else x), y

    for run in runs:
        run.batch = batch.__get__(run)
        for m in run.model.modules():  # inf would stay in the running statistics, and NaN in the losses
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        run.method.model.train(True)
        for m in run.model.modules():
            m.track_running_stats = False
    runs[0].train(runs[0].plain)
    runs[1].train(runs[1].captured())
    for run in runs:
        run.losses = [loss.nan_to_num(0.0) for loss in run.losses]
    assert_alike(*runs)
    assert runs[1].graph.replays >= 5 and runs[0].scaler.get_scale() == runs[1].scaler.get_scale() != 16.0
    assert all(p.isfinite().all() for p in runs[1].model.parameters())


def test_a_rate_on_the_device_that_its_scheduler_fills():
    runs = [Run(*METHODS["greg-1"], lr=torch.tensor(0.1)) for _ in range(2)]
    runs[0].train(runs[0].plain)
    runs[1].train(runs[1].captured())
    assert_alike(*runs)
    assert runs[1].optimizer.param_groups[0]["lr"].item() < 0.01


def test_the_rate_of_the_caller_stays_a_number():
    run = Run(*METHODS["rni"])
    run.train(run.captured())
    assert isinstance(run.optimizer.param_groups[0]["lr"], float)
    assert type(run.optimizer.state_dict()["param_groups"][0]["lr"]) is float


def test_masks_are_rewritten_in_place():
    """Without shrinking, cuts of layers that were cut before need no new capture."""
    run = Run("taylor-gate", MASKS | {"per_cut": 2, "frequency": 3, "group_size": 1, "ratio": 0.8})
    step = run.captured()
    run.train(step)
    assert run.method.cuts.cuts >= 6 and step.captures < run.method.cuts.cuts


def test_an_odd_batch_runs_as_it_is():
    runs = [Run(*METHODS["taylor-gate once"]) for _ in range(2)]
    steps = runs[0].plain, runs[1].captured()
    for i in range(14):
        for run, step in zip(runs, steps, strict=True):
            x, y = run.batch(i)
            if i in (1, 6, 9):  # more and fewer images than the first batch had
                x, y = (torch.cat([x, x]), torch.cat([y, y])) if i == 6 else (x[:3], y[:3])
            run.losses.append(step(x, y))
            grads = [p.grad.clone() for p in run.model.parameters()]
            run.losses.append(sum(g.sum() for g in grads))
    assert_alike(*runs)
    assert runs[1].graph.replays >= 5 and steps[1].captures == 1


def test_batches_may_be_others_from_now_on():
    runs = [Run(*METHODS["taylor-gate once"]) for _ in range(2)]
    steps = runs[0].plain, runs[1].captured()
    for i in range(16):
        for run, step in zip(runs, steps, strict=True):
            x, y = run.batch(i)
            run.losses.append(step(x[:3], y[:3]) if i < 6 else step(x, y))
    assert_alike(*runs)
    assert steps[1].captures == 2 and runs[1].graph.replays >= 5


def test_what_the_graph_holds_may_be_replaced():
    """States that are loaded, frozen parameters, another mode: captured anew, and never a replay of what was."""
    runs = [Run(*METHODS["taylor-gate masks"]) for _ in range(2)]
    steps = runs[0].plain, runs[1].captured()
    for i in range(24):
        for run, step in zip(runs, steps, strict=True):
            if i == 6:
                run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
            if i == 10:
                run.method.load_state_dict(copy.deepcopy(run.method.state_dict()))
            if i == 14:
                run.optimizer.param_groups[0]["weight_decay"] = 0.1
            if i == 18:
                run.model.linear.weight.requires_grad_(False)
            run.losses.append(step(*run.batch(i)))
    assert_alike(*runs)
    assert steps[1].captures >= 4


def test_masks_of_convolutions_may_change():
    """How many channels a masked convolution computes is part of its launch."""

    def network():
        layers = (fp.nn.MaskedConv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
        return nn.Sequential(*layers)

    runs = [Run(None, {}, network=network) for _ in range(2)]
    steps = runs[0].plain, runs[1].captured()
    for i in range(18):
        for run, step in zip(runs, steps, strict=True):
            if i == 6:
                run.model[0].out_mask = torch.arange(6) < 4
            if i == 12:
                run.model[0].out_mask[1] = False
            run.losses.append(step(*run.batch(i)))
    assert_alike(*runs)
    assert steps[1].captures == 3 and runs[1].graph.replays >= 6


def test_results_beside_the_loss():
    def criterion(out, y):
        return F.cross_entropy(out, y), (out.argmax(1) == y).sum()

    run = Run(*METHODS["slimming"])
    step = run.captured(criterion)
    results = [step(*run.batch(i)) for i in range(8)]
    assert run.graph.replays == 4 and all(len(pair) == 2 for pair in results)
    assert len({loss.item() for loss, _ in results}) == 8  # each its own, though the graph writes to one place
    scales = [m.weight for m in run.model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = step.penalty.item()
    assert before == pytest.approx(1e-4 * sum(w.abs().sum().item() for w in scales), rel=1e-2)


@pytest.mark.parametrize("name, scaled", [("taylor-weight", False), ("greg-1", True)])
def test_gradients_that_are_clipped(name, scaled):
    runs = [Run(*METHODS[name], scaled=scaled) for _ in range(3)]
    for run in runs[:2]:
        run.clip_norm = 0.5
    runs[0].train(runs[0].plain, 12)
    runs[1].train(runs[1].captured(), 12)
    runs[2].train(runs[2].plain, 12)
    assert_alike(*runs[:2])
    assert runs[1].graph.replays >= 4 and not torch.equal(runs[0].losses[-1], runs[2].losses[-1])


def test_without_a_method():
    runs = [Run(None, {}) for _ in range(2)]
    runs[0].train(runs[0].plain, 8)
    runs[1].train(runs[1].captured(), 8)
    assert_alike(*runs)
    assert runs[1].graph.replays >= 3


# What the recorder sees


def test_the_recorder_sees_a_look_at_a_value():
    def criterion(out, y):
        loss = F.cross_entropy(out, y)
        return loss * 2 if loss.item() > 1 else loss

    run = Run(*METHODS["rni"])
    step = run.captured(criterion)
    with pytest.raises(TrainingError, match="capture_step: the step cannot be captured: item in a step; the m"):
        run.train(step)
    assert step.captures == 0


@pytest.mark.parametrize(
    "look",
    [
        lambda t: t.nonzero(), lambda t: t[t > 0], lambda t: t.cpu(), lambda t: t.tolist(), lambda t: bool(t.sum() > 0),
        lambda t: torch.tensor([1.0, 2.0]), lambda t: torch.equal(t, t), lambda t: t.numpy(),
    ],
)  # fmt: skip
def test_the_recorder_sees_what_leaves_the_device(look):
    with pytest.raises(HostSync):
        Recorder().capture(lambda: look(torch.ones(3)))


def test_the_recorder_sees_a_counter_of_python():
    count = 0

    def criterion(out, y):
        nonlocal count
        count += 1
        return F.cross_entropy(out, y) * count

    runs = [Run(*METHODS["rni"]) for _ in range(2)]
    runs[0].train(lambda x, y: runs[0].captured(criterion)(x, y), 8)  # a new step each time: never captured
    count = 0
    runs[1].train(runs[1].captured(criterion), 8)
    with pytest.raises(AssertionError, match="model"):
        assert_alike(*runs)


def test_the_recorder_sees_a_frozen_rate(monkeypatch):
    monkeypatch.setattr(CapturedStep, "_write_rates", lambda self: None)
    monkeypatch.setattr(CapturedStep, "_numbers", lambda self: ())
    runs = [Run(*METHODS["rni"]) for _ in range(2)]
    runs[0].train(runs[0].plain, 8)
    runs[1].train(runs[1].captured(), 8)
    with pytest.raises(AssertionError, match="model"):
        assert_alike(*runs)


def test_the_recorder_sees_a_tensor_that_was_replaced(monkeypatch):
    """A coefficient in another tensor than the one of the capture."""
    runs = [Run(*METHODS["greg-1"]) for _ in range(2)]
    monkeypatch.setattr(type(runs[1].method), "structure", lambda self: ())
    write = type(runs[1].method)._write_coefficients

    def anew(self):
        self._spread_coefficients()
        write(self)

    monkeypatch.setattr(type(runs[1].method), "_write_coefficients", anew)
    runs[0].train(runs[0].plain, 12)
    runs[1].train(runs[1].captured(), 12)
    with pytest.raises(AssertionError, match="model"):
        assert_alike(*runs)


@EACH
def test_a_plain_step_asks_the_host_nothing(name, options):
    """Between cuts and updates that read magnitudes; the first steps make what later ones use."""
    run = Run(name, {**options, "frequency": 100} if "frequency" in options else options)
    quiet = 0
    for i in range(8):
        x, y = run.batch(i)
        watched = i >= 2
        if isinstance(run.method, fp.methods.greg.GrowingMethod):
            run.method.update()  # may read magnitudes
            watched &= run.method.phase == "grow" and run.method.growth.cut is not None
        if run.method.name in ("obd", "taylor-gate-so", "oracle", "taylor-random", "maskblock-random"):
            watched = False  # of data, or of noise, on the host by design
        if watched:
            quiet += 1
            with NoHost(), NoLook():
                run.plain(x, y)
        else:
            run.plain(x, y)
    assert quiet >= 2 or run.method.name in ("obd", "taylor-gate-so", "oracle", "taylor-random", "maskblock-random")


# The kernels' tables


@contextmanager
def launched_by_triton():
    """All but the norms, which would take long."""
    pytest.importorskip("triton")
    if not backends.INTERPRET:
        pytest.skip("needs Triton's interpreter, TRITON_INTERPRET=1")
    ops = ("growing_sgd", "filter_norm", "weight_taylor", "scale_penalty", "gram_penalty", "gate_sums")
    with ExitStack() as stack:
        for op in ops:
            stack.enter_context(backends.force("triton", op))
        yield


def small_runs(name, count):
    """Without a cut or an end, which launch more."""
    name, options = METHODS[name]
    endless = {"frequency": 100} if "frequency" in options else {"stabilize": 100} if "stabilize" in options else {}
    return [Run(name, options | endless, network=small) for _ in range(count)]


def small():
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 4))


TABLES = {  # tables that hold the address of a gradient
    "slimming": 1,
    "greg-1": 1,
    "tpp v5": 1,
    "taylor-weight": 2,
    "taylor-weight-norm": 1,
    "taylor-gate": 1,
}


@pytest.mark.parametrize("name, moving", TABLES.items())
@pytest.mark.parametrize("where", ["as they were", "elsewhere"])
def test_tables_are_made_once_per_set_of_addresses(name, moving, where):
    """Gradients that stay: none after the first steps.  Elsewhere: one of the optimizer, one of weight_taylor."""
    (run,), old, made = small_runs(name, 1), [], []
    if where == "as they were":
        run.optimizer.zero_grad = lambda: torch.optim.SGD.zero_grad(run.optimizer, set_to_none=False)
    with launched_by_triton():
        for i in range(7):
            before = tables.copies
            run.plain(*run.batch(i))
            made.append(tables.copies - before)
            old.append([p.grad for p in run.model.parameters()] if where == "elsewhere" else None)
    assert made[0] > 0 and made[4:] == [moving if where == "elsewhere" else 0] * 3, made


@pytest.mark.parametrize("name", ["slimming", "tpp v5", "taylor-weight"])
def test_replays_make_no_tables(name):
    runs = small_runs(name, 2)
    with launched_by_triton():
        step = runs[1].captured()
        runs[0].train(runs[0].plain, 10)
        made = []
        for i in range(10):
            before, replays = tables.copies, runs[1].graph.replays
            runs[1].losses.append(step(*runs[1].batch(i)))
            runs[1].schedule.step()
            if runs[1].graph.replays > replays:
                made.append(tables.copies - before)
    assert_alike(*runs)
    assert len(made) >= 4 and not any(made), made


def test_a_table_of_a_capture_is_filled_when_it_is_over(monkeypatch):
    made = []

    @tables.cached(2)
    def make(numbers, device):
        made.append(numbers)
        return tables.put(torch.tensor(numbers), device)

    cpu, arena = torch.device("cpu"), torch.zeros(1024, dtype=torch.uint8)
    with tables.session() as step:
        usual = make((1, 2), cpu)
    assert step.bytes >= 16 and step.kept[-1] is usual and make((1, 2), cpu) is usual
    monkeypatch.setattr(tables, "capturing", lambda device: True)
    with tables.session(arena) as capture:
        assert make((1, 2), cpu) is usual  # what there is may be used
        first, second = make((3, 4, 5), cpu), make((3, 4, 5), cpu)
        assert first is not second and not first.any() and first.data_ptr() % 16 == second.data_ptr() % 16
        with pytest.raises(RuntimeError, match="more tables in the captured step than in the one before"):
            make(tuple(range(1000)), cpu)
    capture.fill()
    assert first.tolist() == second.tolist() == [3, 4, 5] and any(t is usual for t in capture.kept)
    with pytest.raises(RuntimeError, match="a CUDA graph capture met tensors at new addresses; capture with fastprune"):
        make((6,), cpu)
    monkeypatch.undo()
    assert make((3, 4, 5), cpu) is not first  # nothing of a capture is kept for others
    make((7,), cpu), make((8,), cpu)
    assert made.count((1, 2)) == 1 and make((1, 2), cpu) is not usual  # the one not used for the longest time went


# What is refused


def test_what_is_refused():
    run = Run(*METHODS["rni"])
    with pytest.raises(ValueError, match="capture_step: expected a model on a CUDA device, got one on cpu"):
        capture_step(run.model, F.cross_entropy, run.optimizer, run.method)
    with pytest.raises(ValueError, match="expected warmup of at least 2 steps, got 1"):
        CapturedStep(Recorder(), run.model, F.cross_entropy, run.optimizer, warmup=1)

    def make(optimizer, scaler=None):
        CapturedStep(Recorder(), run.model, F.cross_entropy, optimizer, scaler=scaler)

    with pytest.raises(ValueError, match="expected Adam with capturable=True, got capturable=False"):
        make(torch.optim.Adam(run.model.parameters()))
    with pytest.raises(ValueError, match="SGD reads a tensor as learning rate on the host"):
        make(torch.optim.SGD(run.model.parameters(), torch.tensor(0.1)))
    with pytest.raises(ValueError, match="a GradScaler asks the host in each step of SGD; give it fused=True"):
        make(torch.optim.SGD(run.model.parameters(), 0.1), torch.amp.GradScaler("cpu"))
    make(torch.optim.SGD(run.model.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False))


def test_numbers_that_change_in_every_step_are_named():
    run = Run(*METHODS["rni"])
    step = run.captured()
    with pytest.warns(UserWarning, match="a number in the optimizer's parameter groups changes again and again"):
        for i in range(6):
            run.optimizer.param_groups[0]["momentum"] = 0.9 - 0.01 * i
            step(*run.batch(i))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(*run.batch(6))


# On a GPU, with graphs of CUDA.  Sums of other kernels than ours may round otherwise in a graph: close, not equal

ONCE = pytest.mark.parametrize("name, options", dict(reversed(METHODS.values())).items())  # the first of each name
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def as_on_a_gpu():
    """PyTorch's deterministic mode warns of cuBLAS; cuDNN without autotuning picks one algorithm for all runs."""
    torch.use_deterministic_algorithms(False)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


class TestOnAGPU:
    pytestmark = GPU

    @ONCE
    def test_a_real_graph_trains_as_the_plain_step(self, name, options, as_on_a_gpu):
        runs = [Run(name, options, device="cuda", lr=0.01) for _ in range(2)]
        step = capture_step(runs[1].model, F.cross_entropy, runs[1].optimizer, runs[1].method, warmup=2)
        runs[0].train(runs[0].plain)
        runs[1].train(step)
        assert step.captures >= 1
        for group, keep in runs[0].method.keep_masks().items():
            assert torch.equal(keep, runs[1].method.keep_masks()[group])
        compare_losses(*runs)

    @pytest.mark.parametrize("name", ["greg-1", "tpp v5"])
    def test_with_a_scaler_and_autocast(self, name, as_on_a_gpu):
        run = Run(*METHODS[name], device="cuda", lr=0.01, scaled=True)
        step = capture_step(
            run.model, F.cross_entropy, run.optimizer, run.method, scaler=run.scaler, autocast=torch.float16
        )
        run.train(step)
        assert step.captures >= 1 and run.scaler.get_scale() > 16
        assert torch.stack(run.losses).isfinite().all()

    def test_batches_from_the_host_and_odd_ones(self, as_on_a_gpu):
        runs = [Run(*METHODS["taylor-gate once"], device="cuda", lr=0.01) for _ in range(2)]
        step = capture_step(runs[1].model, F.cross_entropy, runs[1].optimizer, runs[1].method)
        for i in range(12):
            x, y = runs[0].batch(i)
            x, y = (x[:3], y[:3]) if i == 7 else (x, y)
            runs[0].losses.append(runs[0].plain(x, y))
            runs[1].losses.append(step(x.cpu(), y.cpu()))
        compare_losses(*runs)
        assert step.captures == 1

    def test_a_compiled_model(self, as_on_a_gpu):
        runs = [Run(*METHODS["greg-1"], device="cuda", lr=0.01) for _ in range(2)]
        compiled = torch.compile(runs[1].model)
        step = capture_step(compiled, F.cross_entropy, runs[1].optimizer, runs[1].method)
        runs[0].train(runs[0].plain)
        runs[1].train(step)
        assert step.captures >= 1
        compare_losses(*runs)

    @ONCE
    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
    def test_a_plain_step_does_not_wait(self, name, options, as_on_a_gpu):
        """Between two cuts, or updates that read magnitudes."""
        run = Run(name, {**options, "frequency": 100} if "frequency" in options else options, device="cuda")
        if run.method.name in ("obd", "taylor-gate-so", "oracle"):
            pytest.skip("evaluates on data at the start of a window")
        batches = [run.batch(i) for i in range(8)]
        for i, batch in enumerate(batches):
            update = isinstance(run.method, fp.methods.greg.GrowingMethod)
            if update:
                run.method.update()
            watched = i >= 3 and (not update or (run.method.phase == "grow" and run.method.growth.cut is not None))
            torch.cuda.set_sync_debug_mode("error" if watched else "default")
            try:
                run.plain(*batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def compare_losses(a, b):
    torch.testing.assert_close(torch.stack(a.losses), torch.stack(b.losses), rtol=1e-2, atol=1e-3)
