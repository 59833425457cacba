"""SGD that grows a regularisation and holds what was cut, as a drop-in for torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastprune.ops.growing_sgd import check_broadcast, launch


class GrowingSGD(torch.optim.SGD):
    """``torch.optim.SGD`` with a regularisation and a mask for any parameter, one launch a step.

    Arguments, defaults, parameter groups, schedulers and ``state_dict`` are those of ``torch.optim.SGD``, whose runs it
    continues and which continues its runs.  :func:`fastprune.ops.growing_sgd` has the formula, and what is equal to
    ``torch.optim.SGD`` bit for bit.  :meth:`constrain` says what to regularise and what to hold at zero.

    A ``GradScaler`` hands its scale to the step, which divides the gradients in place by it and leaves everything as it
    was when one of them is infinite, without a synchronisation (but in a step that makes new momentum buffers).

    Raises:
        ValueError: ``foreach=True`` or ``fused=True``, since there is one implementation, fused per device and dtype;
            ``differentiable=True``, since it works in place; or as ``torch.optim.SGD`` raises.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        for name, value in (("foreach", foreach), ("fused", fused), ("differentiable", differentiable)):
            if value:
                why = "it works in place" if name == "differentiable" else "it has one implementation, which is fused"
                raise ValueError(f"GrowingSGD: {name}=True cannot be had ({why}); leave {name} out")
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov,
            maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._reg: dict[Tensor, Tensor] = {}
        self._keep: dict[Tensor, Tensor] = {}

    def constrain(
        self, reg: Mapping[Tensor, Tensor] | None = None, keep: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        """Say what to regularise and what to hold at zero from the next step on, in place of what was said before.

        Tensors are kept by reference: a caller that changes them in place need not call again, and calling again with
        the same ones costs next to nothing.  They are no part of ``state_dict``.  After :func:`fastprune.compact`, call
        with tensors of the new sizes.

        Args:
            reg: Parameter to additional weight decay: the parameter's number of dimensions, each of size 1 or the
                parameter's, float32 (float64 for float64 parameters).  None: nothing.
            keep: Parameter to mask, likewise, bool; False = parameter and momentum are zero.  None: nothing.

        Raises:
            ValueError: A tensor that is no parameter of this optimizer, or one that does not fit its parameter.
        """
        known: set[int] | None = None
        for name, new, old in (("reg", reg or {}, self._reg), ("keep", keep or {}, self._keep)):
            for p, t in new.items():
                if old.get(p) is t:
                    continue
                known = known or {id(q) for group in self.param_groups for q in group["params"]}
                if id(p) not in known:
                    raise ValueError(
                        f"GrowingSGD.constrain: {name} has a tensor {tuple(p.shape)} that is none of the parameters of "
                        "this optimizer; add_param_group() it first"
                    )
                check_broadcast("GrowingSGD.constrain", name, t, p, mask=name == "keep")
        self._reg, self._keep = dict(reg or {}), dict(keep or {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; see ``torch.optim.SGD.step``.

        Raises:
            ValueError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            self._step(group, scale, found_inf)
        return loss

    def _step(self, group: dict[str, Any], scale: Tensor | None, found_inf: Tensor | None) -> None:
        """One launch for the parameters of each device and dtype; another for those without a momentum buffer yet."""
        momentum = float(group["momentum"])
        calls: dict[tuple, tuple[list[Tensor], list[Tensor], list[Tensor], dict, dict]] = {}
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise ValueError(
                    f"GrowingSGD: the gradient of a parameter {tuple(p.shape)} is {grad.layout}; expected a dense one "
                    "(nn.Embedding: sparse=False), or keep such parameters in a torch.optim.SGD of their own"
                )
            buffer = self.state[p].get("momentum_buffer") if momentum else None
            key = (p.device, p.dtype, momentum != 0 and buffer is None)
            params, grads, momenta, reg, keep = calls.get(key) or calls.setdefault(key, ([], [], [], {}, {}))
            if p in self._reg:
                reg[len(params)] = self._reg[p]
            if p in self._keep:
                keep[len(params)] = self._keep[p]
            params.append(p)
            grads.append(grad)
            if buffer is not None:
                momenta.append(buffer)
        for (device, _, first), (params, grads, momenta, reg, keep) in calls.items():
            if first:
                if found_inf is not None and found_inf.item():
                    continue  # a step that changes nothing makes no buffers either
                momenta += [torch.empty_like(p) for p in params]
            scalars = (t if t is None else t.to(device, non_blocking=True) for t in (scale, found_inf))
            launch(
                params, grads, momenta, reg, keep, *scalars,
                float(group["lr"]), momentum, float(group["dampening"]), float(group["weight_decay"]),
                group["nesterov"], group["maximize"], first,
            )  # fmt: skip
            if first:
                for p, buffer in zip(params, momenta, strict=True):
                    self.state[p]["momentum_buffer"] = buffer

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_reg", {})  # of a copy, which has parameters of its own
        self.__dict__.setdefault("_keep", {})
