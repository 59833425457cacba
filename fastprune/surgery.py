"""Cutting channels out of a model's tensors, and comparing the cut model with the masked one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from fastprune.errors import GraphError
from fastprune.nn import MaskedConv2d, SyncBatchNormAct2d
from fastprune.optim import GrowingSGD

TOLERANCE = 1e-9  # of the largest output, in float64: a different order of summation stays far below
COARSE = 1e-4  # the same where a model's code insists on float32
# tensor name -> dim -> indices that stay; name of an integer in a module -> NUMBER -> indices, as many as it will be
Plan = dict[str, dict[int, Tensor]]
NUMBER = -1
# integers of PyTorch's layers that follow from their tensors, and do so here
SIZED = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)
SIZES = frozenset(
    "in_channels out_channels groups in_features out_features num_embeddings embedding_dim num_features num_groups "
    "num_channels num_parameters".split()
)
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
Copies = nn.Module | Sequence[nn.Module] | None


class Difference(NamedTuple):
    """How far apart two models are: relative to the largest value, where first (a module's name), and in words."""

    gap: float
    module: str = ""
    what: str = ""


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Run ``model`` on ``example_inputs``: a tensor, a tuple or list of positional, or a dict of keyword arguments."""
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def leaves(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclasses, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = list(vars(value).values())
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in leaves(v)]
    return []


def map_tensors(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Rebuild nested tuples, lists and dicts with ``fn`` applied to the tensors."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, dict):
        return {k: map_tensors(fn, v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_tensors(fn, v) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def check_plain(model: nn.Module, who: str) -> None:
    """Refuse wrappers whose inside cannot be seen, or keeps sizes of its own.

    Raises:
        ValueError: It is no module, or it or a part of it is compiled, distributed, on the meta device or not yet
            initialised.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"{who}: expected an nn.Module, got {type(model).__name__}")
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    for name, m in model.named_modules():
        part = f"its part {name!r}" if name else "it"
        if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None:
            raise ValueError(f"{who}: expected an eager module, but {part} was compiled; {who} before compiling")
        if isinstance(m, wrappers) or type(m).__name__ == "FullyShardedDataParallel":
            kind = type(m).__name__
            raise ValueError(
                f"{who}: expected the module itself, but {part} is a {kind}, which keeps buckets of the old sizes; "
                "pass its .module, and wrap what comes out anew"
            )
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(t):
            raise ValueError(f"{who}: the model has lazy parameters; run it once on example_inputs first")
        if t.is_meta:
            raise ValueError(f"{who}: {name} is on the meta device, without values; load the weights first")
        if is_traceable_wrapper_subclass(t):
            raise ValueError(
                f"{who}: {name} is a {type(t).__name__}; expected plain tensors: shard or quantise afterwards"
            )
        if t.is_inference():
            raise ValueError(f"{who}: {name} was made under torch.inference_mode and can never change; make it outside")


def shrink(model: nn.Module, plan: Plan, optimizer: Optimizers = None, ema: Copies = None) -> None:
    """Cut a model, optimizers' state and copies of the model down to ``plan``: prepare everything, then swap it in.

    Raises:
        ValueError: An optimizer has a state that cannot be cut or none of the model's parameters, ``ema`` is no copy of
            the model, or two of its tensors share memory and would be cut differently.  Nothing was changed then, nor
            if anything else is raised.
    """
    with torch.inference_mode(False), torch.no_grad():  # else the new parameters could never be trained
        _shrink(model, plan, _listed(optimizer), _listed(ema))


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (tuple, list)) else [value]


