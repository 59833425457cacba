"""The emulator that stands in for a GPU sees planted faults, and rounds as a GPU does."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from cuda_emulator.build import build

FAULTS = Path(__file__).parent / "cuda_emulator" / "faults.cu"
FINE = "no error"
# In the order of the enum in faults.cu; "": a wrong result, under some schedule.
NAMES = {
    "none": FINE,
    "no barrier": "",
    "not all at the barrier": "32 of 64 threads at __syncthreads",
    "not all in the shuffle": "31 of 32 threads at __shfl_sync",
    "beside shared memory": "wrote beside the shared memory",
    "unwritten shared memory": "",
    "no wait": "",
    "beside global memory": "global memory that is no argument's (block 0, ",
    "misaligned": "misaligned access to global memory",
    "ends too early": "shared memory of a block that has ended",
}


@pytest.fixture(scope="module")
def library():
    library = ctypes.CDLL(str(build([FAULTS])))
    library.run_fault.restype = library.run_refused.restype = ctypes.c_char_p
    return library


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


def run(library, fault: int, seed: int):
    """The runtime's words, and the results."""
    memory = torch.randn(80)  # tensors may start anywhere: find an address that vectors have
    skip = -memory.data_ptr() // 4 % 4
    x, out = memory[skip : skip + 64], torch.full((2, 64), torch.nan)
    library.emulator_seed(ctypes.c_uint64(seed))
    words = library.run_fault(fault, pointer(x), pointer(out)).decode()
    warps = x.view(2, 32).sum(1).repeat_interleave(32)
    return words, out, x.flip(0) + x[63] + warps


@pytest.mark.parametrize("name", NAMES)
def test_planted_faults_are_seen(library, name):
    fault = list(NAMES).index(name)
    seen = []
    for seed in range(8):
        words, out, want = run(library, fault, seed)
        right = bool(torch.isclose(out, want, rtol=1e-5, atol=1e-5).all())
        if name == "none":
            assert words == FINE and right
        elif NAMES[name]:
            seen.append(NAMES[name] in words)
        else:
            assert words == FINE
            seen.append(not right)
    assert name == "none" or any(seen)
    # Which thread comes first is chance only where a race is the fault.
    assert name in ("none", "no barrier", "ends too early") or all(seen)


def test_launches_that_no_device_takes_are_refused(library):
    words = [library.run_refused(which).decode() for which in range(3)]
    assert words == [
        "more shared memory than the kernel was allowed by cudaFuncSetAttribute",
        "a cluster that the device lacks",
        "a grid that no device has",
    ]


def test_half_types_round_as_in_pytorch(library):
    bits = torch.arange(-(2**31), 2**31, 4001, dtype=torch.int64).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).float()])
    x = torch.cat([x, torch.tensor([65519.0, 65520.0, 2.0**-25, 2.0**-24 * 1.5, 2.0**-14 * (1 - 2.0**-12), 0.0, -0.0])])
    half, bfloat, back = (torch.empty(len(x), dtype=t) for t in (torch.int16, torch.int16, torch.float32))
    library.convert(pointer(x), ctypes.c_int64(len(x)), pointer(half), pointer(bfloat), pointer(back))
    nan = x.isnan()
    assert nan.any() and half.view(torch.float16)[nan].isnan().all() and bfloat.view(torch.bfloat16)[nan].isnan().all()
    assert torch.equal(half.view(torch.float16)[~nan], x[~nan].half())
    assert torch.equal(bfloat.view(torch.bfloat16)[~nan], x[~nan].bfloat16())
    assert torch.equal(back[~nan], x[~nan].half().float())
