"""First of all stand-ins for a GPU, where there is none; then seeds, and poison for unwritten memory."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    named = os.environ.get("FASTPRUNE_TEST_BACKENDS", "eager,cpp,triton,cuda").split(",")
    if "triton" in named:
        os.environ["TRITON_INTERPRET"] = "1"  # read by Triton and by fastprune.backends at import
    if "cuda" in named:
        sys.path.insert(0, str(Path(__file__).parent))
        from cuda_emulator.build import build_op

        os.environ["FASTPRUNE_CUDA_EMULATOR"] = str(build_op())  # read by fastprune.backends at import

import pytest


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Seed, and fill every torch.empty (Python and C++) with NaN so that unwritten output shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    """Mark what runs a kernel of the GPU: there on the GPU, else in Triton's interpreter or the emulator."""
    files = ("test_triton_kernels.py", "test_slab_kernels.py", "test_cuda_kernels.py")
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if item.path.name in files or any(v in ("triton", "cuda") for v in values if type(v) is str):
            item.add_marker("gpu")