def _shrink(model: nn.Module, plan: Plan, optimizers: list[torch.optim.Optimizer], ema: list[nn.Module]) -> None:
    tensors = named_tensors(model)
    copies = {id(m): m for m in [model, *(m for e in ema for m in _copies_of_model(tensors, e))]}
    owned = {id(p) for p in model.parameters()}
    for optimizer in optimizers:
        _check_optimizer(optimizer, owned)
    numbers = {name: len(dims[NUMBER]) for name, dims in plan.items() if NUMBER in dims}
    whole, plan = plan, {name: dims for name, dims in plan.items() if NUMBER not in dims}
    swaps: list[tuple[Tensor, Tensor, Tensor | None]] = []  # a tensor, what becomes of it, and of its gradient
    dims_of: dict[int, dict[int, Tensor]] = {}
    for m in copies.values():
        mine = {name: t for name, t in named_tensors(m).items() if name in tensors}
        _check_aliases(mine, plan)
        cut: dict[Any, Tensor] = {}  # tensors that were one memory stay one
        for name, dims in plan.items():
            t = mine[name]
            memory = t.data_ptr(), t.dtype, t.shape, t.stride()
            if memory not in cut:
                cut[memory] = _select(t.data, dims)
            grad = t.grad if t.is_leaf else None
            swaps.append((t, cut[memory], None if grad is None else _select(grad, dims)))
            dims_of[id(t)] = dims
    entries: list[tuple[dict, Any, Any]] = []  # of the optimizers: a dict, its key, the new value
    for optimizer in optimizers:
        for name, dims in plan.items():
            entries += _cut_state(name, tensors[name], optimizer, dims)
    shapes = {name: tuple(tensors[name].shape) for name in plan} | {name: (number(model, name),) for name in numbers}
    with ExitStack() as undo:  # last in, first out
        for t, new, grad in swaps:
            undo.callback(_replace, t, t.data, t.grad if t.is_leaf else None)
            _replace(t, new, grad)
        for of, key, value in entries:
            undo.callback(of.__setitem__, key, of[key])
            of[key] = value
        touched = [m for copy in copies.values() for m in copy.modules() if any(id(t) in dims_of for t in _own(m))]
        touched += [copy.get_submodule(name.rpartition(".")[0]) for copy in copies.values() for name in numbers]
        for m in dict.fromkeys(touched):
            undo.callback(_put_back, m, {k: dict(v) if k in ("_buffers", "_kept") else v for k, v in vars(m).items()})
            if any(id(t) in dims_of for t in _own(m)):
                _resize(m, dims_of)
        for m in copies.values():
            for name, value in numbers.items():
                owner = m.get_submodule(name.rpartition(".")[0])
                width = owner.num_channels // owner.num_groups if isinstance(owner, nn.GroupNorm) else 0
                _set_number(m, name, value)
                if width:  # a group norm without parameters
                    owner.num_channels = owner.num_groups * width
            for name, dims in whole.items():
                record_keep(m, name, shapes[name], dims)
        undo.pop_all()


def _put_back(m: nn.Module, attributes: dict[str, Any]) -> None:
    vars(m).clear()
    vars(m).update(attributes)


def _replace(t: Tensor, data: Tensor, grad: Tensor | None) -> None:
    if t.is_leaf:
        t.grad = None  # a gradient of another shape would refuse the new data
    # A loss still alive keeps the parameter's gradient accumulator, which remembers the old shape.  PyTorch drops
    # it when the dtype changes, not when the shape does.
    t.data = t.data.new_empty(0, dtype=torch.float16 if t.dtype == torch.float64 else torch.float64)
    t.data = data
    if grad is not None:
        t.grad = grad


def number(model: nn.Module, name: str) -> int | None:
    """The integer called ``name`` (see :class:`fastprune.labels.Row`) in a module; None if there is none."""
    owner, attribute, entry = _find(model, name)
    value = None if owner is None else vars(owner).get(attribute)
    if entry is not None:
        value = value[entry] if type(value) in (list, tuple) and entry < len(value) else None
    return value if type(value) is int else None


def _set_number(model: nn.Module, name: str, value: int) -> None:
    owner, attribute, entry = _find(model, name)
    if entry is not None:
        old = getattr(owner, attribute)
        value = type(old)([*old[:entry], value, *old[entry + 1 :]])
    setattr(owner, attribute, value)


