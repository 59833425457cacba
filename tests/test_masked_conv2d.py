"""masked_conv2d against the convolution with the dead channels physically removed, in float64; and as a PyTorch op."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from bn_cases import backends_of

from fastprune import backends, ops
from fastprune.errors import BackendError

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
BACKENDS = backends_of("masked_conv2d")
DEVICE = {name: "cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu" for name in BACKENDS}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
NAN = float("nan")
# (N, C_in, H, W), C_out, kernel, arguments
SHAPES = {
    "3x3": ((2, 6, 5, 4), 7, (3, 3), {"padding": 1}),
    "1x1": ((3, 9, 4, 4), 5, (1, 1), {}),
    "strided": ((2, 5, 7, 6), 8, (3, 2), {"stride": (2, 3), "padding": (1, 0)}),
    "dilated": ((1, 20, 7, 7), 18, (3, 3), {"dilation": 2, "padding": "same"}),
    "even kernel": ((2, 4, 5, 5), 3, (2, 4), {"padding": "same"}),
    "1 pixel": ((4, 33, 1, 1), 17, (1, 1), {"padding": "valid"}),
}
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=("nchw", "nhwc"))
MASKS = {
    "none": (None, None),
    "in": ([0, 2, 3], None),
    "out": (None, [1, 2]),
    "both": ([0, 2, 3], [1, 2]),
    "one": ([2], [0]),
    "no in": ([], [0, 2]),
    "no out": ([1], []),
    "all": ("all", "all"),
}


def mask_of(channels, size):
    if channels is None:
        return None
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(range(size)) if channels == "all" else channels] = True
    return mask


class Case:
    """Operands in float64 whose dead entries are NaN, masks, and what removing them gives."""

    def __init__(self, shape, masks=(None, None), unstructured=False, groups=1, bias=True, dtype=torch.float32):
        size, rows, kernel, self.args = SHAPES[shape] if isinstance(shape, str) else shape
        self.in_mask, self.out_mask = mask_of(masks[0], size[1]), mask_of(masks[1], rows)
        self.groups, self.dtype = groups, dtype
        columns = size[1] // groups
        self.x, self.weight = torch.randn(size), torch.randn(rows, columns, *kernel) / (columns * 4) ** 0.5
        self.bias = torch.randn(rows) if bias else None
        self.operands = [t if t is None else t.to(dtype).double() for t in (self.x, self.weight, self.bias)]
        self.weight_mask = torch.rand(self.weight.shape) < 0.4 if unstructured else None
        live_in = torch.ones(size[1], dtype=torch.bool) if self.in_mask is None else self.in_mask
        live_out = torch.ones(rows, dtype=torch.bool) if self.out_mask is None else self.out_mask
        self.live_x = live_in.view(1, -1, 1, 1).expand(size)
        by_row = live_in.view(groups, 1, -1).expand(-1, rows // groups, -1).reshape(rows, columns)
        self.live_weight = (live_out[:, None] & by_row)[:, :, None, None].expand(self.weight.shape)
        self.live_out = live_out

    def exact(self):
        """Output and, for a fixed dy, gradients; each output channel alone from its live inputs."""
        x, w, b = (None if t is None else t.clone().requires_grad_() for t in self.operands)
        wm = w if self.weight_mask is None else w * self.weight_mask
        columns, rows = w.shape[1], w.shape[0] // self.groups
        outs = []
        for o in range(w.shape[0]):
            first = o // rows * columns
            live = [i for i in range(columns) if self.live_weight[o, i, 0, 0]] if self.live_out[o] else []
            part = None
            if self.live_out[o] and live:
                part = F.conv2d(x[:, [first + i for i in live]], wm[o : o + 1, live], None, **self.args)
            outs.append(part)
        size = F.conv2d(x[:, :columns].detach(), w[:1].detach(), None, **self.args).shape
        y = torch.cat([torch.zeros(size, dtype=torch.float64) if p is None else p for p in outs], 1)
        if b is not None:
            y = y + (b * self.live_out).view(1, -1, 1, 1)
        self.dy = torch.randn(y.shape).to(self.dtype).double()
        y = y + 0 * (x.sum() + w.sum())
        return [y.detach(), *torch.autograd.grad(y, [t for t in (x, w, b) if t is not None], self.dy)]

    def run(self, backend, layout=torch.contiguous_format, poison=NAN, dtype=None):
        """Output and gradients on ``backend``, with ``poison`` in all that is dead."""
        x, w, b = self.operands
        x = x.masked_fill(~self.live_x, poison)
        w = w.masked_fill(~self.live_weight, poison)
        b = b if b is None else b.masked_fill(~self.live_out, poison)
        device = DEVICE[backend]

        def move(t):
            t = t.to(device, dtype or self.dtype)
            return t.contiguous(memory_format=layout) if t.dim() == 4 else t

        x, w, b = (None if t is None else move(t).requires_grad_() for t in (x, w, b))
        masks = {n: getattr(self, n) for n in ("in_mask", "out_mask", "weight_mask")}
        masks = {n: None if m is None else m.to(device) for n, m in masks.items()}
        y = ops.masked_conv2d(x, w, b, **masks, **self.args, groups=self.groups, backend=backend)
        dy = (self.dy.masked_fill(~self.live_out.view(1, -1, 1, 1), poison)).to(device, y.dtype)
        return [y.detach(), *torch.autograd.grad(y, [t for t in (x, w, b) if t is not None], dy)]


def assert_close(got, exact, eager, dtype):
    """Error at most twice eager's, plus 4 eps; what is dead is exactly 0 because the exact value is."""
    eps = torch.finfo(dtype).eps
    for g, want, base in zip(got, exact, eager, strict=True):
        g, base = g.cpu().double(), base.cpu().double()
        assert g.shape == want.shape and g.isfinite().all()
        assert (g[want == 0] == 0).all()
        slack = 4 * eps * max(1.0, want.abs().max().item() if want.numel() else 0.0)
        bound = 2 * (base - want).abs().max().item() + slack if want.numel() else 0
        assert want.numel() == 0 or (g - want).abs().max().item() <= bound


