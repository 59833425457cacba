"""What a recipe can say: frozen dataclasses, and the check that turns nested dicts into them."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torchvision.models import get_model_weights

from fastprune import data, methods, models
from fastprune.errors import did_you_mean
from fastprune.methods.base import _has_type

PHASES = ("train", "prune", "finetune", "scratch")


@dataclass(frozen=True)
class Source:
    """Where it is published."""

    paper: str
    url: str = ""
    command: str = ""  # the authors' own, as in their README


@dataclass(frozen=True)
class Published:
    """The numbers that a run is held against; ``acc`` is the last phase's."""

    where: str = ""
    acc: float | None = None
    acc_std: float | None = None
    runs: int | None = None
    which: Literal["best", "last"] | None = None  # epoch
    dense_acc: float | None = None
    speedup: float | None = None  # MACs before over MACs after
    sparsity: float | None = None  # share of the parameters that is gone
    macs: float | None = None
    params: float | None = None


@dataclass(frozen=True)
class Data:
    name: str
    options: dict[str, Any] = field(default_factory=dict)  # of the data set
    limit: int | None = None  # at most so many training and test images
    mean: tuple[float, ...] | None = None  # these four: in place of the data set's own
    std: tuple[float, ...] | None = None
    pad: int | None = None
    flip: bool | None = None


@dataclass(frozen=True)
class Model:
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None  # of torchvision, such as IMAGENET1K_V1
    fuse: bool = True  # norm, addition and ReLU in one kernel


@dataclass(frozen=True)
class Base:
    """The recipe that trains the network this one starts from; it is done first where its run is missing."""

    recipe: str
    set: dict[str, Any] = field(default_factory=dict)  # dotted keys: what to change in it if it must be done first


@dataclass(frozen=True)
class Schedule:
    kind: Literal["constant", "step", "cosine"] = "constant"
    at: tuple[float, ...] = ()  # step: epochs, or below 1 shares of all epochs, at which the rate is multiplied
    factor: float = 0.1  # step: by this
    last: float = 0.0  # cosine: share of the rate that is left at the end
    warmup: int = 0  # epochs in which the rate rises linearly to its value


@dataclass(frozen=True)
class Training:
    epochs: int
    batch_size: int
    lr: float
    schedule: Schedule = Schedule()
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    groups: Literal["plain", "rni"] = "plain"  # rni: bounded norms learn ten times as fast and do not decay
    method: str | None = None  # its penalty is added to the loss
    options: dict[str, Any] = field(default_factory=dict)  # of the method
    hand_on: Literal["best", "last"] = "best"  # the weights of which epoch go on


@dataclass(frozen=True)
class Pruning(Training):
    """``epochs``: 0 cuts in one shot, None trains until the method is done."""

    epochs: int | None = 0
    batch_size: int = 128
    lr: float = 1e-3
    ratio: Any = None
    scope: Literal["global", "local"] | None = None
    target_macs: float | None = None
    target_params: float | None = None
    compact: bool = True  # remove what is cut; False: zero and hold it
    hand_on: Literal["best", "last"] = "last"


