"""Launches every Triton kernel through Triton's own launcher, with a driver that runs nothing: ``python launches.py``.

What the interpreter does not see: an integer argument that is 1 is a constant in the kernel, options go to the
compiler, arguments have to fit the signature.  Prints the names of the kernels launched.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

launched: set[str] = set()


class Launcher:
    def __init__(self, source, metadata) -> None:
        self.types = list(source.signature.values())

    def __call__(self, x, y, z, stream, name, packed, metadata, enter, leave, *args) -> None:
        assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, (name, x, y, z)
        for arg, kind in zip(args, self.types, strict=True):
            if kind[0] == "*":
                assert isinstance(arg, torch.Tensor), (name, kind, arg)
            elif kind == "i32":
                assert type(arg) is int and -(2**31) <= arg < 2**31, (name, arg)
            elif kind != "constexpr":
                float(arg)
        launched.add(name)


class Driver(DriverBase):
    """An H200 on paper."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        self.utils, self.get_current_device, self.get_current_stream = self, lambda: 0, lambda device: 0

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name, kernel, shared, device):
        return None, name, 0, 0, 1024

    def map_python_to_cpp_type(self, kind):
        return kind

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError


def norms() -> None:
    from kernels import _bn_geometry as geometry
    from kernels import batch_norm_act as norm

    large = geometry.Device(processors=2, l2_bytes=1 << 20)
    for paths in (
        ("one launch", 1 << 15, geometry.INTERPRETER),
        ("three", 0, geometry.INTERPRETER),
        ("slabs", 0, large),
    ):
        _, geometry.FUSED_ELEMENTS, device = paths
        norm.device_of = lambda x, device=device: device
        geometry.slab_plan.cache_clear()
        for shape in ((1, 1, 1, 8), (2, 1, 7, 7), (1, 8, 1, 1)):
            x, C = torch.zeros(shape, dtype=torch.bfloat16), shape[1]
            p = [torch.zeros(C) for _ in range(4)]
            flags = (0.1, 1e-5, False, True, False)
            for training in (True, False):
                norm.batch_norm_act(x, *p[:2], None, *p[2:], torch.tensor(0), training, *flags)
            gates = [torch.zeros(shape[0], C) for _ in range(2)]
            rest = (True, 1e-5, True, True, True, False)
            norm.batch_norm_act_backward(x, x, *p[:2], torch.zeros(2, C), None, None, *gates, None, None, *rest)


def others() -> None:
    from kernels import (
        channel_gate,
        filter_norm,
        gate_sums,
        gram_penalty,
        growing_sgd,
        masked_conv2d,
        scale_penalty,
        weight_taylor,
    )

    for shape in ((1, 1, 1, 1), (1, 1, 7, 7), (2, 1, 8, 8)):
        x, gate = torch.zeros(shape), torch.zeros(shape[1])
        channel_gate.channel_gate(x, gate)
        channel_gate.channel_gate_backward(x, x, gate, None, torch.zeros(shape[:2]), True, True)
        for channels in (1, 2):
            w = torch.zeros(channels, shape[1], 1, 1)
            window = ([1, 1], [0, 0], [1, 1])
            y = masked_conv2d.masked_conv2d(x, w, None, None, None, None, *window)
            masked_conv2d.masked_conv2d_backward(y, x, w, None, None, None, *window, True, True)
    one = [torch.zeros(1, 1, 1, 1)]
    filter_norm.filter_norm(one, "l2", 0)
    weight_taylor.weight_taylor(one, one)
    gram_penalty.gram_penalty(one, None, [0], 1.0, 1.0, None)
    gram_penalty.orthogonality_penalty(one, one, "energy", [1], [0], True, None)
    scale_penalty.scale_penalty([torch.zeros(1)], "rni", 0.0)
    growing_sgd.growing_sgd(one, one, one, one, [0], [], [], None, None, None, *(0.1, 0.9, 0.0, 0.0), *(False,) * 3)
    gate_sums.gate_sums(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]))


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    norms()
    others()
    print("\n".join(sorted(launched)))
