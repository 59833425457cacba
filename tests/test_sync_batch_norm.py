"""Two gloo processes equal one process on the whole batch."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fastprune import ops
from fastprune.nn import (
    BatchNormAct2d,
    SigmoidBatchNorm2d,
    SyncBatchNormAct2d,
    convert_batchnorm,
    convert_sync_batchnorm,
)
from fastprune.ops.sync_batch_norm import sync_batch_norm_act

C, H = 5, 4
# (keyword arguments, samples of rank 0 of 6, residual, dtype, layout); 6 leaves rank 1 without any
CASES = {
    "plain": ({}, 3, False, torch.float64, torch.contiguous_format),
    "uneven, residual, relu": ({"act": "relu"}, 4, True, torch.float64, torch.contiguous_format),
    "empty": ({"act": "relu"}, 6, True, torch.float64, torch.contiguous_format),
    "sigmoid": ({"bound": "sigmoid", "act": "relu"}, 5, True, torch.float64, torch.contiguous_format),
    "no bias": ({"bound": "sigmoid", "bias": False}, 2, False, torch.float64, torch.contiguous_format),
    "not affine": ({"affine": False}, 2, True, torch.float64, torch.contiguous_format),
    "cumulative": ({"momentum": None}, 1, False, torch.float64, torch.contiguous_format),
    "untracked": ({"track_running_stats": False}, 4, False, torch.float64, torch.contiguous_format),
    "float32": ({"act": "relu"}, 4, True, torch.float32, torch.contiguous_format),
    "float32, channels_last": ({"act": "relu"}, 4, True, torch.float32, torch.channels_last),
    "bfloat16": ({"act": "relu"}, 4, True, torch.bfloat16, torch.contiguous_format),
}


def data(dtype, layout):
    g = torch.Generator().manual_seed(1)
    # means far from zero, and unlike on the two ranks: E[x^2] - E[x]^2 would show
    x, r, dy = (torch.randn(6, C, H, H, generator=g, dtype=torch.float64) for _ in range(3))
    x += 30 * torch.arange(6).view(-1, 1, 1, 1)
    return [t.to(dtype).contiguous(memory_format=layout) for t in (x, r, dy)]


def build(cls, kwargs, dtype):
    torch.manual_seed(2)
    m = cls(C, **kwargs)
    with torch.no_grad():
        for p in m.parameters():
            p.normal_()
    m.gate_grad = None
    return m.double() if dtype == torch.float64 else m


def two_steps(m, x, r, dy, residual):
    x, r = x.clone().requires_grad_(), r.clone().requires_grad_()
    m.gate_grad = x.new_full(x.shape[:2], torch.nan, dtype=torch.promote_types(x.dtype, torch.float32))
    for _ in range(2):
        y = m(x, r if residual else None)
        y.backward(dy)
    rows = [y.detach(), x.grad, r.grad if residual else None, m.gate_grad]
    return rows, [p.grad for p in m.parameters()], [b.clone() for b in m.buffers()]


GATES = ("gate_grad", "gate_abs", "out_grad", "out_abs")


def all_gates(op, x, r, dy, **kwargs):
    """The four gate buffers, (N, C) each, after one step with residual and ReLU."""
    matrix = torch.full((len(x), 4 * C), torch.nan, dtype=x.dtype)
    scale, shift = torch.linspace(-1, 1, C, dtype=x.dtype), torch.linspace(0.5, -0.5, C, dtype=x.dtype)
    gates = dict(zip(GATES, matrix.split(C, 1), strict=True))
    op(x.clone().requires_grad_(), scale, shift, residual=r, act="relu", **gates, **kwargs).backward(dy)
    return matrix


def worker(rank, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    out = {}
    for name, (kwargs, split, residual, dtype, layout) in CASES.items():
        own = slice(0, split) if rank == 0 else slice(split, 6)
        out[name] = two_steps(
            build(SyncBatchNormAct2d, kwargs, dtype), *(t[own] for t in data(dtype, layout)), residual
        )

    own = slice(0, 4) if rank == 0 else slice(4, 6)
    given = [t[own] for t in data(torch.float64, torch.contiguous_format)]
    out["gates"] = [all_gates(sync_batch_norm_act, *given)], [], []

    # all batches empty: an empty result, and the running statistics stay
    m = SyncBatchNormAct2d(C)
    m(torch.zeros(0, C, H, H, requires_grad=True)).sum().backward()
    out["nothing"] = [], [], [b.clone() for b in m.buffers()]

    # eval mode takes no part in any communication: only one process runs it
    if rank == 0:
        m, x = build(SyncBatchNormAct2d, {}, torch.float32).eval(), data(torch.float32, torch.contiguous_format)[0]
        assert torch.equal(m(x), build(BatchNormAct2d, {}, torch.float32).eval()(x))

    # a whole model under DistributedDataParallel: the gradients of the mean loss over the whole batch
    out["ddp"] = train_model(rank)
    torch.save(out, f"{results}{rank}")
    dist.barrier()
    dist.destroy_process_group()


def train_model(rank):
    torch.manual_seed(3)
    model = convert_batchnorm(Block().double())
    x, _, _ = data(torch.float64, torch.contiguous_format)
    if rank is not None:
        model = nn.parallel.DistributedDataParallel(convert_sync_batchnorm(model))
        x = x[3 * rank : 3 * rank + 3]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [], [p.detach() for p in model.parameters()], [b.clone() for b in model.buffers()]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    mp.spawn(worker, args=(folder / "store", folder / "rank"), nprocs=2)
    return [torch.load(f"{folder / 'rank'}{rank}", weights_only=True) for rank in (0, 1)]


def close(got, want, dtype):
    eps = torch.finfo(dtype).eps
    atol = 64 * eps * max(1.0, want.abs().max().item()) if want.is_floating_point() else 0
    torch.testing.assert_close(got, want, rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(ranks, name):
    kwargs, _, residual, dtype, layout = CASES[name]
    exact = torch.promote_types(dtype, torch.float32)  # bfloat16 against float32 on the same values
    m = build(BatchNormAct2d, kwargs, dtype)
    rows, grads, buffers = two_steps(m, *(t.to(exact) for t in data(dtype, layout)), residual)
    for got0, got1, want in zip(ranks[0][name][0], ranks[1][name][0], rows, strict=True):
        if want is not None:
            close(torch.cat([got0, got1]), want, dtype)
    for got0, got1, want in zip(ranks[0][name][1], ranks[1][name][1], grads, strict=True):
        close(got0 + got1, want, dtype)  # of the local loss, as in nn.SyncBatchNorm; the sum is that of the whole
    for rank in ranks:
        for got, want in zip(rank[name][2], buffers, strict=True):
            close(got, want, exact)
    assert all(torch.equal(a, b) for a, b in zip(ranks[0][name][2], ranks[1][name][2], strict=True))


def test_every_gate_buffer_has_the_rows_of_the_own_samples(ranks):
    want = all_gates(ops.batch_norm_act, *data(torch.float64, torch.contiguous_format))
    close(torch.cat([rank["gates"][0][0] for rank in ranks]), want, torch.float64)


def test_empty_everywhere(ranks):
    for rank in ranks:
        mean, var, tracked = rank["nothing"][2]
        assert mean.tolist() == [0] * C and var.tolist() == [1] * C and tracked == 1


def test_ddp_trains_as_one_process(ranks):
    _, parameters, buffers = train_model(None)
    for rank in ranks:
        for got, want in zip(rank["ddp"][1] + rank["ddp"][2], parameters + buffers, strict=True):
            close(got, want, torch.float64)


def test_conversion_keeps_everything_but_the_class():
    model = nn.Sequential(nn.BatchNorm2d(C), BatchNormAct2d(C, act="relu"), SigmoidBatchNorm2d(C))
    model[2].gate_grad = torch.zeros(2, C)
    before, state = list(model.parameters()), list(model.state_dict())
    x, expected = torch.randn(2, C, H, H), copy.deepcopy(model)
    expected[2].gate_grad = None
    assert convert_sync_batchnorm(model) is model
    assert all(type(m) is SyncBatchNormAct2d for m in model)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True)) and state == list(model.state_dict())
    assert [(m.act, m.bound) for m in model] == [(None, None), ("relu", None), (None, "sigmoid")]
    assert model[2].gate_grad is not None and model[2].bias is None
    model[2].gate_grad = None
    close(model(x).detach(), expected(x).detach(), torch.float32)  # no process group: as the parent class
    assert pickle.loads(pickle.dumps(model))[2].bound == "sigmoid"


def test_batch_norms_of_their_own_kind_are_named():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Odd(C), nn.SyncBatchNorm(C), nn.BatchNorm2d(C))
    with pytest.warns(UserWarning, match=r"convert_sync_batchnorm: left alone.*0 \(Odd\), 1 \(SyncBatchNorm\)$"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is Odd and type(model[2]) is SyncBatchNormAct2d
