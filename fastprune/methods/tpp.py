"""Trainability-preserving pruning (ICLR 2023, arXiv:2207.12534) and the orthogonality baselines of its authors.

``tpp`` chooses filters by mean absolute weight at the start.  While their coefficient grows, by the step and up to the
limit, a penalty on the Gram matrices of their layers makes them orthogonal to the filters that stay, and the scale and
shift of the norm behind them shrink with them.  With A = W as (N, K), G = A A^T and c the growing coefficient,
``scheme`` adds to a loss

| scheme | summed over    | term                                                                                     |
|--------|----------------|------------------------------------------------------------------------------------------|
| v5     | layers to cut  | weight c mean (G - T)^2, T = G (no gradient) among kept filters, 0 elsewhere: published    |
| v5_2   | layers to cut  | weight c mean (G - I)^2, I with zeros for cut filters                                     |
| v6     | layers to cut  | as v5_2, but kept filters among themselves with ``kept_weight`` in place of weight c      |
| v3     | layers to cut  | as v5_2, but without c                                                                   |
| v4     | layers to cut  | v3 + weight mean (A^T A - B^T B)^2, B the weight at the start                             |
| v2     | all layers     | weight mean (G - I)^2; of A^T where there are fewer filters than input channels          |
| v1     | all layers     | weight norm(conv(W, W) - I), stride 2, padding 1; as v2 for kernels of one element        |

Then the layers are zeroed one after the other, every ``zero_out_interval`` steps one.  Transposed convolutions have no
Gram matrix here; the coefficient drives their filters to zero all the same.

``orth-kernel`` and ``orth-conv`` train with mean (G - I)^2 of all layers (Xie et al., CVPR 2017, arXiv:1703.01827), or
norm(conv(W, W) - I) (Wang et al., CVPR 2020, arXiv:1911.12207), and choose by mean absolute weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprune import backends
from fastprune.errors import did_you_mean
from fastprune.graph import Group
from fastprune.methods.base import Method, register
from fastprune.methods.greg import GrowingMethod, GrowingOptions
from fastprune.methods.magnitude import MagnitudeMethod, MagnitudeOptions
from fastprune.methods.penalty import penalty_of
from fastprune.ops.gram_penalty import GramPlan, gram_plan, orthogonality_value_and_grad, value_and_grad
from fastprune.ratios import layers
from fastprune.surgery import Copies

SCHEMES = ("v1", "v2", "v3", "v4", "v5", "v5_2", "v6")


@dataclass(frozen=True)
class TPPOptions(GrowingOptions):
    limit: str = "tpp"
    scheme: str = "v5"
    weight: float = 1000.0  # of the penalty on Gram matrices
    kept_weight: float = 0.1  # of kept filters among themselves, scheme v6
    weight_reg: bool = True  # the growing coefficient also shrinks weights and biases
    bn_reg: bool = True  # and scale and shift of the norm behind them
    zero_out_interval: int = 100  # steps between zeroing one layer and the next; 0: all at the end
    power: int = 1  # the coefficient grows with this power of the steps


@register("tpp")
class TPP(GrowingMethod):
    """Decorrelate what goes from what stays, then let it go."""

    Options = TPPOptions
    kind = "tpp"

    def prepare(self) -> None:
        o = self.options
        if o.group != "filter":
            raise ValueError(f"{self.name}: expected group='filter', got {o.group!r}: Gram matrices are of filters")
        if o.scheme not in SCHEMES:
            raise ValueError(f"{self.name}: unknown scheme {o.scheme!r}{did_you_mean(str(o.scheme), SCHEMES)}")
        found = set(layers(self.model)).union(*(group.convs for group in self.groups.values()))  # those of others, too
        self._order = {name: i for i, name in enumerate(n for n, _ in self.model.named_modules() if n in found)}
        if o.stabilize < o.zero_out_interval * len(self._order):
            raise ValueError(
                f"{self.name}: zeroing {len(self._order)} layers every {o.zero_out_interval} steps takes longer than "
                f"stabilize={o.stabilize}; raise it, or lower zero_out_interval (0: all at the end)"
            )
        self._held_layers = 0
        if o.scheme == "v1":
            _check_two_dimensional(self.name, self.model)
        super().prepare()
        self._find_rows()
        self._gram_plan()  # not in the first step
        self._start = {w: w.detach().clone() for w in self._rows} if o.scheme == "v4" else {}

    def _regularised(self, group: Group) -> list[tuple[str, int]]:
        o, keys = self.options, []
        if o.weight_reg:
            keys += [*super()._regularised(group), *((f"{conv}.bias", 0) for conv in group.convs)]
        norms = {self.graph.norm_after.get(conv) for conv in group.convs} - {None} if o.bn_reg else ()
        for norm in sorted(norms):
            if getattr(self.model.get_submodule(norm), "bound", None):
                raise ValueError(
                    f"{self.name}: {norm} bounds its scale by a sigmoid, which no decay brings to 0; "
                    "use ordinary batch norm, or bn_reg=False"
                )
            keys += [(f"{norm}.weight", 0), (f"{norm}.bias", 0)]
        parameters = dict(self.model.named_parameters())
        return [key for key in keys if key in group.index and key[0] in parameters]

    # The penalty

    def penalty(self) -> Tensor:
        """The scheme's term of the loss; its gradients go to ``.grad`` in one call, see ``penalty_of``."""
        self._grow()  # the coefficient of this step
        o, level = self.options, self._level
        if self.finished or not o.weight:
            return super().penalty()
        if o.scheme in ("v1", "v2"):
            return self._all_layers_penalty()
        parameters, plan = self._gram_plan()
        with_level = o.scheme in ("v5", "v5_2", "v6")
        if not parameters or (with_level and not level and o.scheme != "v6"):
            return super().penalty()
        weight = self._penalty_factor if with_level else o.weight
        if o.scheme == "v6":
            value, weights, grads = _gram(parameters, plan, 0.0, o.kept_weight)
            if level:
                more, _, others = _gram(parameters, plan, 1.0, 0.0)
                value, grads = value + more * weight, torch._foreach_add(grads, torch._foreach_mul(others, weight))
            return penalty_of(value, weights, grads)
        value, weights, grads = _gram(parameters, plan, 1.0, 0.0 if o.scheme == "v5" else 1.0)
        if o.scheme == "v4":
            energy, _, more = _orthogonality(parameters, "energy", self._references(parameters))
            value, grads = value + energy, torch._foreach_add(grads, more)
        return penalty_of(value, weights, grads, weight)

    @property
    def _level(self) -> float:
        return float(self.growth.level.max(initial=0.0))

    def _penalty_weight(self) -> float:
        return self.options.weight * self._level

    def structure(self) -> tuple:
        return *super().structure(), self._level > 0, id(self._plan[1]), *map(id, self._start.values())

    def _references(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The weights at the start, which follow the model to another device or memory format."""
        for w in parameters:
            if self._start[w].stride() != w.stride() or self._start[w].device != w.device:
                self._start[w] = torch.empty_like(w).copy_(self._start[w]).detach()
        return [self._start[w] for w in parameters]

    def _all_layers_penalty(self) -> Tensor:
        """Schemes v1 and v2."""
        kinds: dict[str, list[nn.Parameter]] = {}
        for w in dict.fromkeys(self.model.get_submodule(name).weight for name in layers(self.model)):  # tied ones once
            if self.options.scheme == "v1" and math.prod(w.shape[2:]) > 1:
                kind = "conv"
            else:
                kind = "columns" if w.shape[0] < w.shape[1] else "rows"
            if w.requires_grad:
                kinds.setdefault(kind, []).append(w)
        if not kinds:
            return super().penalty()
        value, weights, grads = None, [], []
        for kind, ws in kinds.items():
            strides, paddings = ([2] * len(ws), [1] * 2 * len(ws)) if kind == "conv" else ((), ())
            term, _, more = _orthogonality(ws, kind, strides=strides, paddings=paddings)
            value, weights, grads = term if value is None else value + term, weights + ws, grads + more
        return penalty_of(value, weights, grads, self.options.weight)

    def _find_rows(self) -> None:
        """The weights that lose filters, each once, and which of their rows stay."""
        self._rows: dict[nn.Parameter, Tensor] = {}
        self._plan: tuple[list[nn.Parameter], GramPlan | None] = [], None
        for name in self._growing:
            group = self.groups[name]
            for tensor, dim in self._where(group):
                if dim == 0 and tensor.removesuffix(".weight") in group.convs:  # no transposed or depthwise convolution
                    w, index = self.model.get_parameter(tensor), group.index[tensor, 0]
                    stays = self._rows.setdefault(w, torch.ones(w.shape[0], dtype=torch.bool))
                    stays[index.position] = self._chosen[name][index.channel]

    def _gram_plan(self) -> tuple[list[nn.Parameter], GramPlan | None]:
        """Those of them that are trained, and the plan, made anew when they are others."""
        trained = [w for w in self._rows if w.requires_grad]
        if list(map(id, trained)) != list(map(id, self._plan[0])):
            self._plan = trained, gram_plan([self._rows[w] for w in trained], trained[0].device) if trained else None
        return self._plan

    # Zeroing layer by layer

    def advance(self, optimizer: torch.optim.Optimizer, *, ema: Copies = None) -> None:
        super().advance(optimizer)
        if self.phase == "stabilize" and self._zeroed() != self._held_layers:
            self._zero_layers(optimizer)

    def _zeroed(self) -> int:
        """Of how many layers, in their order, what is cut is zero by now."""
        every = self.options.zero_out_interval
        if not every or self.phase != "stabilize":
            return 0
        return min((self.steps - 1 - self.stable_since) // every, len(self._order))

    def _zero_layers(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._held_layers = self._zeroed()
        keep: dict[Tensor, Tensor] = {}
        for name in self._growing:
            if min(self._order[conv] for conv in self.groups[name].convs) >= self._held_layers:
                continue
            group = self.groups[name]
            for tensor, dim in {*super()._regularised(group), *self._regularised(group)}:
                p, index = self.model.get_parameter(tensor), group.index[tensor, dim]
                stays = torch.ones(p.shape[dim], dtype=torch.bool)
                stays[index.position] = self._chosen[name][index.channel]
                stays = stays.to(p.device).view([-1 if d == dim else 1 for d in range(p.dim())])
                keep[p] = keep[p] & stays if p in keep else stays
        self.hold(keep, optimizer)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._find_rows()
        self._start = {self.model.get_parameter(name): t.clone() for name, t in state["start"].items()}
        self._held_layers = 0
        if self._zeroed():
            self._zero_layers(None)

    def state_dict(self) -> dict[str, Any]:
        names = {p: name for name, p in self.model.named_parameters()}
        return super().state_dict() | {"start": {names[w]: t.clone() for w, t in self._start.items()}}


@dataclass(frozen=True)
class OrthogonalOptions(MagnitudeOptions):
    weight: float = 0.1  # of the penalty


class _OrthogonalMethod(MagnitudeMethod):
    Options = OrthogonalOptions
    form = ""

    def prepare(self) -> None:
        super().prepare()
        if self.form == "conv":
            _check_two_dimensional(self.name, self.model)
        found = map(self.model.get_submodule, layers(self.model))
        self._strides = {m.weight: getattr(m, "stride", (1,))[0] for m in found}

    def penalty(self) -> Tensor:
        """``weight`` times the distance of all layers from orthogonal ones."""
        trained = [w for w in self._strides if w.requires_grad]
        if not trained or not self.options.weight:
            return Method.penalty(self)
        strides, paddings = [], []
        if self.form == "conv":  # as the layer itself moves, with the paper's padding
            strides = [self._strides[w] for w in trained]
            kernels = [w.shape[2:] if w.dim() == 4 else (1, 1) for w in trained]
            paddings = [(k - 1) // s * s for s, kernel in zip(strides, kernels, strict=True) for k in kernel]
        return penalty_of(*_orthogonality(trained, self.form, (), strides, paddings), self.options.weight)


@register("orth-kernel")
class OrthKernel(_OrthogonalMethod):
    """Kernel orthogonality: filters orthogonal to one another."""

    form = "rows"


@register("orth-conv")
class OrthConv(_OrthogonalMethod):
    """Convolutional orthogonality: also to one another's shifts."""

    form = "conv"


def _check_two_dimensional(who: str, model: nn.Module) -> None:
    for name in layers(model):
        shape = tuple(model.get_submodule(name).weight.shape)
        if len(shape) not in (2, 4):
            raise ValueError(f"{who}: conv(W, W) is for 2-D convolutions and linear layers; {name} has {shape}")


Term = tuple[Tensor, list[Tensor], list[Tensor]]  # value, weights, gradients


@torch.no_grad()
def _gram(weights: list[nn.Parameter], plan: GramPlan, cut: float, kept: float) -> Term:
    value, grads = value_and_grad(weights, plan, cut, kept, None, _backend(weights, "rows"))
    return value, weights, grads


@torch.no_grad()
def _orthogonality(
    weights: list[nn.Parameter],
    kind: str,
    references: Sequence[Tensor] = (),
    strides: Sequence[int] = (),
    paddings: Sequence[int] = (),
) -> Term:
    backend = _backend([*weights, *references], kind)
    value, grads = orthogonality_value_and_grad(weights, kind, references, strides, paddings, kind == "conv", backend)
    return value, weights, grads


def _backend(tensors: Sequence[Tensor], kind: str) -> str:
    return backends.select("gram_penalty", None, tensors[0], tuple(tensors), kind)
