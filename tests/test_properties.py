"""Random networks, random keep-masks: what compact leaves is the masked network, whatever the layers are.

The usual run draws the same examples every time, few enough for a coffee sip.  ``HYPOTHESIS_PROFILE=thorough`` draws a
few thousand new ones, other ones each time; a failure is printed with what ``@reproduce_failure`` needs.
"""

from __future__ import annotations

import copy
import os
import warnings

import torch
from graph_cases import stir
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fastprune import nn as fpnn
from fastprune.budget import Costs, uses
from fastprune.compact import compact
from fastprune.flops import flops
from fastprune.graph import ChannelGraph, trace
from fastprune.surgery import leaves

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
WIDTHS = st.sampled_from((2, 3, 4, 6, 8))


def examples(quick: int) -> settings:
    """A decorator: ``quick`` examples, always the same ones; thirty times as many new ones in a thorough run."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(
        max_examples=quick * (30 if THOROUGH else 1), derandomize=not THOROUGH, deadline=None, database=None,
        print_blob=True, suppress_health_check=slow,
    )  # fmt: skip


# Blocks: (draw, channels, height) -> (module, channels, height) ------------------------------------------------------


class Block(nn.Module):
    """Modules by name, and a word that says how ``forward`` puts them together; printed with both."""

    def __init__(self, how: str, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.how = how
        for name, part in parts.items():
            setattr(self, name, part)

    def extra_repr(self) -> str:
        return ", ".join([self.how, *(f"{name}: {tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))])

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, f"_{self.how}")(x)

    def _sum(self, x):
        return F.relu(self.body(x) + (self.shortcut(x) if hasattr(self, "shortcut") else x))

    def _fused_sum(self, x):
        return self.norm(self.body(x), x)

    def _scaled_sum(self, x):
        return x + self.scale * self.body(x)

    def _scale(self, x):
        return x * self.scale + self.shift

    def _product(self, x):
        return self.a(x) * self.b(x)

    def _gated(self, x):
        return self.a(x) * self.b(x).sigmoid()

    def _cat(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)

    def _dense(self, x):
        x = torch.cat([x, self.a(x)], 1)
        return torch.cat([self.b(x), x], 1)

    def _squeeze(self, x):
        return x * self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()

    def _squeeze_linear(self, x):
        return x * F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]

    def _efficient(self, x):  # a convolution along the channels
        return x * self.conv(x.mean((2, 3))[:, None])[:, 0, :, None, None].sigmoid()

    def _spatial(self, x):
        return x * self.conv(torch.stack([x.mean(1), x.amax(1)], 1)).sigmoid()

    def _glu(self, x):
        return F.glu(x, 1)

    def _halves(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([b, self.conv(a)], 1)

    def _halves_added(self, x):
        a, b = x.chunk(2, 1)
        return a + b.sigmoid()

    def _split(self, x):
        a, b = x.split(self.sizes, 1)
        return torch.cat([self.conv(a), b], 1)

    def _shuffle(self, x):
        n, c, h, w = x.shape
        return x.view(n, self.by, c // self.by, h, w).transpose(1, 2).reshape(n, c, h, w)

    def _twice(self, x):
        return self.conv(F.relu(self.conv(x)))

    def _tied(self, x):
        return F.conv2d(F.relu(self.conv(x)), self.conv.weight, self.bias, padding=self.conv.padding)

    def _channels_last(self, x):
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _pad(self, x):
        return F.pad(x[:, :, ::1], (0, 0, 0, 0, 1, 2))


def norm(draw, c: int) -> list[nn.Module]:
    make = draw(st.sampled_from((
        nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d, None,
        lambda c: nn.BatchNorm2d(c, affine=False), lambda c: nn.BatchNorm2d(c, track_running_stats=False),
        lambda c: nn.GroupNorm(c, c), lambda c: nn.GroupNorm(1, c), lambda c: nn.InstanceNorm2d(c, affine=True),
        lambda c: nn.InstanceNorm2d(c, track_running_stats=True), nn.InstanceNorm2d,
        lambda c: nn.GroupNorm(c, c, affine=False), lambda c: nn.GroupNorm(2 - c % 2, c),
        fpnn.SigmoidBatchNorm2d,
        lambda c: fpnn.SigmoidBatchNorm2d(c, bias=True), lambda c: fpnn.BatchNormAct2d(c, act="relu"),
        lambda c: fpnn.BatchNormAct2d(c, act="relu", bound="sigmoid"),
    )))  # fmt: skip
    return [] if make is None else [make(c)]


def activation(draw, c: int, inplace: bool) -> list[nn.Module]:
    make = draw(st.sampled_from((
        nn.ReLU, lambda: nn.ReLU(inplace=inplace), nn.SiLU, nn.GELU, nn.Hardswish, lambda: nn.PReLU(c), nn.PReLU,
        nn.Sigmoid, nn.Softplus, nn.ELU, nn.Identity, lambda: nn.LeakyReLU(0.2), lambda: nn.Dropout2d(0.2),
    )))  # fmt: skip
    return [make()]


def norm_act(draw, c: int) -> list[nn.Module]:
    norms = norm(draw, c)
    fused = any(isinstance(m, fpnn.BatchNormAct2d) for m in norms)  # its backward reads what it returned
    return norms + activation(draw, c, inplace=not fused)


def conv(draw, c: int, h: int, cout: int | None = None, stride: bool = True):
    """Convolution, norm, activation; grouped or depthwise where the widths allow it."""
    k, dilation = draw(st.sampled_from(((1, 1), (3, 1), (3, 2))))
    kinds = ["dense", "dense", "depthwise", "wide"] if cout in (None, c) else ["dense"]
    kind = draw(st.sampled_from(kinds + (["grouped"] if c % 2 == 0 and c > 2 else [])))
    groups = {"dense": 1, "grouped": 2}.get(kind, c)
    if kind == "depthwise" or (kind == "wide" and (cout is not None or c > 6)):
        cout = c
    elif kind == "wide":
        cout = 2 * c
    elif kind == "grouped":
        cout = cout if cout is not None and cout % 2 == 0 else c if cout is None else None
    if cout is None:
        cout, groups = draw(WIDTHS), 1
    step = draw(st.sampled_from((1, 2))) if stride and h >= 4 else 1
    made = nn.Conv2d(
        c, cout, k, step, dilation * (k // 2), dilation, groups, bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(("zeros", "zeros", "replicate"))),
    )  # fmt: skip
    return nn.Sequential(made, *norm_act(draw, cout)), cout, -(-h // step)


def residual(draw, c, h):
    how = draw(st.sampled_from(("sum", "sum", "projection", "fused_sum", "scaled_sum")))
    if how == "projection":
        body, cout, _ = conv(draw, c, h, stride=False)
        return Block("sum", body=body, shortcut=nn.Conv2d(c, cout, 1, bias=draw(st.booleans()))), cout, h
    first, hidden, _ = conv(draw, c, h, stride=False)
    parts = {"body": nn.Sequential(first, nn.Conv2d(hidden, c, 3, padding=1, bias=draw(st.booleans())))}
    if how == "fused_sum":
        parts["norm"] = fpnn.BatchNormAct2d(c, act="relu", bound=draw(st.sampled_from((None, "sigmoid"))))
    if how == "scaled_sum":
        parts["scale"] = nn.Parameter(1e-6 * torch.ones(draw(st.sampled_from(((c, 1, 1), (1, c, 1, 1), (1,))))))
    return Block(how, **parts), c, h


def two_branches(draw, c, h):
    how = draw(st.sampled_from(("sum", "cat", "product", "gated", "dense")))
    a, ca, _ = conv(draw, c, h, stride=False)
    if how == "dense":
        b, cb, _ = conv(draw, c + ca, h, stride=False)
        return Block("dense", a=a, b=b), c + ca + cb, h
    if how == "cat":
        b, cb, _ = conv(draw, c, h, stride=False)
        return Block("cat", a=a, b=b), ca + cb, h
    b = nn.Conv2d(c, ca, 1, bias=draw(st.booleans()))
    return (Block("sum", body=a, shortcut=b) if how == "sum" else Block(how, a=a, b=b)), ca, h


def attention(draw, c, h):
    r = draw(WIDTHS)
    return draw(st.sampled_from((
        lambda: Block("squeeze", down=nn.Conv2d(c, r, 1), up=nn.Conv2d(r, c, 1)),
        lambda: Block("squeeze_linear", down=nn.Linear(c, r), up=nn.Linear(r, c, bias=False)),
        lambda: Block("efficient", conv=nn.Conv1d(1, 1, 3, padding=1)),
        lambda: Block("spatial", conv=nn.Conv2d(2, 1, 3, padding=1)),
    )))(), c, h  # fmt: skip


def rearranged(draw, c, h):
    block = Block(draw(st.sampled_from(("shuffle", "module", "halves", "split", "halves_added", "glu"))))
    if block.how == "split":
        left = draw(st.integers(1, c - 1))
        block.sizes, block.conv = [left, c - left], nn.Conv2d(left, left, 3, padding=1)
    elif c % 2 or c < 4:  # of two channels, nothing tells (2, 1) from (C, 1)
        return conv(draw, c, h)
    elif block.how == "module":
        return nn.ChannelShuffle(2), c, h
    elif block.how == "halves":
        block.conv = nn.Conv2d(c // 2, c // 2, 3, padding=1)
    block.by = 2
    return block, c // 2 if block.how in ("halves_added", "glu") else c, h


def resized(draw, c, h):
    kinds = {
        "max": (lambda: nn.MaxPool2d(3, 2, 1), c, -(-h // 2)),
        "avg": (lambda: nn.AvgPool2d(3, 1, 1), c, h),
        "adaptive": (lambda: nn.AdaptiveAvgPool2d(2), c, 2),
        "adaptive max": (lambda: nn.AdaptiveMaxPool2d(3), c, 3),
    }
    if h <= 8:
        kinds["nearest"] = lambda: nn.Upsample(scale_factor=2), c, 2 * h
        kinds["bilinear"] = lambda: nn.Upsample(scale_factor=2, mode="bilinear"), c, 2 * h
        if c % 4 == 0:
            kinds["pixel shuffle"] = lambda: nn.PixelShuffle(2), c // 4, 2 * h
    if h % 2 == 0 and h > 2 and c <= 4:
        kinds["pixel unshuffle"] = lambda: nn.PixelUnshuffle(2), 4 * c, h // 2
    if h <= 2:
        kinds.pop("max")
    make, cout, height = kinds[draw(st.sampled_from(sorted(kinds)))]
    return (make(), cout, height) if cout > 1 else conv(draw, c, h)


def transposed(draw, c, h):
    cout, groups = draw(WIDTHS), draw(st.sampled_from((1, 1, 1, c)))
    cout = cout if groups == 1 else c
    up = draw(st.booleans()) and h <= 8
    make = nn.ConvTranspose2d(c, cout, 2 if up else 3, 2 if up else 1, 0 if up else 1, groups=groups)
    return nn.Sequential(make, *norm_act(draw, cout)), cout, 2 * h if up else h


def weights_again(draw, c, h):
    how, bias = draw(st.sampled_from(("twice", "tied", "modules"))), draw(st.booleans())
    one = nn.Conv2d(c, c, 3, padding=1, bias=bias)
    if how == "modules":
        other = nn.Conv2d(c, c, 3, padding=1, bias=bias)
        other.weight = one.weight
        return nn.Sequential(one, *norm(draw, c), nn.SiLU(), other), c, h
    return Block(how, conv=one, **({"bias": nn.Parameter(torch.zeros(c))} if how == "tied" else {})), c, h


def scaled(draw, c, h):
    shapes = st.sampled_from(((c, 1, 1), (1, c, 1, 1), (1,)))
    scale, shift = (nn.Parameter(torch.ones(draw(shapes))) for _ in range(2))
    return Block("scale", scale=scale, shift=shift), c, h


def of_pixels(draw, c, h):
    cout = draw(WIDTHS)
    body = [nn.Linear(c, cout, bias=draw(st.booleans())), nn.GELU()]
    body = draw(st.sampled_from(([], [nn.LayerNorm(c)]))) + body
    return Block("channels_last", body=nn.Sequential(*body)), cout, h


def padded(draw, c, h):
    return Block("pad"), c + 3, h


BLOCKS = (
    conv, conv, residual, residual, two_branches, two_branches, attention, rearranged, resized, transposed,
    weights_again, scaled, of_pixels, padded,
)  # fmt: skip


class Network(nn.Module):
    """Blocks one after another, with one or more heads."""

    def __init__(self, blocks: list[nn.Module], head: nn.Module, aux: nn.Module | None, returns: str, at: int) -> None:
        super().__init__()
        self.blocks, self.head, self.aux = nn.ModuleList(blocks), head, aux
        self.returns, self.at = returns, at

    def extra_repr(self) -> str:
        return f"returns={self.returns}, aux after block {self.at}"

    def forward(self, x: Tensor):
        aux = None
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self.at and self.aux is not None:
                aux = self.aux(x)
        out = self.head(x)
        if self.returns == "dict":
            return {"out": out, "aux": aux}
        if self.returns == "tuple":
            return out, (aux,)
        if self.returns == "training":
            return (out, aux) if self.training else out
        return (out, x) if self.returns == "features" else out


@st.composite
def networks(draw) -> Network:
    """A float64 network of images (N, 2, 8, 8) with random weights, scales, biases and running statistics."""
    torch.manual_seed(draw(st.integers(0, 9)))
    stem, c, h = conv(draw, 2, 8, draw(WIDTHS))
    blocks, widths = [stem], [c]
    for make in draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5)):
        block, c, h = make(draw, c, h)
        blocks.append(block)
        widths.append(c)
        if c > 12:
            blocks.append(nn.Conv2d(c, c := draw(WIDTHS), 1))
            widths.append(c)
    returns = draw(st.sampled_from(("tensor", "tensor", "tensor", "tuple", "dict", "training", "features")))
    pool, hidden = draw(st.booleans()), draw(st.booleans())
    flat = c if pool else c * h * h
    head = [*([nn.AdaptiveAvgPool2d(1)] if pool else []), nn.Flatten()]
    if hidden:
        head += [nn.Linear(flat, 5), *draw(st.sampled_from(([], [nn.BatchNorm1d(5)]))), nn.Hardswish()]
    head.append(nn.Linear(5 if hidden else flat, 3))
    at = draw(st.integers(0, len(blocks) - 1))
    aux = nn.Sequential(nn.Conv2d(widths[at], 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return stir(Network(blocks, nn.Sequential(*head), aux if returns in ("tuple", "dict", "training") else None,
                        returns, at).double())  # fmt: skip


def keeps(graph: ChannelGraph) -> st.SearchStrategy[dict[str, Tensor]]:
    """Masks for the groups: any that keeps a channel, only one, all but one, all, or none given, which is the same."""

    def masks(size: int) -> st.SearchStrategy[int | None]:
        full, one = 2**size - 1, st.integers(0, size - 1).map(lambda i: 1 << i)
        all_but_one = one.map(lambda bit: full ^ bit) if size > 1 else st.just(full)
        return st.one_of(st.just(None), st.integers(1, full), st.integers(1, full), one, all_but_one, st.just(full))

    def as_masks(bits: dict[str, int | None]) -> dict[str, Tensor]:
        sizes = {name: graph.groups[name].size for name, b in bits.items() if b is not None}
        return {name: torch.tensor([bool(bits[name] >> i & 1) for i in range(n)]) for name, n in sizes.items()}

    return st.fixed_dictionaries({name: masks(g.size) for name, g in graph.groups.items()}).map(as_masks)


def traced(model: nn.Module, x: Tensor) -> ChannelGraph:
    with warnings.catch_warnings():  # of layers that only run in training, where training does not run
        warnings.filterwarnings("ignore", "trace: .* never ran", UserWarning)
        return trace(model, x)


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return leaves(model(x))


def assert_close(a: Tensor, b: Tensor, what: str = "") -> None:
    assert a.shape == b.shape, (what, a.shape, b.shape)
    a, b = a.detach(), b.detach()
    gap = float((a - b).abs().max())
    assert gap <= 1e-9 * max(1.0, float(b.abs().max())), (what, gap)


def what_stays(t: Tensor, dims: dict[int, Tensor]) -> Tensor:
    for dim, stays in dims.items():
        t = t.index_select(dim, stays)
    return t


def without_noise(model: nn.Module) -> nn.Module:
    """In training mode, but for dropout: its numbers depend on how many channels there are."""
    model.train()
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd):
            m.eval()
    return model


def assert_sizes(model: nn.Module) -> None:
    """What modules say of their sizes is what their tensors have."""
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.conv._ConvNd):
            rows, columns = m.weight.shape[:2]
            wide = (columns * m.groups, rows) if m.transposed else (rows, columns * m.groups)
            assert wide == (m.out_channels, m.in_channels), name
            assert m.bias is None or len(m.bias) == m.out_channels, name
        elif isinstance(m, nn.Linear):
            assert m.weight.shape == (m.out_features, m.in_features), name
        elif isinstance(m, nn.modules.batchnorm._NormBase):
            for t in (m.weight, m.bias, m.running_mean, m.running_var):
                assert t is None or len(t) == m.num_features, name
        elif isinstance(m, nn.GroupNorm):
            assert m.weight is None or len(m.weight) == m.num_channels, name
            assert m.num_channels % m.num_groups == 0, name
        elif isinstance(m, nn.PReLU):
            assert len(m.weight) == m.num_parameters, name


X = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@given(st.data())
@examples(110)
def test_small_equals_masked(data):
    """Outputs in eval and training mode, gradients and running statistics of what is left; sizes; the same objects."""
    model = data.draw(networks())
    graph = traced(model, X)
    keep = data.draw(keeps(graph))
    plan = graph.kept(keep)
    masked, parameters = copy.deepcopy(model), list(model.parameters())
    tensors = [*masked.named_parameters(), *masked.named_buffers()]
    formats = [p.is_contiguous(memory_format=torch.channels_last) for p in parameters if p.dim() == 4]
    graph.mask_(masked, keep)
    assert compact(model, keep, X, graph=graph) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert_sizes(model)
    for p, was in zip([p for p in parameters if p.dim() == 4], formats, strict=True):
        assert p.is_contiguous(memory_format=torch.channels_last) or not was
    for a, b in zip(run(model.eval(), X), run(masked.eval(), X), strict=True):
        assert_close(a, b)
    if graph.train_error is None:
        for net in (without_noise(model), without_noise(masked)):
            sum((t * t).sum() for t in run(net, X)).backward()
        small = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, big in tensors:
            assert_close(small[name], what_stays(big, plan.get(name, {})), name)
            if isinstance(big, nn.Parameter):
                assert (small[name].grad is None) == (big.grad is None), name
                if big.grad is not None:
                    scale = max(1.0, float(big.grad.abs().max()))
                    assert_close(small[name].grad / scale, what_stays(big.grad, plan.get(name, {})) / scale, name)


@given(st.data())
@examples(50)
def test_twice_is_once(data):
    """Cutting twice is cutting once with both masks, costs what the graph says, and is found by a new trace."""
    model = data.draw(networks())
    graph = traced(model, X)
    costs = Costs(graph, model, uses(graph, model, X))
    first = data.draw(keeps(graph))
    after = graph.after(first)
    second = data.draw(keeps(after))
    both = {name: first.get(name, torch.ones(g.size, dtype=torch.bool)).clone() for name, g in graph.groups.items()}
    for name, mask in second.items():
        both[name][both[name].clone()] = mask
    once = compact(copy.deepcopy(model), both, X, graph=graph)
    counted = flops(once, X)
    assert costs.of(both) == {"macs": counted["macs"], "params": counted["params"]}
    compact(model, first, X, graph=graph)
    again = traced(model, X)
    shared = {name: g for name, g in after.groups.items() if g.size > 1}
    if all(mask.sum() > 1 for mask in first.values()) and again.frozen.keys() == graph.frozen.keys():
        # a single channel left is no group, and what it met is then tied or not by chance
        assert {n: g.size for n, g in again.groups.items()} == {n: g.size for n, g in shared.items()}
    compact(model, second, X, graph=after)
    for (name, a), b in zip(model.state_dict().items(), once.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert str(model) == str(once)
