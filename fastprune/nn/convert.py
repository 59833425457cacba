"""Turn the batch norms of a model into ours, in place."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastprune.nn import fuse as fusing
from fastprune.nn.batch_norm import BatchNormAct2d, SigmoidBatchNorm2d, SyncBatchNormAct2d
from fastprune.nn.fuse import Trace

# Where a scale cannot be moved elsewhere it is clamped to here.  At the upper end sigmoid must keep some slope, or the
# channel could never learn to shrink; the lower end is as good as zero, which is what such a scale says.
CLAMP = (1e-6, 0.999)


def convert_batchnorm(model: nn.Module, bound: str | None = None, fuse: bool = True) -> nn.Module:
    """Swap every ``nn.BatchNorm2d`` for ours and fold the residual adds and ReLUs that follow into them.

    Everything is done to the modules where they are: the same module and parameter objects, names, ``state_dict``
    keys, hooks, modes, devices.  An existing optimizer stays valid (with ``bound``, make it afterwards: the values of
    parameters change).  Subclasses that compute something of their own are left alone and named in a warning;
    ``nn.SyncBatchNorm`` too, see :func:`convert_sync_batchnorm`.

    **bound="sigmoid"** makes each norm a :class:`SigmoidBatchNorm2d`; norms that are bounded already stay.

    - A trained norm keeps its function: weight = logit(scale); the shift stays where it is not zero throughout, else
      ``bias`` becomes None.
    - A scale that sigmoid cannot reach is moved out where that is exact: the sign of a negative one into the
      convolution before, a power of two out of one of 1 or more into the convolutions or linear layers behind.  What
      cannot be moved (a residual add in between, say) is clamped to [1e-6, 0.999], which changes the function.  One
      warning names the layers and what was done.
    - A fresh norm (no batch seen, running statistics, shift and scale as initialised) starts as a
      :class:`SigmoidBatchNorm2d` does, weight ~ N(0, 1) and no shift: logit(1) is out of reach and nothing is lost.
    - ``affine=False`` has no weight to bound: the norm stays unbounded, named in the warning.

    **fuse** rewrites the forward of the modules that own norms, each on its own, where torch.fx can trace it: a norm
    followed by a ReLU (``nn.ReLU``, ``F.relu``, ``x.relu_()``, ...), by a residual add, or by both becomes one call.
    Such a module keeps its name and class (``isinstance``; its type is a subclass of it) and runs its original forward
    whenever the trace does not hold: attributes that forward reads were changed, children added or removed, the ReLU
    replaced, hooks put on the norm's or the ReLU's output.  A forward that cannot be traced faithfully (it decides on
    tensors or on ``self.training``, draws random numbers, uses checkpointing, ...) is left as it is; one warning names
    the modules and the reason.  :func:`unfuse` undoes it.

    Args:
        model: Any module; may itself be a norm.
        bound: ``"sigmoid"``, or None to leave scales as they are.
        fuse: Fold adds and ReLUs.

    Returns: ``model``, the same object.

    Raises:
        ValueError: ``bound`` is neither "sigmoid" nor None.

    Source: sigmoid-bounded scales, Suteu and Guo, 2022, arXiv:2204.06404.
    """
    if bound not in (None, "sigmoid"):
        raise ValueError(f"convert_batchnorm: bound must be 'sigmoid' or None, got {bound!r}")
    fusing.unfuse(model)
    left = _swap(model, BatchNormAct2d)
    if left:
        _warn(f"left alone, a batch norm of its own kind: {_listed(left)}")
    if bound or fuse:
        traces, reasons = fusing.trace_forwards(model)
        if bound and (done := _bind(model, traces)):
            _warn(f"scales outside (0, 1): {_listed(done, '; ')}")
        if fuse:
            fusing.fuse(traces)
            if untraced := _untraced(model, reasons):
                _warn(f"not fused, torch.fx cannot trace the forward of {_listed(untraced)}")
    return model


def convert_sync_batchnorm(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Make every ``nn.BatchNorm2d``, plain or ours, a :class:`SyncBatchNormAct2d` over ``process_group``, in place.

    Bound, shift, act, ``gate_grad`` and what :func:`convert_batchnorm` folded stay.  PyTorch's own conversion makes
    ``nn.SyncBatchNorm`` of any subclass, and so would drop the bound without a word.

    Returns: ``model``, the same object.
    """
    left = _swap(model, SyncBatchNormAct2d)
    if left:
        _warn(f"left alone, a batch norm of its own kind: {_listed(left)}", "convert_sync_batchnorm")
    for module in model.modules():
        if isinstance(module, SyncBatchNormAct2d):
            module.process_group = process_group
    return model


