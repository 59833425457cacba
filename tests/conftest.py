"""First of all Triton by interpretation, where there is no GPU; then seeds, and poison for unwritten memory."""

import os

if "triton" in os.environ.get("FASTPRUNE_TEST_BACKENDS", "eager,cpp,triton").split(","):
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read by Triton and by fastprune.backends at import

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Seed, and fill every torch.empty (Python and C++) with NaN so that unwritten output shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    """Mark what runs a kernel of the GPU: there on the GPU, else in Triton's interpreter."""
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if item.path.name == "test_triton_kernels.py" or any(v in ("triton", "cuda") for v in values if type(v) is str):
            item.add_marker("gpu")
