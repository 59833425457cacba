"""Batch norm modules: bounded or free scale, with the residual add and the ReLU inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastprune.errors import GraphError
from fastprune.ops.batch_norm_act import batch_norm_act
from fastprune.ops.channel_gate import channel_gate
from fastprune.ops.sync_batch_norm import sync_batch_norm_act


class BatchNormAct2d(nn.BatchNorm2d):
    r"""``nn.BatchNorm2d`` followed by a residual add and a ReLU if wanted, in one pass; the scale may be bounded.

    .. math:: y = \mathrm{act}(s\,\hat x + b + r), \quad s = \mathrm{weight} \text{ or } \mathrm{sigmoid(weight)}

    Parameters, buffers and ``state_dict`` keys are those of ``nn.BatchNorm2d``, and unbounded ones load each other's
    state.  A bounded one marks its state in the metadata: loading bounded into unbounded state or the reverse, which
    would silently change the scales, is an error here, also with ``strict=False``.  A dictionary without metadata (a
    plain ``dict``, safetensors) is taken at its word.  A bounded norm without shift takes over the shift of a marked
    state that has one, so that a converted model can be rebuilt from a fresh one; make the optimizer after loading.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: As ``nn.BatchNorm2d``.
        bias: Have a shift ``b``; False registers ``bias`` as None.
        act: ``"relu"`` or None.
        bound: ``"sigmoid"``: the scale is sigmoid(weight), in (0, 1); None: the scale is ``weight``.

    Attributes:
        gate_grad: None, or a buffer (N, C), float32 (float64 for float64 activations), that each backward overwrites
            with the per-sample gate gradients, see :func:`fastprune.ops.batch_norm_act`.
        gate_slots: None, or a function of x that each forward which autograd records calls for such buffers, as keyword
            arguments of :func:`fastprune.ops.batch_norm_act`; see :class:`fastprune.gates.GateStatistics`.

    Source: Ioffe and Szegedy, 2015, arXiv:1502.03167; sigmoid bound, Suteu and Guo, 2022, arXiv:2204.06404.
    """

    # On the class, because convert_batchnorm turns an existing nn.BatchNorm2d into one of these in place.
    act: str | None = None
    bound: str | None = None
    gate_grad: Tensor | None = None
    gate_slots: Callable[[Tensor], dict[str, Tensor]] | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        act: str | None = None,
        bound: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if act not in (None, "relu"):
            raise ValueError(f"{type(self).__name__}: act must be 'relu' or None, got {act!r}")
        if bound not in (None, "sigmoid"):
            raise ValueError(f"{type(self).__name__}: bound must be 'sigmoid' or None, got {bound!r}")
        if bound and not affine:
            raise ValueError(f"{type(self).__name__}: bound='sigmoid' needs affine=True, there is no weight to bound")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.act, self.bound = act, bound
        if not bias:
            self.bias = None
        if bound:
            self.reset_parameters()

    @property
    def scale(self) -> Tensor | None:
        """Factor of each channel, (C,): sigmoid(weight) or ``weight``; None (a factor of 1) with ``affine=False``."""
        return self.weight.sigmoid() if self.bound else self.weight

    def reset_parameters(self) -> None:
        """Scale 1 (bounded: weight ~ N(0, 1), as RNI's authors), shift 0, running statistics 0 and 1."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.normal_(self.weight) if self.bound else nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, act: str | None = None) -> Tensor:
        """Normalise, add, activate.

        Args:
            x: (N, C, H, W); works in its dtype, whatever that of the parameters (autocast).
            residual: Added before the activation.  One of another shape or dtype is added as ``+`` would,
                outside the fused pass.
            act: For this call, on top of the module's own ``act``.
        """
        self._check_input_dim(x)
        act = act or self.act
        gates = {} if self.gate_grad is None else {"gate_grad": self.gate_grad}
        if self.gate_slots is not None and torch.is_grad_enabled():
            gates = self.gate_slots(x)
            if residual is None and "out_grad" in gates:
                raise GraphError("BatchNormAct2d: expected a residual as when its gates were found; find them again")
        if residual is None or (residual.shape == x.shape and residual.dtype == x.dtype):
            return self._norm(x, residual, act, gates)
        outer = {f"gate_{key[4:]}": t for key, t in gates.items() if key.startswith("out_")}
        y = self._norm(x, None, None, {key: t for key, t in gates.items() if not key.startswith("out_")}) + residual
        y = y.relu() if act else y
        return channel_gate(y, **outer) if outer else y

    def _norm(self, x: Tensor, residual: Tensor | None, act: str | None, gates: dict[str, Tensor]) -> Tensor:
        update = self.training and self.track_running_stats
        tracked = update or not self.training  # as nn.BatchNorm2d: untracked buffers are neither read nor written
        return batch_norm_act(
            x,
            self.weight,
            self.bias,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.num_batches_tracked if update else None,
            residual=residual,
            act=act,
            bound=self.bound,
            training=self.training or self.running_mean is None,
            momentum=self.momentum,
            eps=self.eps,
            **gates,
        )

    def extra_repr(self) -> str:
        extra = ", bias=False" if self.affine and self.bias is None else ""
        for name in ("act", "bound"):
            if value := getattr(self, name):
                extra += f", {name}={value!r}"
        return super().extra_repr() + extra

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bound and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["bound"] = self.bound

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        bound = local_metadata.get("bound")
        if "version" in local_metadata and bound != self.bound:
            first = "this model, then load" if bound else "a model that has loaded it"
            error_msgs.append(
                f"{prefix[:-1] or type(self).__name__}: expected the state of a norm with scale "
                f"{_scale_text(self.bound)}, got one with scale {_scale_text(bound)}; call "
                f"fastprune.nn.convert_batchnorm(model, bound='sigmoid') on {first}"
            )
            return
        if bound and self.bias is None and prefix + "bias" in state_dict:
            self.bias = nn.Parameter(torch.zeros_like(self.weight))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _scale_text(bound: str | None) -> str:
    return "sigmoid(weight)" if bound else "weight"


class SigmoidBatchNorm2d(BatchNormAct2d):
    """Drop-in for ``nn.BatchNorm2d`` with scale sigmoid(weight) in (0, 1), by default without shift.

    ``weight`` starts as N(0, 1).  A trained ``nn.BatchNorm2d`` becomes one by :func:`fastprune.nn.convert_batchnorm`;
    its ``state_dict`` does not load as it is, see :class:`BatchNormAct2d`.

    Source: Suteu and Guo, Receding Neuron Importances, 2022, arXiv:2204.06404.
    """

    bound = "sigmoid"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = False,
        act: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            bias=bias,
            act=act,
            bound="sigmoid",
            device=device,
            dtype=dtype,
        )