@dataclass(frozen=True)
class Engine:
    """How every phase trains: options of ``fastprune.train.fit``."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    clip_norm: float | None = None
    accumulate: int = 1
    ema: float | None = None
    cuda_graph: bool = False
    deterministic: bool = False
    checkpoint_minutes: float | None = 10.0
    keep_going: bool = False


@dataclass(frozen=True)
class Recipe:
    name: str
    source: Source
    data: Data
    model: Model
    base: Base | None = None
    train: Training | None = None
    prune: Pruning | None = None
    finetune: Training | None = None
    scratch: Training | None = None
    engine: Engine = Engine()
    seed: int = 0
    importances_every: int = 0  # epochs between two histograms of the scores; 0: a twentieth of the phase's
    published: Published = Published()
    notes: tuple[str, ...] = ()
    tiny: dict[str, Any] = field(default_factory=dict)  # dotted keys: what --tiny changes

    @property
    def system(self) -> str:
        return self.name.partition("/")[0]

    @property
    def phases(self) -> dict[str, Training]:
        """Those it has, in the order in which they run."""
        return {name: phase for name in PHASES if (phase := getattr(self, name)) is not None}


# From dicts -----------------------------------------------------------------------------------------------------------


def build(raw: Mapping[str, Any], file: str) -> Recipe:
    """Check a whole recipe, as YAML gives it.

    Raises:
        ValueError: An unknown key, a missing one, a wrong type, or a name or value that cannot be; with ``file`` and
            the key's path.
    """
    recipe = _make(Recipe, raw, "", file)
    _check(recipe, file)
    return recipe


def _fail(file: str, path: str, what: str) -> ValueError:
    return ValueError(f"{file}: {path or 'the recipe'}: {what}")


def _make(cls: type, raw: Any, path: str, file: str) -> Any:
    if not isinstance(raw, Mapping):
        raise _fail(file, path, f"expected keys and values ({', '.join(f.name for f in fields(cls))}), got {raw!r}")
    known, hints = {f.name: f for f in fields(cls)}, get_type_hints(cls)
    for key in raw:
        if key not in known:
            raise _fail(file, _join(path, key), f"unknown key {key!r}{did_you_mean(str(key), known)}")
    values = {key: _value(hints[key], value, _join(path, key), file) for key, value in raw.items()}
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise _fail(file, _join(path, name), f"missing; expected {_describe(hints[name])}")
    return cls(**values)


def _value(hint: Any, value: Any, path: str, file: str) -> Any:
    """``value`` as ``hint`` wants it."""
    if hint is Any or (hint is float and type(value) is float):
        return _finite(value, path, file)
    if get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        (hint,) = (option for option in get_args(hint) if option is not type(None))
        return _value(hint, value, path, file)
    if is_dataclass(hint):
        if hint is Base and isinstance(value, str):  # short for {recipe: ...}
            value = {"recipe": value}
        return _make(hint, value, path, file)
    fits = type(value) is hint
    if get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            item = get_args(hint)[0]
            return tuple(_value(item, v, f"{path}[{i}]", file) for i, v in enumerate(value))
    elif get_origin(hint) is Literal:
        fits = value in get_args(hint)
    elif get_origin(hint) is dict:
        if isinstance(value, Mapping):
            return {str(key): _finite(v, _join(path, key), file) for key, v in value.items()}
    elif hint is float and type(value) is int and abs(value) < 1 << 1000:
        return float(value)
    if not fits:
        raise _fail(file, path, f"expected {_describe(hint)}, got {value!r}")
    return value


def _finite(value: Any, path: str, file: str) -> Any:
    """``value`` itself, whatever it is, if no number in it is infinite or NaN."""
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        _finite(item, path, file)
    if isinstance(value, float) and not math.isfinite(value):
        raise _fail(file, path, f"expected a finite number, got {value}")
    return value


def _describe(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list, each {_describe(get_args(hint)[0])}"
    if is_dataclass(hint) or get_origin(hint) is dict:
        return "keys and values"
    names = {int: "a whole number", float: "a number", str: "a word or text", bool: "true or false"}
    return names.get(hint, "null" if hint is type(None) else "a value")


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


# What types do not say ------------------------------------------------------------------------------------------------


def _check(recipe: Recipe, file: str) -> None:
    def need(path: str, ok: bool, what: str) -> None:
        if not ok:
            raise _fail(file, path, what)

    def known(path: str, name: str, names: Iterable[str]) -> None:
        need(path, name in names, f"unknown name {name!r}{did_you_mean(name, names)}")

    def fit(path: str, options: Mapping[str, Any], hints: Mapping[str, str]) -> None:
        for key, value in options.items():
            known(f"{path}.{key}", key, hints)
            need(f"{path}.{key}", _has_type(value, hints[key]), f"expected {hints[key]}, got {value!r}")

    parts = recipe.name.split("/")
    need("name", not {"", ".", ".."} & {*parts}, f"expected the name of a folder below --out, got {recipe.name!r}")
    need("seed", 0 <= recipe.seed < 2**62, f"expected 0 or more and less than 2**62, got {recipe.seed}")
    need("importances_every", recipe.importances_every >= 0, f"expected 0 or more, got {recipe.importances_every}")
    known("data.name", recipe.data.name, data.DATASETS)
    options = _annotations(data.DATASETS[recipe.data.name])
    fit("data.options", recipe.data.options, {key: value for key, value in options.items() if key != "root"})
    need("data.limit", recipe.data.limit is None or recipe.data.limit > 0, "expected 1 or more")
    ours = models.MODELS.get(recipe.model.name)
    if ours is not None:
        fit("model.options", recipe.model.options, _annotations(ours))
        need("model.weights", recipe.model.weights is None, f"{recipe.model.name} has no published weights; give base")
    else:
        known("model.name", recipe.model.name, models.list_models())
        if recipe.model.weights is not None:
            known("model.weights", recipe.model.weights, [w.name for w in get_model_weights(recipe.model.name)])
    e = recipe.engine
    need("engine.accumulate", e.accumulate > 0, f"expected 1 or more, got {e.accumulate}")
    need("engine.clip_norm", e.clip_norm is None or e.clip_norm > 0, f"expected above 0, got {e.clip_norm}")
    need("engine.ema", e.ema is None or 0 < e.ema < 1, f"expected between 0 and 1, got {e.ema}")
    minutes = e.checkpoint_minutes
    need("engine.checkpoint_minutes", minutes is None or minutes >= 0, f"expected 0 or more, got {minutes}")
    need("", bool(recipe.phases), f"it has no phase; give at least one of {', '.join(PHASES)}")
    need("scratch", recipe.scratch is None or recipe.prune is not None, "nothing was pruned: prune is missing")
    for name, phase in recipe.phases.items():
        if name == "prune":
            cuts = phase.epochs == 0 and phase.options.get("per_cut")
            need("prune.epochs", not cuts, "0 is one cut without training, but prune.options.per_cut asks for many")
            need("prune.method", phase.method is not None, f"missing; expected one of {', '.join(methods.METHODS)}")
        need(f"{name}.epochs", (phase.epochs or 0) >= (name != "prune"), f"expected 1 or more, got {phase.epochs}")
        need(f"{name}.batch_size", phase.batch_size > 0, f"expected 1 or more, got {phase.batch_size}")
        need(f"{name}.lr", 0 < phase.lr < float("inf"), f"expected a number above 0, got {phase.lr:g}")
        for key in ("momentum", "weight_decay"):
            need(f"{name}.{key}", getattr(phase, key) >= 0, f"expected 0 or more, got {getattr(phase, key):g}")
        need(f"{name}.nesterov", not phase.nesterov or phase.momentum > 0, f"{name}.momentum must be above 0 with it")
        warmup = phase.schedule.warmup
        need(f"{name}.schedule.warmup", warmup >= 0, f"expected 0 or more, got {warmup}")
        for key in ("factor", "last"):  # a rate below 0 would climb
            value = getattr(phase.schedule, key)
            need(f"{name}.schedule.{key}", value >= 0, f"expected 0 or more, got {value:g}")
        for i, at in enumerate(phase.schedule.at):
            low = at > 0 and (at < 1 or (at == int(at) and (phase.epochs is None or at < phase.epochs)))
            what = f"expected a share below 1 or a whole epoch before {name}.epochs={phase.epochs}, got {at:g}"
            need(f"{name}.schedule.at[{i}]", low, what)
        if phase.method is None:
            need(f"{name}.options", not phase.options, f"they are a method's, and {name}.method is missing")
            continue
        known(f"{name}.method", phase.method, methods.METHODS)
        of_method = {f.name: f.type for f in fields(methods.METHODS[phase.method].Options)}
        fit(f"{name}.options", phase.options, of_method)


def _annotations(fn: Callable[..., Any]) -> dict[str, str]:
    """What each parameter must be, in words; anything, where ``fn`` does not say."""
    found = {name: p.annotation for name, p in inspect.signature(fn).parameters.items()}
    return {name: hint if isinstance(hint, str) else "Any" for name, hint in found.items()}