def _find(model: nn.Module, name: str) -> tuple[nn.Module | None, str, int | None]:
    """ "blocks.1.splits[0]" to the module, the attribute's name and the entry, if it is one of a list."""
    path, _, attribute = name.rpartition(".")
    attribute, _, entry = attribute.rstrip("]").partition("[")
    m: nn.Module | None = model
    for part in path.split(".") if path else ():
        m = None if m is None else m._modules.get(part)  # no getattr: names may come from a file
    return m, attribute, int(entry) if entry.isdecimal() and len(entry) < 10 else None


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each object once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _copies_of_model(tensors: dict[str, Tensor], ema: Any) -> list[nn.Module]:
    """The modules inside ``ema`` (or itself) with the names and shapes of the model.

    Raises:
        ValueError: There is none, or it is the model.
    """
    if not isinstance(ema, nn.Module):
        raise ValueError(
            f"compact: expected ema to be a module with a copy of the model in it, such as torch.optim.swa_utils."
            f"AveragedModel, got {type(ema).__name__}"
        )
    wrong, found = "", {}
    for path, m in ema.named_modules():
        if any(f"{path}.".startswith(f"{inside}." if inside else "") for inside in found):
            continue  # a part of a copy
        mine = named_tensors(m)
        differ = (name for name, t in tensors.items() if name not in mine or mine[name].shape != t.shape)
        if (name := next(differ, None)) is None:
            check_plain(m, "compact: ema")
            if any(t.numel() and mine[name].data_ptr() == t.data_ptr() for name, t in tensors.items()):
                raise ValueError(
                    "compact: ema shares its parameters with the model; pass a copy of the model, or nothing"
                )
            found[path] = m
        elif not wrong or path == "module":
            got = f"one of {tuple(mine[name].shape)}" if name in mine else "no such tensor"
            wrong = f"{name} of shape {tuple(tensors[name].shape)} in {type(m).__name__}, got {got}"
    if not found:
        raise ValueError(f"compact: ema holds no copy of the model: expected {wrong}")
    return list(found.values())


def _check_optimizer(optimizer: Any, owned: set[int]) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"compact: expected a torch.optim.Optimizer or several, got {type(optimizer).__name__}")
    for kind, why in _REFUSED.items():
        if isinstance(optimizer, kind):
            raise ValueError(
                f"compact: the state of {type(optimizer).__name__} cannot be cut: {why}; "
                "compact without the optimizer and create it anew"
            )
    if not any(id(p) in owned for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"compact: none of the parameters of this {type(optimizer).__name__} is the model's; "
            "pass the optimizer that was made with model.parameters()"
        )


_REFUSED = {
    torch.optim.LBFGS: "it keeps the history of all parameters in one vector",
    torch.optim.Adafactor: "it keeps means over rows and columns, and its step depends on the whole tensor",
}


def _check_aliases(tensors: dict[str, Tensor], plan: Plan) -> None:
    """Refuse tensors that share memory, unless it is all of it and they are cut alike.

    Raises:
        ValueError: Two overlap, and one of them would be cut otherwise than the other.
    """
    spans = []  # per tensor: the first byte, and the one behind the last it can reach
    for name, t in tensors.items():
        if t.numel() and t.layout == torch.strided:
            reach = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            spans.append((t.data_ptr(), t.data_ptr() + reach * t.element_size(), name))
    end, other = 0, ""
    for start, stop, name in sorted(spans):
        if start < end and (name in plan or other in plan):
            a, b = tensors[other], tensors[name]
            dims, its = plan.get(name, {}), plan.get(other, {})
            alike = (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())
            if not alike or dims.keys() != its.keys() or not all(torch.equal(dims[d], its[d]) for d in dims):
                raise ValueError(f"compact: {other} and {name} share memory and would be cut differently; clone one")
        if stop > end:
            end, other = stop, name