class SyncBatchNormAct2d(BatchNormAct2d):
    """:class:`BatchNormAct2d` whose training statistics span all processes of ``process_group``.

    Batches may differ in size between the processes, or be empty.  In eval mode, with one process, before
    ``torch.distributed`` is initialised, or inside :meth:`each_alone` it is the parent class.

    Args:
        process_group: Default: all processes.
        Others as :class:`BatchNormAct2d`.
    """

    process_group: dist.ProcessGroup | None = None
    _alone = False

    @classmethod
    @contextmanager
    def each_alone(cls) -> Iterator[None]:
        """Let each process see its own batch only: where a model is looked at, and no statistics are wanted."""
        was, SyncBatchNormAct2d._alone = SyncBatchNormAct2d._alone, True
        try:
            yield
        finally:
            SyncBatchNormAct2d._alone = was

    def __init__(self, num_features: int, *args: Any, process_group: dist.ProcessGroup | None = None, **kwargs: Any):
        super().__init__(num_features, *args, **kwargs)
        self.process_group = process_group

    def _norm(self, x: Tensor, residual: Tensor | None, act: str | None, gates: dict[str, Tensor]) -> Tensor:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1
        if self._alone or not several or not self.training:
            return super()._norm(x, residual, act, gates)
        update = self.track_running_stats
        return sync_batch_norm_act(
            x,
            self.weight,
            self.bias,
            self.running_mean if update else None,
            self.running_var if update else None,
            self.num_batches_tracked if update else None,
            residual=residual,
            act=act,
            bound=self.bound,
            momentum=self.momentum,
            eps=self.eps,
            group=self.process_group,
            **gates,
        )
