"""Which share of which layer: the ratio grammar of GReg (arXiv 2012.09243) and TPP (arXiv 2207.12534).

A ratio is a number, a list by stage, a list by layer index, or names and glob patterns; :func:`resolve` turns any of
them into one ratio per prunable layer.  Layers can be skipped, tied to one another, or take over what another network
lost.  docs/ratios.md shows each form.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.graph import ChannelGraph, Group

Ratio = float | str | Sequence[float] | Sequence[str] | Mapping[str, float]

_FORMS = "0.5, '[0,0.5,0.5,0.3,0]' by stage, '[0-4:0.5, 7:0.2]' by layer index, or '*layer*.conv1:0.5' by name"


def resolve(
    ratio: Ratio, model: nn.Module, names: Sequence[str], *, reasons: Mapping[str, str] | None = None
) -> float | dict[str, float]:
    """One ratio for every prunable layer.

    Args:
        ratio: A number: one ratio.  A list such as ``"[0,0.75,0.75,0.32,0]"``: by stage, see :func:`stages`.
            ``"[0-4:0.5, 7:0.2]"``: by index in :func:`layers`.  ``"*layer*.conv1:0.9, fc:0.5"`` or a dict: by name,
            the exact name before patterns, patterns in their order, the first that matches wins.  Layers that a list
            of indices or names leaves out are kept whole.  Outer brackets and white space are optional.
        model: Its module names say where stages are; wrappers such as ``nn.DataParallel`` do not count.
        names: The prunable layers, in module order; ``"x#2"`` belongs to layer ``x``.
        reasons: Why other layers cannot be pruned, such as :func:`left_alone` gives.

    Returns: A number as it is; else the ratio of every one of ``names``.

    Raises:
        ValueError: A malformed or wrong list, a ratio outside [0, 1), an index, stage or pattern with a ratio above 0
            that reaches no prunable layer, or that earlier patterns leave nothing to decide.
    """
    parsed = _parse(ratio)
    if isinstance(parsed, float):
        return ratio if isinstance(ratio, (int, float)) else parsed
    targets, reasons = _Targets(model, names), reasons or {}
    if isinstance(parsed, dict):
        return _by_name(parsed, targets, reasons)
    if parsed and isinstance(parsed[0], tuple):
        rules = _by_index(parsed, targets)
    else:
        rules = _by_stage(parsed, model, names)
    ratios = dict.fromkeys(names, 0.0)
    for label, r, reached in rules:
        mine = [name for name in names if _layer(name) in reached]
        if r > 0 and not mine:
            raise ValueError(_reaches_nothing(label, reached, names, reasons))
        ratios |= dict.fromkeys(mine, r)
    return ratios


def layers(model: nn.Module) -> list[str]:
    """Names of the convolutions and linear layers in module order: what ratios by index count, from 0."""
    return [name for name, m in model.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]


def stages(model: nn.Module) -> list[list[str]]:
    """The layers of each entry of a ratio list by stage: what comes before the first stage, each stage, what follows.

    Stages are the outermost modules with layers inside that are called ``layer1``, ``layer2``, ... (also ``stage``,
    ``block``, ``dense``, ``denseblock``, ``group``, ``res``, ``s``) or ``stages.0``, ``stages.1``, ... (also
    ``layers``, ``blocks``).  A layer between two stages, such as a DenseNet's transition, belongs to the one before it.

    Raises:
        ValueError: The network has no stages, or several series of them.
    """
    return _entries(*_places(model))


def skipped(skip: Sequence[str] | str, model: nn.Module, names: Sequence[str]) -> set[str]:
    """The prunable layers that ``skip`` exempts.

    Args:
        skip: Items, as a list or as ``"[1.0, 2.3]"``; each is a layer's name, a prefix of ``stage.block.conv`` or a
            glob pattern of names.  ``"3.1"`` is block 1 of stage 3 (blocks count from 0, stages from 1, 0 = what comes
            before them), not block 10; ``"3.1.0"`` its first convolution.
        model: As for :func:`resolve`.
        names: The prunable layers.

    Raises:
        ValueError: An item that names no layer of the network at all.
    """
    items = _pieces(skip, "skip", "'[1.0, 2.3]'") if isinstance(skip, str) else list(skip)
    targets, gone = _Targets(model, names), set()
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"skip: expected strings such as '1.0' (2.1 and 2.10 are one number), got {item!r}")
        item = item.strip()
        if not targets.exact(item) and re.fullmatch(r"\d+(\.\d+){0,2}", item):
            prefix = tuple(int(n) for n in item.split("."))
            reached = {
                name for name, place in _places(model, names, "skip")[1].items() if place[: len(prefix)] == prefix
            }
            mine = {name for name in names if _layer(name) in reached}
        else:
            reached = targets.matching(item)
            mine = reached.intersection(names)
        if not reached:
            raise ValueError(f"skip: {item!r} names no layer{_nearest(item, targets.all)}")
        gone |= mine
    return gone


def constrained(spec: str | Sequence[str] | Sequence[Sequence[str]], sizes: Mapping[str, int]) -> list[list[str]]:
    """Sets of layers that must lose the same channels: those that the first one's scores choose.

    Args:
        spec: ``"layer1.0.conv1,layer1.1.conv1/layer2.*.conv1"``: names and patterns, sets separated by ``/``.  Or a
            list of such strings, or of lists of names and patterns: one set each.
        sizes: Prunable layer to its number of channels, in module order.

    Returns: The sets, each in the order in which its patterns name the layers.

    Raises:
        ValueError: A pattern that matches no prunable layer, layers of different width in a set, a set of one layer,
            or a layer in two sets.
    """
    example = "'layer1.*.conv1/layer2.0.conv1,layer2.1.conv1'"
    parts = spec.split("/") if isinstance(spec, str) else [s for part in spec for s in _split_sets(part)]
    sets: list[list[str]] = []
    for part in parts:
        patterns = _pieces(part, "constrained", example) if isinstance(part, str) else list(part)
        members: list[str] = []
        for pattern in patterns:
            reached = [pattern] if pattern in sizes else [name for name in sizes if fnmatchcase(name, pattern)]
            if not reached:
                raise ValueError(f"constrained: {pattern!r} matches no prunable layer{_nearest(pattern, sizes)}")
            members += [name for name in reached if name not in members]
        where = ",".join(patterns)
        if len(members) < 2:
            raise ValueError(f"constrained: {where!r} names only {members[0]}; a set needs two layers, as in {example}")
        if odd := next((name for name in members if sizes[name] != sizes[members[0]]), None):
            first = members[0]
            raise ValueError(
                f"constrained: expected layers of equal width in {where!r}, "
                f"got {first} with {sizes[first]} and {odd} with {sizes[odd]}"
            )
        for name in members:
            if any(name in other for other in sets):
                raise ValueError(f"constrained: {name} is in two sets; merge them into one")
        sets.append(members)
    return sets


def left_alone(graph: ChannelGraph, names: Sequence[str]) -> dict[str, str]:
    """Why each layer that is not among ``names`` cannot be pruned, for :func:`resolve`'s errors."""
    reasons = dict(graph.frozen)
    for group in graph.groups.values():
        for conv in group.convs:
            other = next((c for c in group.convs if c != conv), None)
            if group.name not in names:
                shared = f"{other} writes the same channels, see option coupled"
                reasons.setdefault(conv, shared if other else "the method leaves it alone")
            elif _layer(group.name) != conv:
                reasons.setdefault(conv, f"it shares its channels with {group.name}: give that one's ratio")
    return reasons