def record_keep(model: nn.Module, name: str, shape: Sequence[int], dims: Mapping[int, Tensor]) -> None:
    """Note that a tensor or a number has been cut, for :func:`keep_lists`.  Cuts of the same one are composed.

    The note is plain data on the module that owns the tensor, so it follows the module through ``deepcopy``,
    ``torch.save`` and into other models, and goes with it when another module takes its place.

    Args:
        model: Has the tensor, in its new size or still in the old one.
        name: Of a parameter or buffer, or of an integer in a module.
        shape: Before this cut; of an integer, itself.
        dims: Dimension to the indices that stay, int64, ascending; dimensions that stay whole are left out.
    """
    path, _, leaf = name.rpartition(".")
    notes = vars(model.get_submodule(path)).setdefault("_kept", {})
    first, before = notes.get(leaf, (tuple(shape), {}))
    after = {dim: before[dim][stays.cpu()] if dim in before else stays.cpu() for dim, stays in dims.items()}
    notes[leaf] = first, {**before, **after}


def keep_lists(model: nn.Module) -> Plan:
    """What is left of each parameter, buffer and integer in a module that was ever cut.

    Returns: Tensor name to dimension to the indices that stay, int64, ascending, on the CPU, into that dimension as it
        was before the first cut (see :func:`first_shapes`).  Tensors and dimensions that are whole are not in it.
    """
    return {name: dict(dims) for name, (_, dims) in _notes(model)}


def first_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape before the first cut of each tensor in :func:`keep_lists`, and ``(value,)`` of each integer."""
    return {name: shape for name, (shape, _) in _notes(model)}


def _notes(model: nn.Module) -> Iterator[tuple[str, tuple[tuple[int, ...], dict[int, Tensor]]]]:
    for path, m in model.named_modules():
        for leaf, note in vars(m).get("_kept", {}).items():
            yield f"{path}.{leaf}" if path else leaf, note


def _select(t: Tensor, dims: dict[int, Tensor]) -> Tensor:
    """The kept indices of ``t``, with its memory format."""
    for dim, stays in dims.items():
        t = _select_one(t, dim, stays.to(t.device))
    return t


def _select_one(t: Tensor, dim: int, stays: Tensor) -> Tensor:
    layout = sorted(range(t.dim()), key=lambda d: -t.stride(d))  # stable: a contiguous 1x1 kernel stays contiguous
    shape = [len(stays) if d == dim else n for d, n in enumerate(t.shape)]
    out = torch.empty_permuted(shape, layout, dtype=t.dtype, device=t.device)
    return torch.index_select(t, dim, stays, out=out)


def _cut_state(
    name: str, p: Tensor, optimizer: torch.optim.Optimizer, dims: dict[int, Tensor]
) -> list[tuple[dict, Any, Any]]:
    """What an optimizer keeps for one parameter, cut like it: a dict, its key, and the new value.

    Raises:
        ValueError: An entry is neither a number nor of the parameter's shape (factored or flattened second moments).
    """
    new: list[tuple[dict, Any, Any]] = []
    entries = optimizer.state[p] if p in optimizer.state else {}
    for key, v in entries.items():
        if isinstance(v, Tensor) and v.shape == p.shape:
            new.append((entries, key, _select(v, dims)))
        elif leaves(v) and not (isinstance(v, Tensor) and v.numel() == 1):
            raise ValueError(
                f"compact: expected optimizer state {key!r} of {name} to have the parameter's shape {tuple(p.shape)}, "
                f"got {[tuple(t.shape) for t in leaves(v)]}; compact without the optimizer and create it anew"
            )
    for of in (optimizer._reg, optimizer._keep) if isinstance(optimizer, GrowingSGD) else ():
        if id(p) in of:
            part = of[id(p)][1]
            along = {dim: stays for dim, stays in dims.items() if part.shape[dim] > 1}
            new.append((of, id(p), (p, _select(part, along))))
    return new


def _own(m: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module itself, and those that PyTorch's parametrizations compute them from."""
    inside = m.parametrizations.modules() if is_parametrized(m) else ()
    return [t for of in (m, *inside) for t in (*of._parameters.values(), *of._buffers.values()) if t is not None]


def _weight(m: nn.Module) -> Tensor:
    """A layer's weight, or what it is computed from (weight norm, spectral norm, the masks of PyTorch's prune)."""
    weight = m._parameters.get("weight")
    return max(_own(m), key=lambda t: (t.dim(), t.numel())) if weight is None else weight


