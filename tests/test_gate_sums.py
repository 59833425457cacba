"""gate_sums against its definition in float64, on every backend."""

import pytest
import torch
from bn_cases import backends_of

from fastprune import ops

BACKENDS = backends_of("gate_sums")
DEVICE = {name: "cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu" for name in BACKENDS}
EACH = pytest.mark.parametrize("backend", BACKENDS)


def draw(n, uses, dtype, device, spare=3):
    """Slots in a wider matrix, columns in random order with some left over."""
    total = sum(uses) + spare
    wide = torch.randn(n, total + 5, dtype=dtype, device=device)
    columns = torch.randperm(total)[: sum(uses)].to(device)
    offsets = torch.tensor([0, *torch.tensor(uses, dtype=torch.int64).cumsum(0)]).to(device)
    return wide[:, :total], columns, offsets


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n, uses", [(1, [1]), (5, [1, 3, 0, 2]), (33, [1] * 70 + [9] * 7), (0, [1, 2]), (3, [])])
def test_sums_squares_and_magnitudes(backend, dtype, n, uses):
    slots, columns, offsets = draw(n, uses, dtype, DEVICE[backend])
    before = slots.clone()
    parts = before.double()[:, columns].cpu().split(uses, dim=1)
    S = torch.stack([p.sum(1) for p in parts], 1) if uses else torch.zeros(n, 0, dtype=torch.float64)
    again = slots.clone()
    got = ops.gate_sums(slots, columns, offsets, backend=backend)
    for part, expected in zip(got, (S.sum(0), S.square().sum(0), S.abs().sum(0)), strict=True):
        assert part.dtype == torch.float64 and part.shape == (len(uses),)
        torch.testing.assert_close(part.cpu(), expected)
    rest = torch.ones(slots.shape[1], dtype=torch.bool, device=slots.device).index_fill_(0, columns, False)
    assert not slots[:, columns].any() and torch.equal(slots[:, rest], before[:, rest])
    assert all(map(torch.equal, ops.gate_sums(again, columns, offsets, backend=backend), got))


@EACH
def test_nan_reaches_its_gate_only(backend):
    slots, columns, offsets = draw(4, [2, 1], torch.float32, DEVICE[backend], spare=0)
    slots[1, columns[0]] = float("nan")
    got = ops.gate_sums(slots, columns, offsets, backend=backend)
    assert all(part[0].isnan() and part[1].isfinite() for part in got)


def test_opcheck():
    slots, columns, offsets = draw(3, [2, 1], torch.float32, "cpu")
    torch.library.opcheck(torch.ops.fastprune.gate_sums.cpp, (slots.contiguous(), columns, offsets))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"slots": torch.zeros(2, 3, dtype=torch.int32)}, "expected slots .N, T., float32"),
        ({"slots": torch.zeros(3, 2).t()}, "inner stride 1"),
        ({"columns": torch.zeros(2, dtype=torch.int32)}, "expected columns int64"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, "expected offsets .K"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    args = {"slots": torch.zeros(2, 3), "columns": torch.tensor([0, 1]), "offsets": torch.tensor([0, 2])}
    with pytest.raises(ValueError, match=words):
        ops.gate_sums(**(args | change))


@pytest.mark.parametrize("columns, offsets", [([0, 9], [0, 2]), ([-1, 0], [0, 2]), ([0, 1], [0, 3]), ([0, 1], [2, 0])])
def test_cpp_writes_nowhere_else(columns, offsets):
    with pytest.raises(RuntimeError, match="columns"):
        ops.gate_sums(torch.zeros(2, 3), torch.tensor(columns), torch.tensor(offsets), backend="cpp")