def inherited(
    source: Any, model: nn.Module, graph: ChannelGraph, names: Sequence[str], what: str = "ratio"
) -> dict[str, float] | dict[str, Tensor]:
    """What another network lost, as ratios or as keep-masks of this one.

    Args:
        source: A path: a state_dict saved by ``torch.save`` or as .safetensors, or a .json of ``{layer: [kept
            indices]}``; an ``nn.Module``; a state_dict; or a mapping of layers to bool keep-masks, (C,), or to kept
            indices.  Of a network that was made smaller the shapes count; of one of full size the filters that are
            zero throughout.  Layers that a list or a mapping leaves out are whole.
        model: The network to prune, and ``graph`` its channel graph.
        names: The groups of ``graph`` that may be pruned.
        what: ``"ratio"``, the share of each layer that is gone, or ``"index"``, which of its channels: not to be known
            from a network that was made smaller.

    Returns: For each of ``names`` a ratio that removes just as many channels again, or a keep-mask, (C,) bool.

    Raises:
        ValueError: The file cannot be read, its layers or shapes are not this model's, nothing or all of a layer is
            gone, another layer than ``names`` is smaller, or the indices cannot be known.
    """
    if what not in ("ratio", "index"):
        raise ValueError(f"inherit: expected 'ratio' or 'index', got {what!r}")
    loaded, where = _load(source)
    if _is_keep_list(loaded):
        found = {name: _keep_mask(name, kept, graph) for name, kept in loaded.items()}
        found = graph.check_keep(found)
    else:
        tensors, mine = {_unwrapped(key): t for key, t in loaded.items() if isinstance(t, Tensor)}, _Rows(model)
        found = {name: _what_is_left(group, mine, tensors, where) for name, group in graph.groups.items()}
    gone = {
        name: graph.groups[name].size - (kept if isinstance(kept, int) else int(kept.sum()))
        for name, kept in found.items()
    }
    if not any(gone.values()):
        raise ValueError(f"inherit: no channel of {where} is missing or zero; expected a pruned or masked network")
    for name, number in gone.items():
        if number and name not in names:
            why = left_alone(graph, names).get(_layer(name), "the method leaves it alone")
            raise ValueError(f"inherit: {where} lacks {number} channels of {name}, which cannot be pruned here ({why})")
    if what == "ratio":
        return {name: _exact_ratio(gone.get(name, 0), graph.groups[name].size) for name in names}
    for name, kept in found.items():
        if isinstance(kept, int) and gone[name]:
            raise ValueError(
                f"inherit: {name} of {where} has {kept} of {graph.groups[name].size} channels, and which ones cannot "
                "be known from a network that was made smaller; take over its ratios, or give its keep-masks"
            )
    whole = {name: torch.ones(graph.groups[name].size, dtype=torch.bool) for name in names}
    return whole | {name: kept for name, kept in found.items() if name in whole and isinstance(kept, Tensor)}