def _resize(m: nn.Module, dims_of: dict[int, dict[int, Tensor]]) -> None:
    """Set the size attributes of PyTorch's layers from their tensors, which were just cut: id -> dim -> what stayed."""
    if isinstance(m, nn.modules.conv._ConvNd):
        weight = _weight(m)
        rows, columns = weight.shape[:2]
        before = m.in_channels if m.transposed else m.out_channels  # rows, until now
        stays = dims_of.get(id(weight), {}).get(0)
        if stays is not None and m.groups > 1:  # the graph removes whole groups, or none and as much of each
            m.groups = len(torch.unique(stays // (before // m.groups)))
        if m.transposed:
            m.in_channels, m.out_channels = rows, columns * m.groups
        else:
            m.in_channels, m.out_channels = columns * m.groups, rows
        if isinstance(m, MaskedConv2d):
            m._look_up()
    elif isinstance(m, nn.Linear):
        m.out_features, m.in_features = _weight(m).shape
    elif isinstance(m, nn.Embedding):
        m.num_embeddings, m.embedding_dim = _weight(m).shape
    elif isinstance(m, nn.modules.batchnorm._NormBase):
        m.num_features = len(m.running_mean if m.running_mean is not None else m.weight)
    elif isinstance(m, nn.GroupNorm):  # the graph removes whole groups
        m.num_groups, m.num_channels = m.num_groups * len(m.weight) // m.num_channels, len(m.weight)
    elif isinstance(m, nn.PReLU):
        m.num_parameters = len(m.weight)


def compare(
    model: nn.Module,
    plan: Plan,
    mask: Callable[[nn.Module], None],
    example_inputs: Any,
    *,
    training: bool = False,
    seed: int = 0,
) -> Difference:
    """Mask one float64 copy of a model, shrink another, and run both in eval mode.

    Every convolution, linear layer and norm is compared, not only the model's output: through many layers an early
    difference can fade below any tolerance.  So that nothing is zero, saturated or alike by chance, whatever the state
    of training, affine parameters, biases and all-zero weights of the copies are stirred, shifts are kept within one
    scale, running statistics are set to about those of the inputs, and inputs without any contrast get some.

    A model whose code insists on float32 is compared in float32 where it does so, and then by float32's rounding.

    Args:
        model: Not touched.
        plan: What the shrunk copy keeps.
        mask: Zeroes in a copy what ``plan`` removes.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments.
        training: Run the shrunk copy in training mode, too, where other branches may run.  Outputs are compared
            there, to a coarse tolerance, unless the model draws random numbers besides those of dropout layers.
        seed: Of all random numbers.

    Returns: How far the shrunk copy is from the masked one; a gap is infinite if it does not run.

    Raises:
        GraphError: No copy can be made, it runs neither in float64 nor in float32, or its output is not finite.
    """
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=sorted(devices)))
        stack.enter_context(SyncBatchNormAct2d.each_alone())
        masked, inputs = _stirred(model, example_inputs, seed)
        for m in masked.modules():
            if isinstance(m, nn.modules.dropout._DropoutNd):
                m.p = 0.0  # so that training draws no numbers, if nothing else does
        shrunk = copy.deepcopy(masked)
        shrink(shrunk, plan)
        mask(masked)
        # of the masked model: layer, number of samples, and what the shrunk one has too, of two of them
        layers: list[tuple[str, int, Tensor]] = []
        dims_of = {id(t): plan[name] for name, t in named_tensors(masked).items() if name in plan}

        def note(name: str, m: nn.Module, out: Tensor) -> None:
            kept = _first(_kept_outputs(m, out, dims_of))
            layers.append((name, len(out), kept.clone()))  # an in-place activation may follow

        torch.manual_seed(seed)
        with _Precision() as precision, _watched(masked, note):
            expected = leaves(call(masked, inputs))
        trained = _trained(masked, inputs, devices, seed) if training else None
        del masked
        if not all(t.isfinite().all() for t in expected if t.is_floating_point()):
            raise GraphError("the model's output is not finite on example_inputs, so a proof would say nothing")
        tolerance = TOLERANCE if precision.lowest == torch.float64 else COARSE
        gaps: list[tuple[float, str]] = []
        theirs = iter(layers)

        def compare_layer(name: str, m: nn.Module, out: Tensor) -> None:
            other, samples, b = next(theirs, ("", 0, out))
            a = _first(out)
            # else channels lie along another axis, too, and others will tell
            if other == name and samples == len(out) and a.shape == b.shape:
                gaps.append((distance([a], [b]), name))

        running: list[str] = []
        try:
            torch.manual_seed(seed)
            with _watched(shrunk, compare_layer, running):
                got = leaves(call(shrunk, inputs))
            gaps.append((distance(got, expected), ""))
            if first := next(((gap, name) for gap, name in gaps if gap > tolerance), None):
                return Difference(
                    *first, f"{_differs(first[1])} (relative difference {first[0]:.1e}{precision.words()})"
                )
            if training:
                torch.manual_seed(seed)
                with _watched(shrunk.train(), lambda *_: None, running):
                    got = leaves(call(shrunk, inputs))
                if trained is not None and not (gap := distance(got, trained)) <= COARSE:
                    return Difference(gap, "", f"{_differs('')} in training mode (relative difference {gap:.1e})")
        except Exception as e:
            where = running[-1] if running else ""
            mode = " in training mode" if shrunk.training else ""
            return Difference(float("inf"), where, f"{_differs(where)}{mode}: {type(e).__name__}: {e}")
    return Difference(max(gap for gap, _ in gaps))


