"""Fold ReLUs and residual adds into the batch norms before them, one module's ``forward`` at a time.

Each module that owns norms is traced alone with torch.fx, its children being leaves, and gets a subclass of its class
whose ``forward`` calls ``self.bn2(out, residual=identity, act="relu")`` instead of norm, add and ReLU.  Nothing else
changes: modules, names, ``state_dict``, hooks, ``isinstance``.  The norms carry no state of it either, so any other
code that calls them gets a plain norm.

A trace holds for what it saw.  So the new ``forward`` first looks whether that is still so (same plain attributes,
children, argument types; a ReLU that is a ReLU; no hook that would see a different tensor) and otherwise runs the
original ``forward``, which stays right.  What a trace cannot promise is left alone, with a reason.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import linecache
import math
import operator
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from fastprune.nn.batch_norm import BatchNormAct2d

RELU_FUNCTIONS = {F.relu, torch.relu, F.relu_, torch.relu_}
RELU_METHODS = {"relu", "relu_"}
_ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_"}
_FROZEN_TYPES = (bool, int, float, complex, str, bytes, type(None), type, Enum, torch.dtype, torch.device)
_FROZEN_TYPES += (FunctionType, BuiltinFunctionType)
_MISSING = object()
_ENVIRONMENT = {"torch": torch, "inf": math.inf, "nan": math.nan, "NoneType": type(None), "device": torch.device}


@dataclass(eq=False)
class Trace:
    """One module's ``forward`` for a call with its required positional arguments and nothing else."""

    module: nn.Module
    graph: fx.Graph
    attributes: tuple[tuple[tuple[str, ...], str, Any], ...]  # plain attributes that were read: path, name, value
    kinds: tuple[type | None, ...]  # per argument: the type it was taken for, None where nobody asked
    modules: dict[str, nn.Module]  # call_module targets
    folds: list[tuple[str, ...]] = field(default_factory=list)  # ("bn2", "add", "relu")
    relus: set[str] = field(default_factory=set)  # targets that are not called any more
    norms: set[str] = field(default_factory=set)  # targets that take residual and act
    tail: bool = False  # forward takes residual and act, and hands them to the norm that it ends in

    def calls(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        for node in self.graph.nodes:
            if node.op == "call_module":
                yield node, self.modules[node.target]


def trace_forwards(model: nn.Module) -> tuple[dict[nn.Module, Trace], dict[nn.Module, str]]:
    """Trace each module of ``model`` that contains a :class:`BatchNormAct2d`, and each ``nn.Sequential``.

    Returns: traces by module, and by module the reason why there is none.
    """
    traces, reasons = {}, {}
    lists: dict[nn.Module, set[int]] = {}  # arguments that the caller passes as a list; callers are traced first
    for module in model.modules():
        if isinstance(module, BatchNormAct2d) or type(module).forward is nn.Module.forward:  # ModuleList, ModuleDict
            continue
        if not isinstance(module, nn.Sequential) and not any(isinstance(m, BatchNormAct2d) for m in module.modules()):
            continue
        try:
            trace = traces[module] = _trace(module, lists.get(module, set()))
        except Exception as error:  # whatever a user's forward raises on a symbolic argument
            reasons[module] = (str(error) or type(error).__name__).strip().splitlines()[0]
            continue
        for node, child in trace.calls():
            lists.setdefault(child, set()).update(i for i, a in enumerate(node.args) if isinstance(a, list))
    return traces, reasons


def fuse(traces: dict[nn.Module, Trace]) -> None:
    """Give every traced module in which something folds its new ``forward``.  Consumes the graphs."""
    for trace in traces.values():
        _fold(trace, traces)
    for module, trace in traces.items():
        if trace.norms:
            module.__class__ = _fused_class(type(module), _plan(trace))


def unfuse(model: nn.Module) -> nn.Module:
    """Undo the folding of :func:`fastprune.nn.convert_batchnorm`: every module gets its own class and forward back.

    The norms stay what they are.  In place; returns ``model``.
    """
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__class__ = type(module)._original
    return model


# --- tracing -----------------------------------------------------------------------------------------------------


class _Value(fx.Proxy):
    """A proxy that answers ``isinstance`` truthfully for arguments, and refuses where the answer is unknown."""

    def _type(self):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _Value if caller == "torch" or caller.startswith("torch.") else self.tracer.type_of(self.node)

    __class__ = property(_type)


def _in_place_operator(name: str):
    def record(self, other):  # a plain proxy would record `x += y` as x + y, and lose the write into x
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"):
    setattr(_Value, f"__{_name}__", _in_place_operator(_name))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else an in-place change of a buffer would run now, and only now

    def __init__(self, lists: set[int]) -> None:
        super().__init__()
        self.lists, self.asked, self.modes = lists, {}, _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def type_of(self, node: fx.Node) -> type:
        if node.op != "placeholder":
            raise TraceError("it asks for the type of a computed value")
        index = int(node.target[1:])
        self.asked[index] = list if index in self.lists else Tensor
        return self.asked[index]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:  # torch.fx would drop the context without a word
            raise TraceError("it switches grad mode, inference mode or autocast inside")
        frame = sys._getframe()
        while frame := frame.f_back:
            if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
                raise TraceError("it uses torch.utils.checkpoint")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple:
    autocast = [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _trace(module: nn.Module, lists: set[int]) -> Trace:
    cls = type(module)
    if cls.__module__.split(".")[0] == "torch" and not isinstance(module, nn.Sequential):
        raise TraceError(f"torch's {cls.__name__} is left as it is")
    if "forward" in vars(module):
        raise TraceError("its forward was replaced on the instance")
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if any(p.kind is p.KEYWORD_ONLY for p in required):
        raise TraceError("its forward has a keyword-only argument without default")
    names = ", ".join(f"x{i}" for i in range(len(required)))
    scope = {"forward": cls.forward}
    exec(f"def traced(self, {names}): return forward(self, {names})", scope)
    tracer, read = _Tracer(lists), {}
    with _unchanged(module):
        module.__class__ = type(cls.__name__, (cls,), {"forward": scope["traced"]})
        try:
            with _watched(tracer, read):
                graph = tracer.trace(module)
        finally:
            module.__class__ = cls
    attributes = tuple((path, name, value) for (path, name), value in read.items() if _frozen(value))
    kinds = tuple(tracer.asked.get(i) for i in range(len(required)))
    return Trace(module, graph, attributes, kinds, dict(module.named_modules(remove_duplicate=False)))


@contextmanager
def _watched(tracer: _Tracer, read: dict[tuple[tuple[str, ...], str], Any]) -> Iterator[None]:
    """Note which plain attributes of the module and its children forward reads; ``training`` stays a live read."""
    internal = vars(nn.Module()).keys() - {"training"}

    def get(module, name):
        value = object.__getattribute__(module, name)
        if name in internal or name not in object.__getattribute__(module, "__dict__"):
            return value
        path = (tracer.submodule_paths or {}).get(module)
        if path is None:  # not part of the traced module
            return value
        if name == "training":  # a value to pass on; deciding on it is refused
            return tracer.create_proxy("get_attr", f"{path}.training" if path else "training", (), {})
        read.setdefault((_split(path), name), value)
        return value

    nn.Module.__getattribute__ = get
    try:
        yield
    finally:
        del nn.Module.__getattribute__


def _split(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()


def _frozen(value: Any) -> bool:
    return isinstance(value, _FROZEN_TYPES) or (isinstance(value, tuple) and all(map(_frozen, value)))


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Refuse a forward that changed the module or drew random numbers, after taking that back."""
    own, inner = vars(module), ("_modules", "_parameters", "_buffers")
    before, random_state = [dict(own), *(dict(own[name]) for name in inner)], _random_state()
    try:
        yield
    finally:
        after = [dict(own), *(dict(own[name]) for name in inner)]
        pairs = list(zip(after, before, strict=True))
        same = all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in pairs)
        drew = _comparable(*_random_state()) != _comparable(*random_state)
        if not same:
            for d, entries in zip((own, *(before[0][name] for name in inner)), before, strict=True):
                d.clear()
                d.update(entries)
        if drew:
            _restore_random_state(*random_state)
    if not same:
        raise TraceError("its forward changes the module's own attributes")
    if drew:
        raise TraceError("its forward draws random numbers")


def _random_state() -> tuple:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _comparable(python: tuple, numpy: Any, cpu: Tensor, cuda: list[Tensor]) -> tuple:
    return python, numpy[1].tobytes(), numpy[2:], [t.numpy().tobytes() for t in (cpu, *cuda)]


def _restore_random_state(python: tuple, numpy: Any, cpu: Tensor, cuda: list[Tensor]) -> None:
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


# --- folding -----------------------------------------------------------------------------------------------------


def _tail(module: nn.Module, traces: dict[nn.Module, Trace]) -> fx.Node | bool:
    """Whether ``module`` can add a residual and apply a ReLU itself; the last node of a module that is not a norm."""
    if isinstance(module, BatchNormAct2d):
        return module.act is None and type(module).forward is BatchNormAct2d.forward
    trace = traces.get(module)
    if trace is not None and trace.tail:
        return True
    if trace is None or {"residual", "act"} & inspect.signature(type(module).forward).parameters.keys():
        return False
    last = next(n for n in trace.graph.nodes if n.op == "output").args[0]
    return last if isinstance(last, fx.Node) and _is_norm(last, trace, traces) and len(last.users) == 1 else False


def _is_norm(node: fx.Node, trace: Trace, traces: dict[nn.Module, Trace]) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return False
    module = trace.modules[node.target]
    return not hooked(module) and bool(_tail(module, traces))


def is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``node`` is a ReLU of one tensor, in whatever spelling."""
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU and not hooked(modules[node.target])
    known = {"call_function": RELU_FUNCTIONS, "call_method": RELU_METHODS}.get(node.op, ())
    return node.target in known and len(node.args) == 1 and not node.kwargs.keys() - {"inplace"}


def _fold(trace: Trace, traces: dict[nn.Module, Trace]) -> None:
    nodes = list(trace.graph.nodes)
    order, depth = {n: i for i, n in enumerate(nodes)}, {}
    for n in nodes:  # number of modules on the longest way to a node: the main path is the longest
        size = len(list(trace.modules[n.target].modules())) if n.op == "call_module" else 0
        depth[n] = size + max((depth[a] for a in n.all_input_nodes), default=0)

    def foldable(n: fx.Node, user: fx.Node) -> bool:
        return isinstance(n, fx.Node) and _is_norm(n, trace, traces) and list(n.users) == [user]

    for end in [*(n for n in nodes if is_relu(n, trace.modules)), *(n for n in nodes if _operands(n))]:
        if end not in trace.graph.nodes:  # an add that went with its ReLU
            continue
        add = end if _operands(end) else end.args[0]
        if foldable(add, end):  # norm, ReLU
            _replace(trace, traces, add, end, end, act="relu")
            continue
        operands = _operands(add) if isinstance(add, fx.Node) else None
        if not operands or (add is not end and list(add.users) != [end]):
            continue
        candidates = [n for n in operands if foldable(n, add)]
        # `x += y` changes x for others who hold it, unless nobody does: then x is the output of a norm
        if not candidates or (_in_place(add) and operands[0] not in candidates):
            continue
        norm = max(candidates, key=lambda n: (depth[n], order[n]))
        if _may_move(norm, nodes[order[norm] + 1 : order[add]], trace):
            residual = operands[1] if norm is operands[0] else operands[0]
            kwargs = {"residual": residual} if add is end else {"residual": residual, "act": "relu"}
            _replace(trace, traces, norm, add, end, **kwargs)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two different tensors that ``node`` adds, or None if that is not what it does."""
    known = {"call_function": _ADD_FUNCTIONS, "call_method": _ADD_METHODS}.get(node.op, ())
    if node.target not in known or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b else None


def _in_place(node: fx.Node) -> bool:
    return node.target in (operator.iadd, "add_")


def _may_move(norm: fx.Node, between: list[fx.Node], trace: Trace) -> bool:
    """Whether ``norm`` may run after ``between``: nobody must write into its input meanwhile."""
    source = norm.args[0]
    if source.op == "call_module" and isinstance(trace.modules[source.target], nn.Conv2d) and len(source.users) == 1:
        return True  # a fresh tensor that only the norm sees
    return not any(_writes(n, trace) for n in between)


def _writes(node: fx.Node, trace: Trace) -> bool:
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) for m in trace.modules[node.target].modules())
    if node.op in ("placeholder", "get_attr"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    inplace_operator = getattr(node.target, "__module__", "") == "_operator" and name[0] == "i" and name != "invert"
    return bool(inplace_operator or name.endswith("_") or name == "setitem" or node.kwargs.get("inplace"))


def _replace(
    trace: Trace, traces: dict[nn.Module, Trace], norm: fx.Node, place: fx.Node, end: fx.Node, **kwargs: Any
) -> None:
    """Call ``norm`` with ``kwargs`` at ``place`` and use the result for ``end``; drop what lies between."""
    graph = trace.graph
    with graph.inserting_before(norm if place is end and "residual" not in kwargs else place):
        call = graph.call_module(norm.target, norm.args, kwargs)
    end.replace_all_uses_with(call)
    trace.folds.append(
        (norm.target, *(["add"] if "residual" in kwargs else []), *(["relu"] if "act" in kwargs else []))
    )
    trace.norms.add(norm.target)
    if end.op == "call_module":
        trace.relus.add(end.target)
    for node in dict.fromkeys((end, place, norm)):
        graph.erase_node(node)
    _pass_on(trace.modules[norm.target], traces)


def _pass_on(module: nn.Module, traces: dict[nn.Module, Trace]) -> None:
    """Let ``module``, unless it is a norm, take residual and act and pass them to the norm that it ends in."""
    trace = traces.get(module)
    if trace is None or trace.tail:
        return
    trace.tail, last, graph = True, _tail(module, traces), trace.graph
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        last.kwargs = {"residual": graph.placeholder("residual"), "act": graph.placeholder("act")}
    trace.norms.add(last.target)
    _pass_on(trace.modules[last.target], traces)


# --- the new forward ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A fused forward: its code, and what must still be so for the code to hold."""

    source: str
    environment: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[tuple[str, ...], str, Any], ...]
    kinds: tuple[type | None, ...]
    structure: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]  # path of a container, names of its children
    norms: tuple[tuple[str, ...], ...]  # paths
    relus: tuple[tuple[str, ...], ...]
    tail: bool
    folds: tuple[str, ...]


def _plan(trace: Trace) -> Plan:
    code = trace.graph.python_code("self")
    names = next(c for c in compile(code.src, "", "exec").co_consts if isinstance(c, CodeType)).co_names
    environment = tuple((k, v) for k, v in code.globals.items() if k in names and k not in _ENVIRONMENT)

    def paths(targets):
        return tuple(_split(target) for target in sorted(targets))

    return Plan(
        code.src,
        environment,
        trace.attributes,
        trace.kinds,
        tuple(_structure(trace.module)),
        paths(trace.norms),
        paths(trace.relus),
        trace.tail,
        tuple("+".join(parts) for parts in trace.folds),
    )


def _structure(module: nn.Module, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    yield path, tuple(module._modules)
    for name, child in module.named_children():
        if type(child).forward is nn.Module.forward:  # ModuleList, ModuleDict: the parent's forward goes through them
            yield from _structure(child, (*path, name))


def hooked(module: nn.Module) -> bool:
    """Whether hooks look at the output of ``module``, or at its gradient."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _at(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


def _holds(module: nn.Module, plan: Plan, args: tuple) -> bool:
    """Whether everything the trace relied on is still so."""
    for path, name, value in plan.attributes:
        owner = _at(module, path)
        if owner is None or owner.__dict__.get(name, _MISSING) != value:
            return False
    for value, kind in zip(args, plan.kinds, strict=True):
        if kind is not None and type(value) is not kind:
            return False
    for path, names in plan.structure:
        owner = _at(module, path)
        if owner is None or tuple(owner._modules) != names:
            return False
    for path in plan.relus:
        relu = _at(module, path)
        if type(relu) is not nn.ReLU or hooked(relu):
            return False
    for path in plan.norms:
        norm = _at(module, path)
        takes = norm.act is None if isinstance(norm, BatchNormAct2d) else isinstance(norm, _Fused) and norm._plan.tail
        if not takes or hooked(norm):
            return False
    return True


class _Fused:
    """Mixed into the class of a module whose forward was rewritten."""

    _plan: Plan
    _original: type[nn.Module]

    def __reduce_ex__(self, protocol: int) -> tuple:
        function, args, *rest = super().__reduce_ex__(protocol)
        if function is copyreg.__newobj__ and args == (type(self),):
            return _new_fused, (self._original, self._plan), *rest
        return function, args, *rest

    def extra_repr(self) -> str:
        folds = f"fused: {', '.join(self._plan.folds)}" if self._plan.folds else ""
        return ", ".join(filter(None, (super().extra_repr(), folds)))


def _new_fused(original: type[nn.Module], plan: Plan) -> nn.Module:
    cls = _fused_class(original, plan)
    return cls.__new__(cls)


@functools.cache
def _fused_class(original: type[nn.Module], plan: Plan) -> type[nn.Module]:
    name = f"<fastprune: fused {original.__module__}.{original.__qualname__} {abs(hash(plan)):x}>"
    lines = plan.source.splitlines(keepends=True)
    linecache.cache[name] = (len(plan.source), None, lines, name)  # tracebacks show the code
    scope = {**_ENVIRONMENT, **dict(plan.environment)}
    exec(compile(plan.source, name, "exec"), scope)
    fused, n = scope["forward"], len(plan.kinds)

    if plan.tail:

        def forward(self, *args, residual=None, act=None, **kwargs):
            if len(args) == n and not kwargs and _holds(self, plan, args):
                return fused(self, *args, residual, act)
            y = original.forward(self, *args, **kwargs)
            y = y if residual is None else y + residual
            return y.relu() if act else y

    else:

        def forward(self, *args, **kwargs):
            if len(args) == n and not kwargs and _holds(self, plan, args):
                return fused(self, *args)
            return original.forward(self, *args, **kwargs)

    body = {"forward": functools.wraps(original.forward)(forward), "_plan": plan, "_original": original}
    cls = type(original.__name__, (_Fused, original), body)
    cls.__module__, cls.__qualname__, cls.__doc__ = original.__module__, original.__qualname__, original.__doc__
    return cls