# The grammar --------------------------------------------------------------------------------------------------------


def _parse(ratio: Ratio) -> float | list[float] | list[tuple[str, int, int, float]] | dict[str, float]:
    """A number, ratios by stage, (text, first, last, ratio) by index, or ratios by name."""
    if isinstance(ratio, Real):
        return _number(ratio, "")
    if isinstance(ratio, Mapping):
        for key in ratio:
            if not isinstance(key, str):
                raise ValueError(f"ratio: expected layer names as keys, got {key!r}; by index write '{key}:0.5'")
        return {key: _number(r, f" for {key!r}") for key, r in ratio.items()}
    if not isinstance(ratio, (str, Sequence)):
        raise ValueError(f"ratio: expected {_FORMS}; got {type(ratio).__name__}")
    if not isinstance(ratio, str):  # as YAML reads the lists
        if all(isinstance(r, Real) for r in ratio):
            return [_number(r, f" in entry {i}") for i, r in enumerate(ratio)]
        ratio = "[" + ",".join(str(r) for r in ratio) + "]"
    pieces = _pieces(ratio, "ratio", _FORMS)
    keyed = [":" in piece for piece in pieces]
    if not any(keyed):
        numbers = [_number(piece, f" in {ratio!r}") for piece in pieces]
        return numbers[0] if len(numbers) == 1 and not ratio.strip().startswith("[") else numbers
    if not all(keyed):
        bad = pieces[keyed.index(False)]
        raise ValueError(f"ratio: expected 'layer:ratio' at {bad!r} in {ratio!r}; the forms are {_FORMS}")
    by_index, by_name = [], {}
    for piece in pieces:
        key, _, value = (part.strip() for part in piece.rpartition(":"))
        r = _number(value, f" in {piece!r}")
        if match := re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", key):
            by_index.append((piece, int(match[1]), int(match[2] or match[1]), r))
            if by_index[-1][1] > by_index[-1][2]:
                raise ValueError(f"ratio: {piece!r} runs backwards; write '{match[2]}-{match[1]}:{value}'")
        elif not key or key in by_name:
            raise ValueError(f"ratio: {piece!r} {'repeats ' + key if key else 'names no layer'}; e.g. 'conv1:{value}'")
        else:
            by_name[key] = r
    if by_index and by_name:
        raise ValueError(f"ratio: {ratio!r} mixes indices and names; write either '0-4:0.5' or '*layer*.conv1:0.5'")
    return by_index or by_name