def turns():
    """Shapes with masks, the layouts taking turns; on Triton, which is interpreted, a third of them."""
    cases, ids = [], []
    for i, (shape, masks) in enumerate(itertools.product(SHAPES, MASKS)):
        for backend in BACKENDS[: 2 if i % 3 and BACKENDS[-1] == "triton" else None]:
            layout = (i + i // len(MASKS)) % 2
            cases.append((shape, masks, LAYOUTS[layout], backend))
            ids.append(f"{shape}-{masks}-{('nchw', 'nhwc')[layout]}-{backend}")
    return pytest.mark.parametrize("shape, masks, layout, backend", cases, ids=ids)


@turns()
def test_forward_and_backward_as_if_removed(shape, masks, layout, backend):
    case = Case(shape, MASKS[masks], bias=masks != "in")
    exact, eager = case.exact(), case.run("eager", layout)
    got = case.run(backend, layout)
    assert_close(got, exact, eager, torch.float32)
    assert got[0].is_contiguous(memory_format=layout)


def exact_unstructured(case):
    """As Case.exact, which multiplies by the weight mask itself and cuts whole channels only."""
    kept = case.live_weight
    case.live_weight = torch.ones_like(kept) if case.in_mask is None else case.in_mask.view(1, -1, 1, 1).expand_as(kept)
    exact = case.exact()
    case.live_weight = kept
    return exact


@EACH_BACKEND
@EACH_LAYOUT
@pytest.mark.parametrize("masks", ["none", "both", "out"])
def test_weight_masks(masks, layout, backend):
    case = Case("3x3", MASKS[masks], unstructured=True)
    case.live_weight = case.live_weight & case.weight_mask
    exact, eager = exact_unstructured(case), case.run("eager", layout)
    got = case.run(backend, layout)
    assert_close(got, exact, eager, torch.float32)
    assert (got[2].cpu()[~case.live_weight] == 0).all()


@EACH_BACKEND
@EACH_LAYOUT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(dtype, layout, backend):
    if dtype == torch.float16 and backend == "cpp":
        pytest.skip("the CPU kernels take no float16; test_refusals")
    case = Case("3x3", MASKS["both"], dtype=dtype)
    exact, eager = case.exact(), case.run("eager", layout)
    assert_close(case.run(backend, layout), exact, eager, dtype)


GROUPED = {  # x, C_out, kernel, arguments, groups, masks
    "depthwise": ((2, 6, 5, 5), 6, (3, 3), {"padding": 1}, 6, ([0, 2, 5], [0, 2, 5])),
    "depthwise, out only": ((2, 6, 5, 5), 6, (3, 3), {"padding": 1}, 6, (None, [1, 2])),
    "depthwise x2": ((2, 3, 5, 5), 6, (3, 3), {"padding": 1}, 3, ([0, 2], [0, 1, 4, 5])),
    "even": ((2, 8, 5, 5), 6, (3, 3), {}, 2, ([0, 3, 4, 5], [0, 2, 3, 4])),
    "a group gone": ((2, 9, 5, 5), 6, (1, 1), {}, 3, ([0, 1, 4, 6, 8], [0, 5])),
    "uneven inputs": ((2, 8, 5, 5), 6, (3, 3), {}, 2, ([0, 3, 4], [0, 2, 3, 4])),
    "uneven outputs": ((2, 8, 5, 5), 6, (3, 3), {}, 2, (None, [0, 2, 3])),
    "output without input": ((2, 4, 5, 5), 4, (3, 3), {}, 4, ([0, 1], [0, 1, 2])),
}


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@EACH_LAYOUT
@pytest.mark.parametrize("name", GROUPED)
def test_groups(name, layout, backend):
    *shape, groups, masks = GROUPED[name]
    case = Case(tuple(shape), masks, groups=groups)
    exact, eager = case.exact(), case.run("eager", layout)
    if backend == "cpp" and ("uneven" in name or "without" in name):
        with pytest.raises(BackendError, match="different numbers of live channels"):
            case.run(backend, layout)
        return
    assert_close(case.run(backend, layout), exact, eager, torch.float32)


@EACH_BACKEND
def test_no_samples(backend):
    x, w = torch.randn(0, 4, 5, 5, device=DEVICE[backend]), torch.randn(3, 4, 3, 3, device=DEVICE[backend])
    x.requires_grad_(), w.requires_grad_()
    masks = [mask_of(c, n).to(x.device) for c, n in (([0, 2], 4), ([1], 3))]
    y = ops.masked_conv2d(x, w, in_mask=masks[0], out_mask=masks[1], backend=backend)
    y.sum().backward()
    assert y.shape == (0, 3, 3, 3) and x.grad.shape == x.shape and not w.grad.any()


@EACH_BACKEND
@EACH_LAYOUT
def test_two_runs_agree_bit_for_bit(layout, backend):
    case = Case(((5, 12, 9, 7), 10, (3, 3), {"padding": 1}), ([0, 3, 4, 7, 11], [1, 2, 8]), unstructured=True)
    case.exact()
    # with the threads as they are: PyTorch's own convolution sums in another order with another number of them
    assert all(map(torch.equal, case.run(backend, layout), case.run(backend, layout)))


@pytest.mark.parametrize("masks, groups", [("both", 1), ("no out", 1), ("no in", 1), ("both", 2)])
def test_first_and_second_derivatives(masks, groups):
    case = Case(((2, 4, 3, 3), 4, (2, 2), {"padding": 1}), MASKS[masks], unstructured=True, groups=groups)
    operands = [t.requires_grad_() for t in case.operands]
    masks = {n: getattr(case, n) for n in ("in_mask", "out_mask", "weight_mask")}

    def run(*operands):
        return ops.masked_conv2d(*operands, **masks, **case.args, groups=groups)

    torch.autograd.gradcheck(run, operands)
    torch.autograd.gradgradcheck(run, operands)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
@pytest.mark.parametrize("unstructured", [False, True])
def test_second_derivatives_of_a_compiled_backend(backend, unstructured):
    case = Case("3x3", MASKS["both"], unstructured=unstructured)
    masks = {n: getattr(case, n) for n in ("in_mask", "out_mask", "weight_mask")}

    def second(dtype, backend):
        device = DEVICE[backend]
        leaves = [t.to(device, dtype).requires_grad_() for t in case.operands]
        where = {n: None if m is None else m.to(device) for n, m in masks.items()}
        y = ops.masked_conv2d(*leaves, **where, **case.args, backend=backend)
        grads = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), leaves)

    exact, eager, got = second(torch.float64, "eager"), second(torch.float32, "eager"), second(torch.float32, backend)
    assert_close(got, [e.cpu() for e in exact], eager, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=("nchw", "nhwc"))
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif("cpp" not in BACKENDS, reason="FASTPRUNE_TEST_BACKENDS")
def test_gather_and_scatter(dtype, threads, layout):
    """Against indexing: odd sizes, more than one task a row, several groups."""
    old = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size, rows, columns, groups in [
            ((3, 37, 50, 50), None, 13, 1),
            ((40, 21, 3, 3), 17, 8, 1),
            ((8, 12, 1, 1), 4, 5, 2),
            ((2, 64, 33, 47), None, 63, 1),
            ((300, 16, 4, 4), 299, None, 1),
        ]:
            t = torch.randn(size).to(dtype).contiguous(memory_format=layout)
            r = None if rows is None else torch.randperm(size[0])[:rows].sort().values
            c = [torch.randperm(size[1])[:columns].sort().values for _ in range(groups)] if columns else None
            got = torch.ops.fastprune.masked_conv2d_gather.cpp(t, r, None if c is None else torch.cat(c), groups)
            want = t if r is None else t[r]
            if c is not None:
                parts = zip(want.chunk(groups), c, strict=True)
                want = torch.cat([part.index_select(1, index) for part, index in parts])
            assert torch.equal(got, want) and got.is_contiguous(memory_format=layout)
            nhwc = layout == torch.channels_last
            back = torch.ops.fastprune.masked_conv2d_scatter.cpp(
                got, r, None if c is None else torch.cat(c), groups, *size[:2], nhwc
            )
            mask = torch.zeros(size, dtype=torch.bool)
            live_rows = torch.arange(size[0]) if r is None else r
            for part, index in zip(live_rows.chunk(groups), c or [torch.arange(size[1])], strict=True):
                mask[part[:, None], index] = True
            assert torch.equal(back, t * mask) and back.is_contiguous(memory_format=layout)
    finally:
        torch.set_num_threads(old)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="FASTPRUNE_TEST_BACKENDS")
