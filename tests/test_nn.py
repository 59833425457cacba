"""The batch norm modules against nn.BatchNorm2d and against the numbers of RNI's authors."""

import copy
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.common_modules import module_db

from fastprune.nn import BatchNormAct2d, SigmoidBatchNorm2d, SyncBatchNormAct2d

GOLDEN = np.load(Path(__file__).parent / "golden" / "rni.npz")
INFO = next(info for info in module_db if info.module_cls is nn.BatchNorm2d)
OURS = [BatchNormAct2d, SyncBatchNormAct2d]


def close(got, want, eps=None):
    """Equal to rounding: 32 units in the last place of the largest element."""
    want = want.detach()
    if eps is None:
        eps = torch.finfo(want.dtype).eps if want.is_floating_point() else 0
    largest = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=32 * eps * max(1.0, largest))


def module_inputs(dtype, training):
    return INFO.module_inputs_func(INFO, device="cpu", dtype=dtype, requires_grad=True, training=training)


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pytorchs_own_batch_norm_inputs(cls, dtype, training):
    for case in module_inputs(dtype, training):
        args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
        (x,) = case.forward_input.args
        runs = []
        for kind in (nn.BatchNorm2d, cls):
            m = kind(*args, **kwargs, dtype=dtype).train(training)
            if m.affine:
                with torch.no_grad():
                    m.weight.copy_(torch.linspace(-1, 2, len(m.weight)))
                    m.bias.copy_(torch.linspace(1, -1, len(m.bias)))
            leaf = x.detach().clone().requires_grad_()
            for _ in range(2):  # twice, so that running statistics and cumulative averages show
                y = m(leaf)
                (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
            runs.append([y, leaf.grad, *(p.grad for p in m.parameters()), *m.buffers()])
        assert len(runs[0]) == len(runs[1])
        for got, want in zip(runs[1], runs[0], strict=True):
            close(got, want)


@pytest.mark.parametrize("cls", OURS)
def test_pytorchs_own_error_inputs(cls):
    dtype = torch.float32
    for case in INFO.module_error_inputs_func(INFO, device="cpu", dtype=dtype, requires_grad=False, training=True):
        given = case.module_error_input
        with pytest.raises(case.error_type, match=case.error_regex):
            m = cls(*given.constructor_input.args, **given.constructor_input.kwargs)
            m(*given.forward_input.args)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_sigmoid_norm_gives_the_authors_numbers(mode):
    g = {k.removeprefix("sigbn/"): torch.from_numpy(v) for k, v in GOLDEN.items() if k.startswith("sigbn/")}
    m = SigmoidBatchNorm2d(5, float(g["eps"]), float(g["momentum"]), dtype=torch.float64).train(mode == "train")
    m.load_state_dict(
        {
            "weight": g["gamma"],
            "running_mean": g["running_mean0"],
            "running_var": g["running_var0"],
            "num_batches_tracked": torch.tensor(0),
        }
    )
    x = g["x"].clone().requires_grad_()
    y = m(x)
    y.backward(g["dy"])
    got = {"y": y, "dx": x.grad, "dgamma": m.weight.grad}
    if mode == "train":
        got |= {"running_mean1": m.running_mean, "running_var1": m.running_var}
        assert m.num_batches_tracked == int(g["train/num_batches_tracked"])
    for name, value in got.items():
        torch.testing.assert_close(value, g[f"{mode}/{name}"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bound", [None, "sigmoid"])
@pytest.mark.parametrize("bias", [True, False])
def test_residual_and_relu(bias, bound, training, layout):
    m = BatchNormAct2d(7, bias=bias, act="relu", bound=bound).train(training)
    reference = nn.BatchNorm2d(7, dtype=torch.float64).train(training)
    with torch.no_grad():
        m.weight.normal_()
        m.running_mean.normal_()
        m.running_var.uniform_(0.5, 2)
        if bias:
            m.bias.normal_()
            reference.bias.copy_(m.bias)
        reference.weight.copy_(m.scale)
        reference.running_mean.copy_(m.running_mean)
        reference.running_var.copy_(m.running_var)
    x, r = (torch.randn(3, 7, 5, 6).to(memory_format=layout).requires_grad_() for _ in range(2))
    X, R = (t.detach().double().requires_grad_() for t in (x, r))
    y, Y = m(x, r), F.relu(reference(X) + R)
    dy = torch.randn(3, 7, 5, 6)
    y.backward(dy)
    Y.backward(dy.double())
    s = m.scale.detach()
    dweight = reference.weight.grad * (s * (1 - s) if bound else 1)
    pairs = [(y, Y), (x.grad, X.grad), (r.grad, R.grad), (m.weight.grad, dweight)]
    pairs += [(m.running_mean, reference.running_mean), (m.running_var, reference.running_var)]
    if bias:
        pairs.append((m.bias.grad, reference.bias.grad))
    for got, want in pairs:
        close(got.double(), want, torch.finfo(torch.float32).eps)
    assert y.is_contiguous(memory_format=layout)


def test_act_and_residual_per_call_and_broadcast():
    m = BatchNormAct2d(4).eval()
    x = torch.randn(2, 4, 3, 3)
    close(m(x, act="relu"), m(x).relu())
    row = torch.randn(1, 4, 1, 1)
    assert torch.equal(m(x, row), m(x) + row)
    wide = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert m(x, wide).dtype == torch.float64


@pytest.mark.parametrize("training", [True, False])
def test_gate_grad_is_the_gradient_of_a_gate_on_the_norms_output(training):
    m = BatchNormAct2d(4, act="relu").train(training)
    x, r = torch.randn(3, 4, 5, 5, requires_grad=True), torch.randn(3, 4, 5, 5)
    with torch.no_grad():
        m.weight.normal_()
        m.bias.normal_()
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(m.state_dict())
    gate = torch.ones(3, 4, 1, 1, requires_grad=True)
    F.relu(plain.train(training)(x) * gate + r).square().sum().backward()
    m.gate_grad = torch.full((3, 4), torch.nan)
    m(x, r).square().sum().backward()
    close(m.gate_grad, gate.grad[..., 0, 0], 4e-7)
    assert "gate_grad" not in m.state_dict()


def test_state_dicts_load_in_both_directions():
    theirs, ours = nn.BatchNorm2d(4), BatchNormAct2d(4, act="relu")
    with torch.no_grad():
        theirs.weight.normal_()
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert theirs.state_dict()._metadata == ours.state_dict()._metadata
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("strict", [True, False])
def test_state_of_the_other_kind_is_refused(strict):
    free, bounded = nn.Sequential(BatchNormAct2d(4)), nn.Sequential(BatchNormAct2d(4, bound="sigmoid"))
    before = bounded[0].weight.clone()
    for source in (free, nn.Sequential(nn.BatchNorm2d(4))):
        with pytest.raises(
            RuntimeError, match=r"0: expected the state of a norm with scale sigmoid.*on a model that has"
        ):
            bounded.load_state_dict(source.state_dict(), strict=strict)
    assert torch.equal(bounded[0].weight, before)
    with pytest.raises(
        RuntimeError, match=r"scale weight, got one with scale sigmoid\(weight\).*on this model, then load"
    ):
        free.load_state_dict(bounded.state_dict(), strict=strict)
    buffer = io.BytesIO()  # the mark survives a file, and a dictionary without metadata is taken at its word
    torch.save(bounded.state_dict(), buffer)
    buffer.seek(0)
    with pytest.raises(RuntimeError, match="scale sigmoid"):
        free.load_state_dict(torch.load(buffer, weights_only=True))
    bounded.load_state_dict(dict(bounded.state_dict()))


def test_a_marked_state_brings_its_shift():
    source, target = (nn.Sequential(BatchNormAct2d(4, bound="sigmoid", bias=b)) for b in (True, False))
    nn.init.normal_(source[0].bias)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        target.load_state_dict(dict(source.state_dict()))
    target.load_state_dict(source.state_dict())
    assert isinstance(target[0].bias, nn.Parameter) and torch.equal(target[0].bias, source[0].bias)


def test_reset_parameters():
    m = SigmoidBatchNorm2d(1000)
    assert m.bias is None and abs(m.weight.mean().item()) < 0.2 and 0.8 < m.weight.std().item() < 1.2
    m = BatchNormAct2d(3, bias=False)
    m.running_mean.fill_(2)
    m.reset_parameters()
    assert m.weight.tolist() == [1, 1, 1] and m.running_mean.tolist() == [0, 0, 0]


def test_scale_and_repr():
    m = SigmoidBatchNorm2d(2, act="relu")
    assert torch.equal(m.scale, m.weight.sigmoid())
    assert repr(m) == (
        "SigmoidBatchNorm2d(2, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, bias=False, "
        "act='relu', bound='sigmoid')"
    )
    assert repr(BatchNormAct2d(2))[14:] == repr(nn.BatchNorm2d(2))[11:]
    assert BatchNormAct2d(2).scale.tolist() == [1, 1] and BatchNormAct2d(2, affine=False).scale is None


def test_bad_arguments():
    with pytest.raises(ValueError, match="act must be 'relu' or None, got 'gelu'"):
        BatchNormAct2d(2, act="gelu")
    with pytest.raises(ValueError, match="bound must be"):
        BatchNormAct2d(2, bound="tanh")
    with pytest.raises(ValueError, match="affine=True"):
        SigmoidBatchNorm2d(2, affine=False)
    with pytest.raises(ValueError, match="expected 4D"):
        BatchNormAct2d(2)(torch.randn(2, 2))


@pytest.mark.parametrize("make", [BatchNormAct2d, SigmoidBatchNorm2d, SyncBatchNormAct2d])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(make, copied):
    m = make(3, act="relu")
    m(torch.randn(2, 3, 4, 4))
    c, x = copied(m), torch.randn(2, 3, 4, 4)
    assert c.weight is not m.weight
    assert torch.equal(c.eval()(x), m.eval()(x)) and repr(c) == repr(m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_whole_module_in_another_dtype(dtype):
    m = BatchNormAct2d(3, act="relu").to(dtype)
    want = nn.BatchNorm2d(3).to(dtype)
    x = torch.randn(4, 3, 5, 5).to(dtype)
    y = m(x)
    assert y.dtype == dtype and m.running_mean.dtype == dtype
    close(y.float(), want(x).relu().float(), torch.finfo(dtype).eps)


def test_autocast_works_in_the_dtype_of_x():
    m = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act="relu"))
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
        want = F.batch_norm(m[0](x), None, None, m[1].weight, m[1].bias, True).relu()
    assert y.dtype == want.dtype == torch.bfloat16
    close(y, want)
    y.float().sum().backward()
    assert m[1].weight.grad.dtype == torch.float32


# Dynamo's own, met where a compiled backend runs through an autograd.Function
DYNAMO = "ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning"
VARIANTS = [{}, {"bound": "sigmoid", "bias": False}, {"track_running_stats": False}, {"affine": False}]


@pytest.mark.filterwarnings(DYNAMO)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kwargs", VARIANTS)
def test_compile_fullgraph(kwargs, training):
    torch.compiler.reset()
    m = BatchNormAct2d(4, act="relu", **kwargs).train(training)
    c = torch.compile(copy.deepcopy(m), backend="aot_eager", fullgraph=True)
    runs = []
    for f in (m, c):
        x, r = (torch.arange(288.0).view(2, 4, 6, 6).sin().mul(k).requires_grad_() for k in (1, 2))
        f(x, r).square().sum().backward()
        runs.append((x.grad, r.grad, *(p.grad for p in f.parameters()), *f.buffers()))
    for got, want in zip(*runs, strict=True):
        close(got, want)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.filterwarnings(DYNAMO)
def test_compile_inductor():
    torch.compiler.reset()
    m = BatchNormAct2d(4, act="relu")
    c = torch.compile(copy.deepcopy(m), fullgraph=True)
    x = torch.randn(2, 4, 6, 6)
    close(c(x), m(x))
    close(c.running_var, m.running_var)


def test_export():
    m = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act="relu")).eval()
    x = torch.randn(2, 3, 6, 6)
    close(torch.export.export(m, (x,)).module()(x), m(x))