def _trained(model: nn.Module, inputs: Any, devices: Set[int], seed: int) -> list[Tensor] | None:
    """What a model returns in training mode; None if that tells nothing.

    So it is if it draws random numbers, for a smaller one draws others, or does not compute in float64.
    """

    def drawn() -> list[bytes]:
        python, numpy = repr(random.getstate()).encode(), np.random.get_state(legacy=False)["state"]
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in sorted(devices))]
        return [python, numpy["key"].tobytes(), bytes([numpy["pos"] % 256]), *(s.numpy().tobytes() for s in states)]

    torch.manual_seed(seed)
    before = drawn()
    try:
        with _Precision() as precision:
            out = leaves(call(model.train(), inputs))
    except Exception:  # of the masked model, and so of the model: nothing to compare by
        return None
    finite = all(t.isfinite().all() for t in out if t.is_floating_point())
    # in float32, norms over few values of a batch blow rounding up
    return out if finite and drawn() == before and precision.lowest == torch.float64 else None


def _differs(where: str) -> str:
    return f"{repr(where) if where else 'the model'} does not compute what it does with them masked"


def _first(t: Tensor) -> Tensor:
    """Two samples are enough to compare a layer by."""
    return t[:2] if t.dim() > 1 else t


def _kept_outputs(m: nn.Module, out: Tensor, dims_of: dict[int, dict[int, Tensor]]) -> Tensor:
    """The channels of a layer's output that its shrunk version has too."""
    weight, rows = _weight(m), 1 if getattr(m, "transposed", False) else 0
    axis = 1
    if isinstance(m, nn.Linear):
        axis = out.dim() - 1
    elif isinstance(m, nn.modules.conv._ConvNd):
        axis = out.dim() - 1 - len(m.kernel_size)
    stays = dims_of.get(id(weight), {}).get(rows)
    if stays is None or weight.shape[rows] * (m.groups if rows else 1) != out.shape[axis]:
        return out
    return out.index_select(axis, stays.to(out.device))