@EACH_LAYOUT
def test_opcheck_of_gather_and_scatter(layout):
    t, rows = torch.randn(4, 6, 3, 3).contiguous(memory_format=layout), torch.tensor([0, 2])
    columns, nhwc = torch.tensor([1, 4, 5]), layout == torch.channels_last
    torch.library.opcheck(torch.ops.fastprune.masked_conv2d_gather.cpp, (t, rows, columns, 1))
    live = t[rows][:, columns].contiguous(memory_format=layout)
    torch.library.opcheck(torch.ops.fastprune.masked_conv2d_scatter.cpp, (live, rows, columns, 1, 4, 6, nhwc))
    for wrong in ([1, 1, 5], [5, 4, 1], [0, 1, 6], [-1, 0, 1]):
        with pytest.raises(RuntimeError, match="columns must ascend within"):
            torch.ops.fastprune.masked_conv2d_gather.cpp(t, None, torch.tensor(wrong), 1)


@pytest.mark.skipif("triton" not in BACKENDS, reason="FASTPRUNE_TEST_BACKENDS")
@pytest.mark.parametrize("masks", ["none", "both"])
def test_opcheck_of_triton(masks):
    case = Case("strided", MASKS[masks])
    case.exact()
    x, weight, bias = (t.to(DEVICE["triton"], torch.float32) for t in case.operands)
    index = [m if m is None else m.nonzero().flatten().to(x.device) for m in (case.in_mask, case.out_mask)]
    window, tests = ((2, 3), (1, 0), (1, 1)), ("test_schema", "test_faketensor")
    op = torch.ops.fastprune.masked_conv2d.triton
    torch.library.opcheck(op, (x, weight, bias, *index, None, *window), test_utils=tests)
    op, dy = torch.ops.fastprune.masked_conv2d_backward.triton, case.dy.to(x)
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(op, (dy, x, weight, *index, None, *window, *needs), test_utils=tests)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing, torch 2.11
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_compiles_without_graph_breaks(backend):
    case = Case("3x3", MASKS["both"])
    case.exact()
    live_in, live_out = ops.live_channels(case.in_mask), ops.live_channels(case.out_mask)

    def run(x, w, b):
        return ops.masked_conv2d(x, w, b, in_mask=live_in, out_mask=live_out, **case.args, backend=backend)

    leaves = [t.float().requires_grad_() for t in case.operands]
    torch._dynamo.reset()
    quick = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = quick(*leaves), run(*leaves)
    dy = case.dy.float()
    assert torch.equal(got, want)
    pairs = zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True)
    assert all(itertools.starmap(torch.equal, pairs))