def convert_plain(module: nn.Module) -> bool:
    """Make one ``nn.BatchNorm2d`` ours, in place, with nothing folded; whether it is ours now."""
    if _is_plain(module):
        module.__class__ = BatchNormAct2d
    return isinstance(module, BatchNormAct2d)


def _swap(model: nn.Module, cls: type[BatchNormAct2d]) -> list[str]:
    """Make all norms of ``model`` instances of ``cls``; the names of those left alone."""
    left = []
    for name, module in model.named_modules():
        if isinstance(module, cls):
            continue
        if type(module) in (BatchNormAct2d, SigmoidBatchNorm2d):
            bound = module.bound
            module.__class__ = cls
            module.bound = bound  # SigmoidBatchNorm2d has it on the class
        elif _is_plain(module):
            module.__class__ = cls
        elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm | nn.LazyBatchNorm2d):
            left.append(f"{name or 'model'} ({type(module).__name__})")
    return left


def _is_plain(module: nn.Module) -> bool:
    """nn.BatchNorm2d or a subclass that computes and stores the same, e.g. one with other defaults."""
    same = ("forward", "__call__", "_check_input_dim", "_load_from_state_dict", "_save_to_state_dict", "__getattr__")
    cls = type(module)
    return (
        isinstance(module, nn.BatchNorm2d)
        and all(getattr(cls, name) is getattr(nn.BatchNorm2d, name) for name in same)
        and not any(name in cls.__dict__ for name in ("weight", "bias"))  # torch.nn.utils.parametrize
        and "weight" in module._parameters  # not torch.nn.utils.prune's
        and "forward" not in vars(module)
    )


# --- sigmoid bound -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _bind(model: nn.Module, traces: dict[nn.Module, Trace]) -> list[str]:
    """Bound all norms; what had to be done to scales that are out of reach."""
    surroundings = _Surroundings(model, traces)
    done = []
    for name, norm in model.named_modules():
        if not isinstance(norm, BatchNormAct2d) or norm.bound:
            continue
        name = name or "model"
        if norm.weight is None:
            done.append(f"{name} stays unbounded (affine=False)")
            continue
        if _is_fresh(norm):
            nn.init.normal_(norm.weight)
            norm.bias = None
        else:
            done += [f"{name} {what}" for what in _bound_scale(norm, surroundings)]
            if norm.bias is not None and not norm.bias.any():
                norm.bias = None
        if type(norm) is BatchNormAct2d:
            norm.__class__ = SigmoidBatchNorm2d
        norm.bound = "sigmoid"
    return done


def _is_fresh(norm: BatchNormAct2d) -> bool:
    """As nn.BatchNorm2d is initialised, whatever the constant scale."""
    if norm.num_batches_tracked is None or norm.num_batches_tracked != 0:
        return False
    constants = [(norm.running_mean, 0), (norm.running_var, 1), (norm.weight, norm.weight[:1]), (norm.bias, 0)]
    return all(t is None or bool((t == value).all()) for t, value in constants)


def _bound_scale(norm: BatchNormAct2d, surroundings: _Surroundings) -> Iterator[str]:
    """Set ``weight`` to the logit of the scale, moving what is out of (0, 1) elsewhere; say what was done."""
    scale = norm.weight.double()
    of = f"of {len(scale)}"
    negative = scale < 0
    if negative.any() and (conv := surroundings.convolution_before(norm)):
        module, path = conv
        for t in (module.weight, module.bias, norm.running_mean, scale):
            if t is not None:
                t[negative] = -t[negative]
        yield f"({int(negative.sum())} {of} negative: sign moved into {path})"
    large = scale >= 1
    if large.any() and (layers := surroundings.layers_behind(norm)):
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1): powers of two move without rounding
        factor = torch.where(large, torch.exp2(exponent.double()), 1.0)
        scale = torch.where(large, mantissa, scale)
        if norm.bias is not None:
            norm.bias.div_(factor)
        for module, _ in layers:
            _scale_inputs(module, factor)
        yield f"({int(large.sum())} {of} >= 1: a power of two moved into {', '.join(path for _, path in layers)})"
    out = (scale <= 0) | (scale >= 1)
    if out.any():
        yield f"({int(out.sum())} {of} clamped to [{CLAMP[0]:g}, {CLAMP[1]:g}]: the function changes)"
    norm.weight.copy_(torch.where(out, scale.clamp(*CLAMP), scale).logit())


def _scale_inputs(module: nn.Conv2d | nn.Linear, factor: Tensor) -> None:
    """Multiply the weights that meet input channel c by ``factor[c]``."""
    weight = module.weight
    if isinstance(module, nn.Linear):  # C channels flattened to C * S features
        weight.view(len(weight), len(factor), -1).mul_(factor.to(weight.dtype).view(1, -1, 1))
    else:
        rows = factor.to(weight.dtype).view(module.groups, 1, -1, 1, 1)
        weight.copy_((weight.view(module.groups, -1, *weight.shape[1:]) * rows).view_as(weight))


