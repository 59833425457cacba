"""scale_penalty against the authors' numbers, against its definition in float64, and as a PyTorch op."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bn_cases import backends_of
from torch import nn

from fastprune import backends, ops
from fastprune.errors import BackendError

GOLDEN = np.load(Path(__file__).parent / "golden" / "rni.npz")
BACKENDS = backends_of("scale_penalty")
DEVICE = {name: "cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu" for name in BACKENDS}
SIZES = [(1,), (64, 64, 128), (16,) * 57, (33, 1, 7, 512), (2048, 3)]
EACH = pytest.mark.parametrize("kind, shift", [("rni", 0.0), ("rni", 3.0), ("rni", -2.0), ("l1", 0.0)])


def draw(sizes, dtype=torch.float32, device="cpu"):
    return [(2 * torch.randn(n, dtype=torch.float64)).to(device, dtype).requires_grad_() for n in sizes]


def definition(scales, kind, shift):
    """Written again, in float64 of the inputs as they are: value, and gradients by autograd."""
    exact = [w.detach().double().cpu().requires_grad_() for w in scales]
    w = torch.cat(exact)
    s = (w + shift).sigmoid()
    value = w.abs().sum() if kind == "l1" else (s * (1 - s.log())).sum()
    return value.detach(), torch.autograd.grad(value, exact)


@pytest.mark.parametrize("shift, key", [(0.0, "b0"), (3.0, "b3"), (-2.0, "bm2")])
def test_value_and_gradient_are_the_authors(shift, key):
    w = torch.from_numpy(GOLDEN["rni/w"]).requires_grad_()
    value = ops.scale_penalty([w], "rni", shift)
    value.backward()
    np.testing.assert_allclose(value.detach(), GOLDEN[f"rni/{key}/loss"], rtol=1e-13)
    np.testing.assert_allclose(w.grad, GOLDEN[f"rni/{key}/grad"], rtol=1e-12, atol=1e-15)


def test_two_layers_give_the_authors_losses():
    scales = [torch.from_numpy(GOLDEN[f"rni/model/w{i}"]) for i in (0, 1)]
    np.testing.assert_allclose(1e-3 * ops.scale_penalty(scales, "rni", 3.0), GOLDEN["rni/model/loss_rni_b3_1e-3"])
    np.testing.assert_allclose(1e-4 * ops.scale_penalty(scales, "l1"), GOLDEN["rni/model/loss_l1_1e-4"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{len(s)}x{s[0]}")
@EACH
def test_forward_and_backward(backend, sizes, kind, shift):
    scales = draw(sizes, device=DEVICE[backend])
    value, grads = definition(scales, kind, shift)
    got = ops.scale_penalty(scales, kind, shift, backend=backend)
    eager = ops.scale_penalty(scales, kind, shift, backend="eager").item()
    eps = torch.finfo(torch.float32).eps
    assert got.shape == () and got.dtype == torch.float32
    assert abs(got.item() - value) <= 2 * abs(eager - value) + 4 * eps * max(1.0, abs(value))
    (3 * got).backward()
    for w, grad in zip(scales, grads, strict=True):
        assert w.grad.dtype == w.dtype and w.grad.shape == w.shape
        torch.testing.assert_close(w.grad.cpu().double(), 3 * grad, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize("backend", BACKENDS)
@EACH
def test_extreme_scales_stay_finite(backend, kind, shift):
    w = torch.tensor([-1e30, -1000.0, -104.0, -88.0, 0.0, 88.0, 1000.0, 1e30], device=DEVICE[backend]).requires_grad_()
    value = ops.scale_penalty([w[1:-1] if kind == "l1" else w], kind, shift, backend=backend)
    value.backward()
    assert value.isfinite() and w.grad.isfinite().all()
    if kind == "rni":
        assert (w.grad >= 0).all()  # the force on a scale never lifts it


@pytest.mark.parametrize("backend", BACKENDS)
def test_l1_has_no_gradient_at_zero(backend):
    w = torch.tensor([-2.0, -0.0, 0.0, 3.0], device=DEVICE[backend]).requires_grad_()
    ops.scale_penalty([w], "l1", backend=backend).backward()
    assert w.grad.tolist() == [-1, 0, 0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@EACH
def test_two_runs_agree_bit_for_bit(backend, kind, shift):
    def run():
        for w in scales:
            w.grad = None
        value = ops.scale_penalty(scales, kind, shift, backend=backend)
        value.backward()
        return [value, *(w.grad for w in scales)]

    scales = draw((64, 17, 512), device=DEVICE[backend])
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@EACH
def test_first_and_second_derivatives(kind, shift):
    scales = draw((3, 4), torch.float64)
    torch.autograd.gradcheck(lambda *w: ops.scale_penalty(w, kind, shift), scales)
    torch.autograd.gradgradcheck(lambda *w: ops.scale_penalty(w, kind, shift), scales)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
def test_second_derivatives_of_a_compiled_backend_are_not_lost(backend):
    w = draw((5,), device=DEVICE[backend])[0]
    (grad,) = torch.autograd.grad(ops.scale_penalty([w], "rni", 1.0, backend=backend), w, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), w)
    exact = w.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(ops.scale_penalty([exact], "rni", 1.0), exact, create_graph=True)
    torch.testing.assert_close(second.double(), torch.autograd.grad(first.sum(), exact)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_scales_accumulate_in_float32(dtype):
    scales = draw((100, 7), dtype)
    value = ops.scale_penalty(scales)
    value.backward()
    exact, grads = definition(scales, "rni", 0.0)
    assert value.dtype == torch.float32 and abs(value.item() - exact) < 1e-4
    for w, grad in zip(scales, grads, strict=True):
        torch.testing.assert_close(w.grad, grad.to(dtype))


def test_only_some_scales_may_need_a_gradient():
    a, b = draw((3, 4))
    ops.scale_penalty([a.detach(), b]).backward()
    assert b.grad.abs().min() > 0
    assert not ops.scale_penalty([a.detach()]).requires_grad


def test_it_moves_scales_of_a_model_towards_zero():
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(6)]
    opt = torch.optim.SGD([n.weight for n in norms], 0.1)
    ops.scale_penalty([n.weight for n in norms], "l1").backward()
    opt.step()
    assert all(torch.allclose(n.weight, torch.tensor(0.9)) for n in norms)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
def test_opcheck(backend):
    scales = [w.detach() for w in draw((5, 3), device=DEVICE[backend])]
    op = getattr(torch.ops.fastprune.scale_penalty, backend)
    torch.library.opcheck(op, (scales, "rni", 1.0), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing, torch 2.11
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_into_one_graph(backend):
    if backend == "triton" and DEVICE[backend] == "cpu":
        pytest.skip("the Triton interpreter cannot run inside a compiled graph")
    scales = draw((5, 3), device=DEVICE[backend])
    fn = lambda *w: ops.scale_penalty(w, "rni", 1.0, backend=backend) * 2  # noqa: E731
    expected = fn(*scales)
    expected.backward()
    grads = [w.grad.clone() for w in scales]
    for w in scales:
        w.grad = None
    got = torch.compile(fn, fullgraph=True, backend="aot_eager")(*scales)
    got.backward()
    assert torch.equal(got, expected) and all(torch.equal(w.grad, g) for w, g in zip(scales, grads, strict=True))


@pytest.mark.parametrize(
    "scales, kind, shift, word",
    [
        ([], "rni", 0.0, "at least one"),
        ([torch.ones(2)], "l2", 0.0, "'rni' or 'l1'"),
        ([torch.ones(2)], "l1", 3.0, "leave it 0"),
        ([torch.ones(2), torch.ones(2, 2)], "rni", 0.0, r"scales\[1\] is \(2, 2\)"),
        ([torch.ones(2), torch.ones(2).double()], "rni", 0.0, "one dtype and device"),
        ([torch.ones(2).int()], "l1", 0.0, "of floats"),
    ],
)
def test_bad_arguments_are_named(scales, kind, shift, word):
    with pytest.raises(ValueError, match=word):
        ops.scale_penalty(scales, kind, shift)


def test_a_named_backend_is_refused_in_words():
    name = next((b for b in BACKENDS if b != "eager"), "cuda")
    with pytest.raises(BackendError, match="scale_penalty: backend"):
        ops.scale_penalty([torch.ones(4)[::2].to(DEVICE.get(name, "cpu"))], backend=name)
    with backends.force("eager"):
        ops.scale_penalty([torch.ones(4)[::2]])