@EACH_BACKEND
def test_autocast_leaves_the_dtype_of_x(backend):
    device = DEVICE[backend]
    x, w = torch.randn(2, 4, 5, 5, device=device), torch.randn(4, 4, 3, 3, device=device)
    mask = mask_of([0, 2], 4).to(device)
    want = ops.masked_conv2d(x, w, in_mask=mask, out_mask=mask, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        got = ops.masked_conv2d(x, w, in_mask=mask, out_mask=mask, backend=backend)
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_refusals():
    x, w = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    mask = mask_of([0, 1], 4)
    for words, args in {
        "expected in_mask": {"in_mask": mask_of([0], 5)},
        "expected out_mask": {"out_mask": mask},
        "expected weight_mask": {"weight_mask": w},
        "expected a bool mask": {"in_mask": torch.zeros(4, dtype=torch.bool).view(4, 1)},
        "expected weight": {"groups": 3},
        "with stride 1, 'same'": {"padding": "same", "stride": 2},
        "padding must be": {"padding": "full"},
        "a number or two": {"dilation": (1, 2, 3)},
    }.items():
        if words == "expected a bool mask":
            with pytest.raises(ValueError, match=words):
                ops.live_channels(args["in_mask"])
            continue
        with pytest.raises(ValueError, match=words):
            ops.masked_conv2d(x, w, **args)
    with pytest.raises(ValueError, match="expected bias"):
        ops.masked_conv2d(x, w, torch.randn(5))
    with pytest.raises(ValueError, match="weight is torch"):
        ops.masked_conv2d(x, w.double())
    if backends.why_not("scale_penalty", "cpp", w) is None or "cpp" in BACKENDS:
        with pytest.raises(BackendError, match="float32, bfloat16"):
            ops.masked_conv2d(x.double(), w.double(), in_mask=mask, backend="cpp")
        with pytest.raises(BackendError, match="without gaps"):
            ops.masked_conv2d(torch.randn(2, 8, 5, 5)[:, ::2], w, in_mask=mask, backend="cpp")


def test_a_slice_runs_on_eager():
    x, w, mask = torch.randn(2, 8, 5, 5)[:, ::2], torch.randn(6, 4, 3, 3), mask_of([1, 2], 4)
    torch.testing.assert_close(ops.masked_conv2d(x, w, in_mask=mask), F.conv2d(x[:, mask], w[:, mask]))