def _pieces(text: str, who: str, forms: str) -> list[str]:
    """The entries between commas, without the outer brackets."""
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    pieces = [piece.strip() for piece in inner.split(",")]
    if not all(pieces):
        raise ValueError(f"{who}: empty entry in {text!r}; expected {forms}")
    return pieces


def _number(value: Any, where: str) -> float:
    try:
        r = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"ratio: expected a number{where}, got {value!r}; the forms are {_FORMS}") from None
    if not 0 <= r < 1:
        raise ValueError(f"ratio: expected 0 <= ratio < 1 (the share removed){where}, got {value!r}")
    return r


def _split_sets(part: str | Sequence[str]) -> list[str] | list[Sequence[str]]:
    return part.split("/") if isinstance(part, str) else [part]


# From the grammar to layers -----------------------------------------------------------------------------------------


def _layer(name: str) -> str:
    """The layer of a group: ``"x#2"`` belongs to ``x``."""
    return name.partition("#")[0]


def _plain_names(model: nn.Module, names: Iterable[str] = ()) -> dict[str, str]:
    """Each convolution, linear layer and owner of ``names`` to its name without parallel training's wrappers.

    In module order.  An attention module is an owner that is neither: its projections are parameters of its own.
    """
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    wrappers = {f"{name}.module".removeprefix(".") for name, m in model.named_modules() if isinstance(m, kinds)}
    known = {*layers(model), *map(_layer, names)}
    plain = {}
    for name in (name for name, _ in model.named_modules() if name in known):
        parts = name.split(".")
        plain[name] = ".".join(p for i, p in enumerate(parts) if ".".join(parts[: i + 1]) not in wrappers)
    return plain


