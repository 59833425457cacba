"""Jacobian singular values against products of matrices and against autograd's own Jacobian."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastprune import models
from fastprune.nn import convert_batchnorm
from fastprune.trainability import jacobian_singular_values, orthogonalise, trainability


def eps(dtype, exact):
    return 20 * torch.finfo(dtype).eps * max(1.0, exact.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [(12, 7, 9, 5), (4, 6, 8)])  # more inputs than outputs, and fewer
def test_a_linear_network_is_the_product_of_its_matrices(sizes, dtype):
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    model = nn.Sequential(*layers).to(dtype)
    product = torch.eye(sizes[0], dtype=torch.float64)
    for layer in layers:
        product = layer.weight.detach().double() @ product
    exact = torch.linalg.svdvals(product)
    found = jacobian_singular_values(model, torch.randn(3, sizes[0], dtype=dtype))
    assert found.shape == (3, min(sizes[0], sizes[-1])) and found.dtype == dtype and not found.requires_grad
    torch.testing.assert_close(found.double(), exact.expand(3, -1), rtol=0, atol=eps(dtype, exact))
    assert (found[:, :-1] >= found[:, 1:]).all()


def small(name, dtype):
    """A CIFAR network whose running statistics are not those of initialisation."""
    torch.manual_seed(1)
    model = models.create(name).to(dtype)
    with torch.no_grad():
        model(torch.randn(4, 3, 16, 16, dtype=dtype))
    return model


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_a_network_with_norms_has_autograds_jacobian(chunk):
    model, x = small("resnet20", torch.float64), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    whole = torch.autograd.functional.jacobian(model.eval(), x)  # (N, out, N, ...)
    exact = torch.stack([torch.linalg.svdvals(whole[i, :, i].flatten(1)) for i in range(3)])
    found = jacobian_singular_values(model, x, chunk)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_converted_norms_pass_the_same_gradients(dtype):
    model, x = small("resnet20", dtype), torch.randn(2, 3, 16, 16, dtype=dtype)
    plain = jacobian_singular_values(model, x)
    fused = jacobian_singular_values(convert_batchnorm(model, fuse=True), x)
    torch.testing.assert_close(fused, plain, rtol=1e-10 if dtype == torch.float64 else 1e-3, atol=0)


def test_the_model_and_the_inputs_are_left_alone():
    model, x = models.create("resnet20").train(), torch.randn(2, 3, 8, 8)
    model.conv1.eval()
    model(x).sum().backward()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    random = torch.get_rng_state()
    before = x.clone()
    jacobian_singular_values(model, x)
    assert model.training and not model.conv1.training and model.layer1.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(x, before) and not x.requires_grad


def test_it_works_where_autograd_is_off_and_for_a_relu_in_place():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Dropout(0.5)), torch.randn(5, 4)
    with torch.no_grad():
        found = jacobian_singular_values(model, x)
        live = (model[0](x) > 0).float()
    exact = torch.linalg.svdvals(live[:, :, None] * model[0].weight.detach())
    torch.testing.assert_close(found, exact)
    assert (live.sum(1) < 3).any()  # dead outputs: singular values of 0


def test_outputs_that_do_not_see_the_input_count_as_zeros():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(1, 3)), nn.Linear(4, 3)

        def forward(self, x):
            return torch.cat([self.a.expand(len(x), 3), self.b(x)[:, :1]], 1)

    model = Constant()
    found = jacobian_singular_values(model, torch.randn(2, 4))
    torch.testing.assert_close(found[:, 0], model.b.weight[0].norm().detach().expand(2))
    assert found.shape == (2, 4) and not found[:, 1:].any()
    model.forward = lambda x: model.a.expand(len(x), 3)
    assert not jacobian_singular_values(model, torch.randn(2, 4)).any()


def test_half_precision_reports_in_float32():
    model = nn.Linear(6, 4).bfloat16()
    found = jacobian_singular_values(model, torch.randn(2, 6, dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0], torch.linalg.svdvals(model.weight.detach().float()))


def test_the_summary_is_tpps():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.diag(torch.tensor([3.0, 0.5]))
    found = trainability(model, torch.randn(7, 2))
    assert found == pytest.approx({"mean": 1.75, "std": 1.25, "max": 3.0, "min": 0.5, "condition_number": 6.0})
    bent = nn.Sequential(model, nn.PReLU(1, init=0.25))
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])  # values 3 and 0.5, then 0.75 and 0.5
    assert trainability(bent, x)["condition_number"] == pytest.approx((6 + 1.5) / 2)
    model.weight.data[1] = 0
    assert trainability(model, x)["condition_number"] == math.inf


def test_orthogonal_layers_are_an_isometry():
    options = {"in_features": 20, "hidden": 12, "depth": 5, "num_classes": 6}
    model, x = models.create("mlp-7-linear", **options).double(), torch.randn(2, 20, dtype=torch.float64)
    assert trainability(model, x)["mean"] < 0.1
    found = trainability(orthogonalise(model), x)
    assert found == pytest.approx({"mean": 1, "std": 0, "max": 1, "min": 1, "condition_number": 1}, abs=1e-12)


@pytest.mark.parametrize("sizes, isometry", [((9, 6, 4), True), ((4, 6, 9), True), ((6, 9, 4), False)])
def test_orthogonal_layers_that_widen_and_narrow_are_none(sizes, isometry):
    model = orthogonalise(nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes))).double())
    found = trainability(model, torch.randn(1, sizes[0], dtype=torch.float64))
    assert (abs(found["min"] - 1) < 1e-12) == isometry and found["max"] < 1 + 1e-12


def test_orthogonalise_finds_the_nearest():
    conv, linear = nn.Conv2d(4, 3, 2).double(), nn.Linear(3, 5).double()
    before = [m.weight.detach().flatten(1).clone() for m in (conv, linear)]
    biases = [m.bias.detach().clone() for m in (conv, linear)]
    assert orthogonalise(nn.Sequential(conv, nn.ReLU(), linear))[0] is conv
    rows, columns = (m.weight.detach().flatten(1) for m in (conv, linear))
    torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(columns.T @ columns, torch.eye(3, dtype=torch.float64))
    for was, now in zip(before, (rows, columns), strict=True):
        for _ in range(20):
            other = torch.nn.init.orthogonal_(torch.empty_like(now)) if now is columns else now @ turn(now.shape[1])
            assert (was - now).norm() < (was - other).norm()
    assert all(torch.equal(m.bias, b) for m, b in zip((conv, linear), biases, strict=True))


def turn(n):
    """A small rotation of n dimensions."""
    a = 0.1 * torch.randn(n, n, dtype=torch.float64)
    return torch.linalg.matrix_exp(a - a.T)


@pytest.mark.parametrize(
    "inputs, says",
    [
        (torch.zeros(2, 4, dtype=torch.long), r"expected floating inputs .*got torch.int64 \(2, 4\)"),
        (torch.zeros(4), r"got torch.float32 \(4,\)"),
        (torch.zeros(0, 4), r"N >= 1, got torch.float32 \(0, 4\)"),
    ],
)
def test_nonsense_is_refused(inputs, says):
    with pytest.raises(ValueError, match=says):
        jacobian_singular_values(nn.Linear(4, 2), inputs)


def test_models_that_do_not_fit_are_refused():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        jacobian_singular_values(nn.Linear(4, 2), x, chunk=0)
    with pytest.raises(ValueError, match="1 has no running statistics"):
        jacobian_singular_values(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False)), x)

    class Odd(nn.Module):
        def forward(self, x):
            return self.make(x)

    model = Odd()
    for make, says in ((lambda x: (x,), "got tuple"), (torch.zeros_like, "False"), (lambda x: x.sum(0), r"got \(4,\)")):
        model.make = make
        with pytest.raises(ValueError, match=f"must return one tensor.*{says}"):
            jacobian_singular_values(model, x)
