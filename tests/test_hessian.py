"""hessian_diagonal against the whole Hessian, on nets with norms in training mode, gates and residuals."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastprune import backends
from fastprune.hessian import hessian_diagonal
from fastprune.nn import BatchNormAct2d, Gate, SigmoidBatchNorm2d


class Net(nn.Module):
    """conv-norm-gate-ReLU, twice, the second with a residual; then a max pool and a linear layer."""

    def __init__(self, norm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1), norm(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 7, 3, padding=1, bias=False), norm(7)
        self.conv3, self.bn3 = nn.Conv2d(7, 5, 3, padding=1, bias=False), norm(5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x, g1, g2, g3):
        a = F.relu(self.bn1(self.conv1(x)) * g1.view(-1, 1, 1), inplace=True)
        b = F.relu(self.bn2(self.conv2(a)) * g2.view(-1, 1, 1))
        b = F.relu(self.bn3(self.conv3(b)) + a) * g3.view(-1, 1, 1)  # a skip gate
        return self.fc(F.max_pool2d(b, 2).mean((2, 3)))


def problem(norm=nn.BatchNorm2d, dtype=torch.float64):
    torch.manual_seed(0)
    net, x, y = Net(norm).to(dtype).train(), torch.randn(6, 3, 8, 8).to(dtype), torch.tensor([0, 1, 2, 3, 0, 1])
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1, 0.3)
            if m.bias is not None:
                nn.init.normal_(m.bias, 0, 0.5)
    gates = [(torch.rand(c).to(dtype) + 0.5).requires_grad_() for c in (5, 7, 5)]
    return net, gates, lambda *g: F.cross_entropy(3 * net(x, *(g or gates)), y)


def exact(norm=nn.BatchNorm2d):
    _, gates, loss = problem(norm)
    whole = torch.autograd.functional.hessian(loss, tuple(g.detach() for g in gates))
    return [whole[i][i].diagonal() for i in range(len(gates))]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d, SigmoidBatchNorm2d, lambda c: nn.Identity()])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_it_is_the_diagonal(norm, chunk):
    _, gates, loss = problem(norm)
    got = hessian_diagonal(loss, gates, chunk)
    for d, e, g in zip(got, exact(norm), gates, strict=True):
        assert d.shape == g.shape and d.dtype == g.dtype and not d.requires_grad and d.any()
        torch.testing.assert_close(d, e, rtol=1e-10, atol=1e-12)
    for d, e in zip(got, hessian_diagonal(loss, gates, chunk), strict=True):
        assert torch.equal(d, e)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_single_precision(norm):
    """Also where fastprune's norm would run compiled."""
    _, gates, loss = problem(norm, torch.float32)
    for d, e in zip(hessian_diagonal(loss, gates), exact(norm), strict=True):
        assert d.dtype == torch.float32
        torch.testing.assert_close(d.double(), e, rtol=0, atol=2e-5 * e.abs().max().item())


def test_gate_modules():
    """fastprune's own gate, whose custom backward meets the batched gradient."""
    net, gates, _ = problem()
    x, y = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3])
    modules = [Gate(g.numel(), trainable=True).double() for g in gates]
    for m, g in zip(modules, gates, strict=True):
        m.weight.data.copy_(g.detach())

    def gated():
        a = F.relu(modules[0](net.bn1(net.conv1(x))))
        b = F.relu(modules[1](net.bn2(net.conv2(a))))
        return F.cross_entropy(net.fc(modules[2](F.relu(net.bn3(net.conv3(b)) + a)).mean((2, 3))), y)

    def plain(*g):
        a = F.relu(net.bn1(net.conv1(x)) * g[0].view(-1, 1, 1))
        b = F.relu(net.bn2(net.conv2(a)) * g[1].view(-1, 1, 1))
        return F.cross_entropy(net.fc((F.relu(net.bn3(net.conv3(b)) + a) * g[2].view(-1, 1, 1)).mean((2, 3))), y)

    whole = torch.autograd.functional.hessian(plain, tuple(g.detach() for g in gates))
    for i, d in enumerate(hessian_diagonal(gated, [m.weight for m in modules], 4)):
        torch.testing.assert_close(d, whole[i][i].diagonal(), rtol=1e-10, atol=1e-12)