class _Targets:
    """What names and patterns can match: the prunable groups and all other layers, with and without wrappers."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        plain = _plain_names(model, names)
        self.layers = layers(model)
        self.prunable = list(names)
        owners = {_layer(name) for name in names}
        self.all = [*names, *(name for name in plain if name not in owners)]
        self._known = {}  # target -> names it goes by, the most exact first
        for name in self.all:
            layer = _layer(name)
            bare = plain.get(layer, layer)
            self._known[name] = tuple(dict.fromkeys((name, bare + name.removeprefix(layer), layer, bare)))

    def known(self, target: str) -> tuple[str, ...]:
        return self._known[target]

    def exact(self, name: str) -> set[str]:
        return {target for target, known in self._known.items() if name in known}

    def matching(self, pattern: str) -> set[str]:
        found = {target for target, known in self._known.items() if any(fnmatchcase(k, pattern) for k in known)}
        return self.exact(pattern) | found


def _by_name(asked: dict[str, float], targets: _Targets, reasons: Mapping[str, str]) -> dict[str, float]:
    decided_by: dict[str, str | None] = {}
    for target in targets.prunable:
        known = targets.known(target)
        exact = (name for name in known if name in asked)
        by_pattern = (p for p in asked if any(fnmatchcase(name, p) for name in known))
        decided_by[target] = next(exact, None) or next(by_pattern, None)
    used = set(decided_by.values())
    for pattern, r in asked.items():
        if pattern in used:
            continue
        reached = targets.matching(pattern)
        mine = [target for target in targets.prunable if target in reached]
        if r > 0 and mine:
            raise ValueError(
                f"ratio: {pattern!r} decides nothing, since {decided_by[mine[0]]!r} comes before it for {mine[0]}; "
                "exact names go first, then patterns in their order"
            )
        if not reached:
            raise ValueError(f"ratio: {pattern!r} matches no layer{_nearest(pattern, targets.all)}")
        if r > 0:
            in_order = [target for target in targets.all if target in reached]
            raise ValueError(_reaches_nothing(pattern, in_order, targets.prunable, reasons))
    return {name: asked[by] if by is not None else 0.0 for name, by in decided_by.items()}


def _by_index(parsed: list[tuple[str, int, int, float]], targets: _Targets) -> list[tuple[str, float, list[str]]]:
    known, taken, rules = targets.layers, {}, []
    for piece, first, last, r in parsed:
        if last >= len(known) and r > 0:  # the authors write [0-18:0] for a network of 17 layers: harmless
            raise ValueError(
                f"ratio: index {last} in {piece!r} is out of range; the network has {len(known)} layers, "
                + (f"0 ({known[0]}) to {len(known) - 1} ({known[-1]})" if known else "no convolution or linear layer")
            )
        for i in range(first, min(last + 1, len(known))):
            if i in taken:
                raise ValueError(f"ratio: {taken[i]!r} and {piece!r} both name layer {i} ({known[i]})")
            taken[i] = piece
        rules.append((piece, r, known[first : last + 1]))
    return rules


def _by_stage(ratios: list[float], model: nn.Module, names: Sequence[str]) -> list[tuple[str, float, list[str]]]:
    found, places = _places(model, names)
    if len(ratios) != len(found) + 2:
        raise ValueError(
            f"ratio: expected {len(found) + 2} entries (before the first stage, {len(found)} stages, after the last), "
            f"got {len(ratios)}; the stages are {', '.join(found)}"
        )
    labels = ["before the first stage", *found, "after the last stage"]
    return [
        (f"entry {i} ({label})", r, reached)
        for i, (label, r, reached) in enumerate(zip(labels, ratios, _entries(found, places), strict=True))
    ]


Place = tuple[int, int | None, int | None]  # stage, block, convolution


def _entries(found: list[str], places: Mapping[str, Place]) -> list[list[str]]:
    entries: list[list[str]] = [[] for _ in range(len(found) + 2)]
    for name, (stage, _, _) in places.items():
        entries[stage].append(name)
    return entries


_NUMBERED = re.compile(r"(layer|stage|block|dense|dense_?block|group|res|s)_?\d+")
_LISTS = ("stages", "layers", "blocks")


def _places(model: nn.Module, names: Iterable[str] = (), who: str = "ratio") -> tuple[list[str], dict[str, Place]]:
    """Names of the stages, and the place of every layer and of every owner of ``names``.

    Stages count from 1; 0 is before the first, one more than the last is after it.  Blocks and convolutions count from
    0; None where a layer is in no stage or no block.
    """
    split = {name: _stage_of(plain) for name, plain in _plain_names(model, names).items()}
    series = list(dict.fromkeys(where[0] for where in split.values() if where))
    if len(series) != 1:
        none = "has no stages (modules called layer1, stages.0 or the like)"
        why = f"has several series of stages, {' and '.join(map(repr, series))}" if series else none
        way_out = "name layers" if who == "skip" else "give ratios by layer index, '[0-4:0.5]', or name, '*conv1:0.5'"
        raise ValueError(f"{who}: {type(model).__name__} {why}; {way_out}")
    found = list(dict.fromkeys(where[1] for where in split.values() if where))
    last_inside = max(i for i, where in enumerate(split.values()) if where)
    places: dict[str, Place] = {}
    blocks: dict[int, dict[str, int]] = {}  # by stage: block to its number
    convs: dict[tuple[int, int], int] = {}  # by stage and block: number of the last convolution
    stage = 0
    for i, (name, where) in enumerate(split.items()):
        if where is None:
            places[name] = (stage if i < last_inside else len(found) + 1, None, None)
            continue
        stage, key = found.index(where[1]) + 1, where[2]
        if key is None:
            places[name] = (stage, None, None)
            continue
        mine = blocks.setdefault(stage, {})
        block = mine.setdefault(key, len(mine))
        conv = convs[stage, block] = convs.get((stage, block), -1) + 1
        places[name] = (stage, block, conv)
    return found, places


def _stage_of(name: str) -> tuple[str, str, str | None] | None:
    """(series, stage, block) of a layer by its name alone."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if match := _NUMBERED.fullmatch(part):
            end, series = i + 1, ".".join([*parts[:i], f"{match[1]}*"])
        elif part in _LISTS and parts[i + 1 : i + 2] and parts[i + 1].isdigit():
            end, series = i + 2, ".".join([*parts[: i + 1], "*"])
        else:
            continue
        if end == len(parts):  # a layer by itself, as MNASNet's stem in "layers.0"
            return None
        rest = parts[end:]
        at = next((k for k, p in enumerate(rest) if p[-1].isdigit() and (k + 1 < len(rest) or k == 0)), None)
        return series, ".".join(parts[:end]), None if at is None else ".".join(rest[: at + 1])
    return None