def distance(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest value, of any tensor; infinite where anything else is amiss."""
    if [t.shape for t in got] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if b.numel():
            gap = float((a.double() - b.double()).abs().max())
            worst = max(worst, gap / max(float(b.double().abs().max()), 1e-300) if gap == gap else float("inf"))
    return worst


def _stirred(model: nn.Module, example_inputs: Any, seed: int) -> tuple[nn.Module, Any]:
    """A copy to compare by, in eval mode, and inputs of its dtype.

    Raises:
        GraphError: There is none.
    """
    # what a forward left on a module is part of a graph, which deepcopy refuses
    made = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    trouble: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        try:
            stirred = copy.deepcopy(model, {id(t): t.detach().clone() for t in made})
            stirred.requires_grad_(False)
            for p in stirred.parameters():
                p.grad = None
            stirred.to(dtype).eval()
            inputs = map_tensors(lambda t, dtype=dtype: _contrast(t.detach(), dtype, seed), example_inputs)
            _randomise(stirred, seed)
            torch.manual_seed(seed)
            with _calibrated(stirred, seed):
                call(stirred, inputs)
            return stirred, inputs
        except Exception as e:
            trouble = trouble or e
    raise GraphError(
        "the proof needs a deep copy of the model that runs in float64 or float32 "
        f"({type(trouble).__name__}: {trouble})"
    ) from trouble


def _noise(t: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)


def _contrast(t: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """An input in ``dtype``; an image all of one colour, which shows nothing of what is where, gets noise."""
    if not t.is_floating_point():
        return t
    t = t.to(dtype)
    flat = t.dim() > 2 and t.numel() > 1 and bool((t == t.flatten()[0]).all())
    return t + _noise(t, torch.Generator().manual_seed(seed)) if flat else t


def _randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.numel() == max(p.shape, default=1):  # scales, biases, layer scales
            p.add_(0.3 * _noise(p, generator))
        elif not p.any():
            p.copy_(_noise(p, generator) / p[0].numel() ** 0.5)
    for m in model.modules():
        scale, shift = m._parameters.get("weight"), m._parameters.get("bias")
        if scale is not None and shift is not None and scale.dim() == 1:
            shift.clamp_(-scale.abs(), scale.abs())  # so that an activation behind it sees both signs
        mean, var = getattr(m, "running_mean", None), getattr(m, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            mean.add_(0.3 * var.sqrt() * _noise(mean, generator))
            var.mul_(1 + 0.5 * _noise(var, generator).tanh())


@contextmanager
def _calibrated(model: nn.Module, seed: int) -> Iterator[None]:
    """Within, batch norms set their running statistics to about those of what they get."""
    generator = torch.Generator().manual_seed(seed)

    def calibrate(m: nn.Module, args: tuple) -> None:
        mean, x = m.running_mean, args[0] if args else None
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[1:2] != mean.shape:
            return
        got_var, got_mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
        got_var = torch.where(got_var > 1e-6 * got_var.mean(), got_var, 1.0)
        mean.copy_(got_mean + 0.3 * got_var.sqrt() * _noise(mean, generator))
        m.running_var.copy_(got_var * (1 + 0.5 * _noise(mean, generator).tanh()))

    norms = [m for m in model.modules() if {"running_mean", "running_var"} <= m._buffers.keys()]
    hooks = [m.register_forward_pre_hook(calibrate) for m in norms if m.running_mean is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Precision(TorchDispatchMode):
    """Sees the lowest floating-point dtype that anything is computed in."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in fastprune.labels

    def __init__(self) -> None:
        super().__init__()
        self.lowest = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in leaves(out):
            if t.is_floating_point() and t.dtype.itemsize < self.lowest.itemsize:
                if any(a.is_floating_point() for a in leaves(args)):
                    self.lowest = t.dtype
        return out

    def words(self) -> str:
        return "" if self.lowest == torch.float64 else f"; its code insists on {self.lowest}"


@contextmanager
def _watched(
    model: nn.Module, note: Callable[[str, nn.Module, Tensor], None], running: list[str] | None = None
) -> Iterator[None]:
    """Within, tell ``note`` what layers with weights return, and keep a stack of the modules now ``running``."""
    running = [] if running is None else running
    layers = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase)

    def leave(name: str, m: nn.Module, out: Any) -> None:
        running.pop()
        if isinstance(m, layers) and isinstance(out, Tensor) and _own(m):
            note(name, m, out)

    hooks = []
    for name, m in model.named_modules():
        hooks.append(m.register_forward_pre_hook(lambda m, args, name=name: running.append(name)))
        hooks.append(m.register_forward_hook(lambda m, args, out, name=name: leave(name, m, out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