def test_the_model_is_left_as_one_forward_leaves_it():
    net, gates, loss = problem()
    hessian_diagonal(loss, gates)
    assert net.bn1.num_batches_tracked == 1
    assert all(p.grad is None for p in (*net.parameters(), *gates))


def test_tensors_of_any_shape_and_without_curvature():
    a = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    b, linear, unused = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    with torch.no_grad():  # no obstacle
        da, db, dlinear, dunused = hessian_diagonal(
            lambda: a.pow(3).sum() + (a[0, 0] * b).sum().square() + (b.detach() * linear).sum(), [a, b, linear, unused]
        )
    expected = 6 * a.detach()
    expected[0, 0] += 2 * b.detach().sum().square()
    torch.testing.assert_close(da, expected)
    torch.testing.assert_close(db, torch.full_like(b, 2 * a[0, 0].item() ** 2).detach())
    assert not dlinear.any() and not dunused.any()
    assert hessian_diagonal(lambda: a.sum().square(), []) == []


def test_memory_is_bounded_by_the_chunk():
    """The largest tensor is that of the forward, times the rows asked for."""
    largest = {}
    for chunk in (1, 2, 4):

        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, chunk=chunk):
                out = func(*args, **(kwargs or {}))
                sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
                largest[chunk] = max(largest.get(chunk, 0), *sizes, 0)
                return out

        _, gates, loss = problem()
        with Sizes():
            hessian_diagonal(loss, gates, chunk)
    assert largest == {chunk: chunk * 6 * 7 * 8 * 8 for chunk in largest}


@pytest.mark.parametrize("chunk", [2, 64])
def test_an_op_that_cannot_be_batched_is_named_once(chunk):
    """A norm forced onto its compiled kernels: the rows are made one by one, and right."""
    _, gates, loss = problem(BatchNormAct2d, torch.float32)

    def compiled():
        with backends.force("cpp", "batch_norm_act"):
            return loss()

    with pytest.warns(
        UserWarning, match=r"one row at a time.*: fastprune::batch_norm_act_backward\.cpp has no batch"
    ) as seen:
        got = hessian_diagonal(compiled, gates, chunk)
    assert len(seen) == 1
    for d, e in zip(got, exact(BatchNormAct2d), strict=True):
        torch.testing.assert_close(d.double(), e, rtol=0, atol=2e-5 * e.abs().max().item())


def test_what_pytorch_fails_to_batch_is_loud_too():
    """Its batched double backward of group norm is wrong in shape (2.11); if that is mended, no warning either."""
    torch.manual_seed(0)
    x, g = torch.randn(2, 4, 3, 3).double(), torch.ones(4).double().requires_grad_()
    w = torch.randn(2, 4, 3, 3).double()

    def loss(g=g):
        return (F.group_norm(x * g.view(-1, 1, 1), 2) * w).sum().square()

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        (got,) = hessian_diagonal(loss, [g])
    assert [str(w.message)[:39] for w in seen] in ([], ["hessian_diagonal: one row at a time, wh"])
    torch.testing.assert_close(got, torch.autograd.functional.hessian(loss, g.detach()).diagonal())


def test_arguments_are_checked():
    p = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"params\[1\] is torch\.float32, requires_grad=False"):
        hessian_diagonal(lambda: p.sum(), [p, torch.ones(3)])
    with pytest.raises(ValueError, match=r"a scalar with grad, got \(3,\)"):
        hessian_diagonal(lambda: p * 2, [p])
    with pytest.raises(ValueError, match=r"requires_grad=False"):
        hessian_diagonal(lambda: p.detach().sum(), [p])
    with pytest.raises(ValueError, match="got <class 'float'>"):
        hessian_diagonal(lambda: 1.0, [p])
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        hessian_diagonal(lambda: p.sum(), [p], 0)
    assert not backends._forced  # the block is left on errors too