def _reaches_nothing(what: str, reached: Sequence[str], names: Sequence[str], reasons: Mapping[str, str]) -> str:
    """The error for a ratio above 0 without a prunable layer."""
    first = f": {reached[0]}" if reached else ", it holds none"
    why = f" ({reasons[reached[0]]})" if reached and reached[0] in reasons else ""
    more = f" and {len(reached) - 1} more" if len(reached) > 1 else ""
    return f"ratio: {what!r} reaches no prunable layer{first}{why}{more}; prunable: {_some(names)}"


def _nearest(what: str, known: Iterable[str]) -> str:
    """The tail of an error: what looks like a misspelt name or pattern, down to parts of names; else some."""
    names = list(known)
    parts = [name.split(".") for name in names]
    ends = (".".join(split[:i]) for split in parts for i in range(len(split), 0, -1))
    near = get_close_matches(re.sub(r"[*?\[\]!]", "", what).strip("."), [*dict.fromkeys(ends)], n=3, cutoff=0.6)
    if near:
        return f"; nearest: {', '.join(near)}"
    return f"; known: {_some(names)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")


# From another network -----------------------------------------------------------------------------------------------

_INSIDE = ("state_dict", "model_state_dict", "model", "net")  # where checkpoints keep the tensors


def _load(source: Any) -> tuple[Mapping[str, Any], str]:
    """Tensors, keep-masks or kept indices by name, and what to call them in an error."""
    if isinstance(source, nn.Module):
        return source.state_dict(), f"the {type(source).__name__}"
    where = "the given mapping"
    if isinstance(source, (str, Path)):
        path, where = Path(source), str(source)
        if not path.is_file():
            raise ValueError(f"inherit: no file {where}")
        source = _read(path)
    if isinstance(source, nn.Module):
        source = source.state_dict()
    for key in _INSIDE:
        if isinstance(source, Mapping) and isinstance(source.get(key), Mapping):
            source = source[key]
    if not isinstance(source, Mapping) or not source:
        got = "nothing" if isinstance(source, Mapping) else type(source).__name__
        raise ValueError(f"inherit: expected a state_dict, keep-masks or kept indices in {where}, got {got}")
    return source, where


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(
            f"inherit: cannot read {path} ({why}); expected a state_dict saved by torch.save or as .safetensors, "
            "or a .json of kept indices.  A pickled module: load it yourself and pass the module"
        ) from e


