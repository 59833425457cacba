"""SGD that grows a regularisation and holds what was cut, as a drop-in for torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from fastprune.ops.growing_sgd import check_broadcast, launch

Constraints = dict[int, tuple[Tensor, Tensor]]  # id of a parameter to itself and what is asked of it
KIND = attrgetter("dtype", "device")
RATES = (torch.float32, torch.float64)  # of a learning rate on the device


class GrowingSGD(torch.optim.SGD):
    """``torch.optim.SGD`` with a regularisation and a mask for any parameter, one launch a step.

    Arguments, defaults, parameter groups, schedulers and ``state_dict`` are those of ``torch.optim.SGD``, whose runs it
    continues and which continues its runs.  :func:`fastprune.ops.growing_sgd` has the formula, and what is equal to
    ``torch.optim.SGD`` bit for bit.  :meth:`constrain` says what to regularise and what to hold at zero.  A tensor as
    learning rate on the parameters' device is read there by the kernel: a scheduler, which fills it, works with CUDA
    graphs too.  One as weight decay is read by the host; ``foreach`` and ``fused`` in a state that was loaded are kept,
    and not used.

    A ``GradScaler`` hands its scale to the step, which divides the gradients in place by it and leaves everything as it
    was when one of them is infinite, without a synchronisation (but in a step that makes new momentum buffers with a
    dampening).

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
        self._reg: Constraints = {}
        self._keep: Constraints = {}

    def constrain(
        self, reg: Mapping[Tensor, Tensor] | None = None, keep: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        """Say what to regularise and what to hold at zero from the next step on, in place of what was said before.

        Tensors are kept by reference: a caller that changes them in place need not call again, and calling again with
        the same ones costs next to nothing.  They are no part of ``state_dict``.  :func:`fastprune.compact` replaces
        them by what is left of them.  Like everything in a step, they leave a parameter without a gradient alone.

        Args:
            reg: Parameter to additional weight decay: the parameter's number of dimensions, each of size 1 or the
                parameter's, float32 (float64 for float64 parameters).  None: nothing.
            keep: Parameter to mask, likewise, bool; False = parameter and momentum are zero.  None: nothing.

        Raises:
            ValueError: A tensor that is no parameter of this optimizer, or one that does not fit its parameter.
        """
        checked = self._checked("reg", reg or {}, self._reg), self._checked("keep", keep or {}, self._keep)
        self._reg, self._keep = checked

    def _checked(self, name: str, new: Mapping[Tensor, Tensor], old: Constraints) -> Constraints:
        checked: Constraints = {}
        known: set[int] = set()
        for p, t in new.items():
            pair = old.get(id(p))
            if pair is None or pair[1] is not t:
                known = known or {id(q) for group in self.param_groups for q in group["params"]}
                if id(p) not in known:
                    raise ValueError(
                        f"GrowingSGD.constrain: {name} has a tensor {tuple(p.shape)} that is none of the parameters of "
                        "this optimizer; add_param_group() it first"
                    )
                check_broadcast("GrowingSGD.constrain", f"{name} of a parameter", t, p, mask=name == "keep")
                pair = p, t
            checked[id(p)] = pair
        return checked

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
        params = [p for p in group["params"] if p.grad is not None]
        kinds = set(map(KIND, params))
        for kind in kinds:
            alike = params if len(kinds) == 1 else [p for p in params if KIND(p) == kind]
            if not group["momentum"]:
                self._launch(group, alike, [], False, scale, found_inf)
                continue
            buffers = [self.state.get(p, {}).get("momentum_buffer") for p in alike]
            fresh = [p for p, buffer in zip(alike, buffers, strict=True) if buffer is None]
            if fresh:
                alike = [p for p, buffer in zip(alike, buffers, strict=True) if buffer is not None]
                buffers = [buffer for buffer in buffers if buffer is not None]
            self._launch(group, alike, buffers, False, scale, found_inf)
            if fresh and found_inf is not None and not group["dampening"]:
                # momentum * 0 + g is what the first step makes of them, also if the one that comes first is skipped
                buffers = [torch.zeros_like(p) for p in fresh]
                self._launch(group, fresh, buffers, False, scale, found_inf)
                for p, buffer in zip(fresh, buffers, strict=True):
                    self.state[p]["momentum_buffer"] = buffer
            elif fresh and (found_inf is None or not found_inf.item()):  # a step that changes nothing makes no buffers
                buffers = [torch.empty_like(p) for p in fresh]
                self._launch(group, fresh, buffers, True, scale, found_inf)
                for p, buffer in zip(fresh, buffers, strict=True):
                    self.state[p]["momentum_buffer"] = buffer

    def _launch(
        self, group: dict[str, Any], params: list[Tensor], buffers: list[Tensor], first: bool, *scalars: Tensor | None
    ) -> None:
        if not params:
            return
        grads = [p.grad for p in params]
        if sparse := [g for g in grads if g.layout != torch.strided]:
            raise ValueError(
                f"GrowingSGD: the gradient of a parameter {tuple(sparse[0].shape)} is {sparse[0].layout}; expected a "
                "dense one (nn.Embedding: sparse=False), or keep such parameters in a torch.optim.SGD of their own"
            )
        reg, keep = (
            {i: parts[id(p)][1] for i, p in enumerate(params) if id(p) in parts} if parts else {}
            for parts in (self._reg, self._keep)
        )
        lr, rate = group["lr"], None
        if isinstance(lr, Tensor) and (lr.device.type != "cpu" or params[0].device.type == "cpu"):
            rate = lr.to(params[0].device, lr.dtype if lr.dtype in RATES else torch.float32, non_blocking=True).view(())
        launch(
            params, grads, buffers, reg, keep,
            *(t if t is None else t.to(params[0].device, non_blocking=True) for t in scalars),
            rate, float(lr) if rate is None else 0.0,
            float(group["momentum"]), float(group["dampening"]), float(group["weight_decay"]),
            group["nesterov"], group["maximize"], first,
        )  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_reg", {})  # of a copy, which has parameters of its own
        self.__dict__.setdefault("_keep", {})