# f(k x) = k f(x) for k > 0, channel by channel
_HOMOGENEOUS_MODULES = (
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
)
_HOMOGENEOUS_FUNCTIONS = fusing.RELU_FUNCTIONS | {
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d,
    F.dropout,
}


class _Surroundings:
    """Which convolution makes a norm's input, and which layers take its output: only what the traces prove."""

    def __init__(self, model: nn.Module, traces: dict[nn.Module, Trace]) -> None:
        self.traces = traces
        self.sites: dict[nn.Module, list[tuple[Trace, fx.Node]]] = {}
        for trace in traces.values():
            for node, module in trace.calls():
                self.sites.setdefault(module, []).append((trace, node))
        self.names = {module: name for name, module in model.named_modules()}
        owners = {m: m for m in model.modules()}
        self.uses = Counter(id(p) for m in owners for p in m._parameters.values() if p is not None)

    def _only_site(self, module: nn.Module) -> tuple[Trace, fx.Node] | None:
        sites = self.sites.get(module, [])
        return sites[0] if len(sites) == 1 else None

    def _own_weights(self, module: nn.Module) -> bool:
        """Called once, with parameters that are plain and no other module's."""
        p = module._parameters
        return (
            self._only_site(module) is not None
            and "weight" in p
            and all(self.uses[id(t)] == 1 for t in p.values() if t is not None)
        )

    def convolution_before(self, norm: BatchNormAct2d) -> tuple[nn.Conv2d, str] | None:
        site = self._only_site(norm)
        source = site[1].args[0] if site and site[1].args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            return None
        conv = site[0].modules[source.target]
        return (conv, self.names[conv]) if type(conv) is nn.Conv2d and self._own_weights(conv) else None

    def layers_behind(self, norm: BatchNormAct2d) -> list[tuple[nn.Module, str]] | None:
        site = self._only_site(norm)
        layers: dict[nn.Module, None] = {}
        if site is None or not self._reach(*site, False, layers):
            return None
        return [(m, self.names[m]) for m in layers]

    def _reach(self, trace: Trace, node: fx.Node, flat: bool, layers: dict[nn.Module, None]) -> bool:
        """Collect the layers that take ``node``; False if anything else does, or something in between is not linear."""
        return bool(node.users) and all(self._through(trace, node, user, flat, layers) for user in node.users)

    def _through(self, trace: Trace, node: fx.Node, user: fx.Node, flat: bool, layers: dict[nn.Module, None]) -> bool:
        if user.op == "output":  # go on behind the call of this module
            site = self._only_site(trace.module)
            return user.args[0] is node and site is not None and self._reach(*site, flat, layers)
        if user.all_input_nodes != [node] or user.args[:1] != (node,):
            return False
        if user.op == "call_module":
            module = trace.modules[user.target]
            if type(module) in _HOMOGENEOUS_MODULES:
                return self._reach(trace, user, flat, layers)
            if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
                return self._reach(trace, user, True, layers)
            if type(module) is (nn.Linear if flat else nn.Conv2d) and self._own_weights(module):
                layers[module] = None
                return True
            inner = self.traces.get(module)
            if inner is None or self._only_site(module) is None or len(user.args) != 1 or user.kwargs:
                return False
            entry = next(n for n in inner.graph.nodes if n.op == "placeholder")
            return self._reach(inner, entry, flat, layers)
        flatten = user.target in (torch.flatten, "flatten") and (*user.args[1:], *user.kwargs.values()) == (1,)
        if flatten or user.target in fusing.RELU_METHODS or user.target in _HOMOGENEOUS_FUNCTIONS:
            return self._reach(trace, user, flat or flatten, layers)
        return False


# --- words -------------------------------------------------------------------------------------------------------


def _untraced(model: nn.Module, reasons: dict[nn.Module, str]) -> list[str]:
    """The modules whose own forward calls norms, with the reason; the others had nothing to fold."""
    return [
        f"{name or 'model'} ({type(module).__name__}: {reasons[module]})"
        for name, module in model.named_modules()
        if module in reasons and any(isinstance(m, BatchNormAct2d) for m in _own_children(module))
    ]


def _own_children(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _own_children(child)
        else:
            yield child


def _listed(items: Iterable[str], separator: str = ", ", most: int = 8) -> str:
    items = list(items)
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join(items[:most] + more)


def _warn(text: str, function: str = "convert_batchnorm") -> None:
    warnings.warn(f"{function}: {text}", stacklevel=3)