def _is_keep_list(loaded: Mapping[str, Any]) -> bool:
    def chooses(value: Any) -> bool:
        return value.dtype == torch.bool if isinstance(value, Tensor) else isinstance(value, Sequence)

    return all(map(chooses, loaded.values()))


def _keep_mask(name: str, kept: Any, graph: ChannelGraph) -> Any:
    """A bool mask as it is; kept indices as a mask."""
    if isinstance(kept, Tensor) or name not in graph.groups:
        return kept  # check_keep names what is wrong
    size = graph.groups[name].size
    if not all(isinstance(i, int) and 0 <= i < size for i in kept) or len(set(kept)) < len(kept):
        raise ValueError(f"inherit: expected different indices from 0 to {size - 1} for {name}, got {list(kept)[:8]}")
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.tensor(kept, dtype=torch.int64), True)


def _unwrapped(key: str) -> str:
    """A tensor's name without what parallel training and torch.compile put in front of modules."""
    return ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))


class _Rows:
    """Where each layer's outputs lie in its weight."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.transposed = {n for n, m in model.named_modules() if getattr(m, "transposed", False)}

    def of(self, layer: str) -> tuple[str, Tensor, int]:
        """Name and values of its weight, and the dimension of its outputs."""
        name = next((n for n in (f"{layer}.weight", f"{layer}.in_proj_weight") if n in self.parameters), None)
        if name is None:
            raise ValueError(f"inherit: {layer} has no weight of its own to compare; give its ratio by name")
        return name, self.parameters[name], int(layer in self.transposed)


def _what_is_left(group: Group, mine: _Rows, tensors: Mapping[str, Tensor], where: str) -> int | Tensor:
    """Channels of a group that another network has: their number if it was made smaller, else a keep-mask, (C,)."""
    zero, left = torch.ones(group.size, dtype=torch.bool), {}
    for conv in group.convs:
        name, weight, dim = mine.of(conv)
        if (other := tensors.get(_unwrapped(name))) is None:
            raise ValueError(f"inherit: {where} has no {name}{_nearest(name, tensors)}")
        rows, full = other.shape[dim] if other.dim() == weight.dim() else -1, weight.shape[dim]
        position, channel = group.index[name, dim]
        if rows == full:
            dead = ~other.cpu().movedim(dim, 0)[position].flatten(1).any(1)
            zero &= torch.ones_like(zero).index_fill_(0, channel[~dead], False)
            left[conv] = group.size
            continue
        per_channel = full // group.size
        if not 0 < rows < full or rows % per_channel:
            raise ValueError(
                f"inherit: {name} of {where} is {tuple(other.shape)}, and this model's is {tuple(weight.shape)}"
            )
        if len(position) < full:
            raise ValueError(
                f"inherit: {name} of {where} has {rows} of {full} outputs, but only {len(position)} belong to "
                f"{group.name}; give ratios by name instead"
            )
        left[conv] = rows // per_channel
    if len(set(left.values())) > 1:
        raise ValueError(f"inherit: {where} has different numbers of channels in layers that share them: {left}")
    number = next(iter(left.values()))
    if number < group.size:
        return number
    if zero.all():
        raise ValueError(f"inherit: all {group.size} filters of {group.name} in {where} are zero; one must be left")
    return ~zero


def _exact_ratio(gone: int, size: int) -> float:
    """A ratio of which ``ceil(ratio * size)`` is ``gone``: 7 / 25 * 25 is above 7."""
    ratio = gone / size
    while math.ceil(ratio * size) > gone:
        ratio = math.nextafter(ratio, 0.0)
    return ratio
