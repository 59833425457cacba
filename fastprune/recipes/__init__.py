"""Published experiments, one YAML file per table; see docs/recipes.md.

A file holds what its recipes share and, under ``variants``, a list of axes: each recipe takes one entry of every axis,
which changes dotted keys, and is called ``<folder>/<file>-<entry>-<entry>``.  ``results`` gives the published numbers
of each by the entries' names, ``extends`` names a file of the same folder whose keys are the defaults.  In values
``$1`` is the entry of the first axis and ``$word`` what ``words`` has; all keys may be dotted, and notes add up.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fastprune.errors import did_you_mean
from fastprune.recipes.schema import PHASES, Recipe, build

__all__ = ["PHASES", "Recipe", "dump", "load", "names", "parse_set", "table"]

FOLDER = Path(__file__).parent
_FILE_KEYS = ("extends", "variants", "results")
_WORD = re.compile(r"\$(\d|[a-z]+)")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (1e-4 is one), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where}: no valid YAML: {' '.join(str(error).split())}") from error


def names() -> list[str]:
    """All recipes that come with the package, in the order of their files."""
    return list(_index())


@cache
def _index() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name of a recipe to its file, ``"greg/resnet56-cifar10"``, and the entries that it takes of the file's axes."""
    found = {}
    for path in sorted(FOLDER.glob("*/*.yaml")):
        file = f"{path.parent.name}/{path.stem}"
        if path.stem.startswith("_"):  # only there to be extended
            continue
        for entries in _combinations(_read(file)):
            found["-".join((file, *entries))] = (file, entries)
    return found


@cache
def _read(file: str) -> dict[str, Any]:
    return _yaml((FOLDER / f"{file}.yaml").read_text(encoding="utf-8"), f"recipe file {file}.yaml")


def _combinations(content: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    return itertools.product(*([str(key) for key in axis] for axis in content.get("variants", [])))


def load(name: str, *, tiny: bool = False, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe, checked.

    Args:
        name: One of :func:`names`, or the path of a YAML file with one recipe of your own.
        tiny: In its form for trials: minutes at most on a CPU.
        changes: Dotted keys to values, such as ``{"prune.ratio": 0.7}``, over all others.

    Raises:
        ValueError: No such recipe, or it does not hold together; the message names file and key.
    """
    raw, where = raw_recipe(name, tiny=tiny, changes=changes)
    return build(raw, where)


def raw_recipe(
    name: str, *, tiny: bool = False, changes: Mapping[str, Any] | None = None, start_of: tuple[str, ...] = ()
) -> tuple[dict[str, Any], str]:
    """The dict behind :func:`load`, not yet checked, and what errors call it.

    Data and model are those of the ``base``, where the recipe does not name others.

    Args:
        start_of: The recipes that start from this one, directly or by others.
    """
    chain = (*start_of, str(Path(name).resolve()) if _is_path(name) else name)
    if chain[-1] in start_of:
        raise ValueError(f"recipe {chain[0]}: base: it starts from itself: {' <- '.join(chain)}")
    raw, where = _own_file(name) if _is_path(name) else _shipped(name)
    if isinstance(raw.get("base"), str):
        raw["base"] = {"recipe": raw["base"]}
    if tiny:
        if not isinstance(raw.get("tiny", {}), Mapping) or not raw.get("tiny"):
            raise ValueError(f"{where}: tiny: missing, so that it has no form for --tiny")
        for key, value in raw["tiny"].items():
            if key.partition(".")[0] not in PHASES or raw.get(key.partition(".")[0]) is not None:
                put(raw, key, value, where)
    changes = dict(changes or {})
    of_base = {key: changes.pop(key) for key in list(changes) if key.partition(".")[0] == "base"}
    for key, value in of_base.items():
        put(raw, key, value, "--set")
    base = {"recipe": raw["base"]} if isinstance(raw.get("base"), str) else raw.get("base")  # by --set
    if isinstance(base, Mapping) and isinstance(base.get("recipe"), str):
        inherited, _ = raw_recipe(base["recipe"], tiny=tiny, changes=base.get("set"), start_of=chain)
        for key in ("data", "model"):  # before other changes: --set data.name=... keeps the base's mean and std
            own = raw.get(key, {})
            if isinstance(own, Mapping) and "name" not in own:
                raw[key] = merged(inherited.get(key), own)
    for key, value in changes.items():
        put(raw, key, value, "--set")
    return raw, where


def _shipped(name: str) -> tuple[dict[str, Any], str]:
    index = _index()
    if name not in index:
        near = did_you_mean(name, index).partition(" Known:")[0]
        raise ValueError(f"unknown recipe {name!r}{near} All {len(index)}: fastprune list recipes")
    file, entries = index[name]
    content, where = _read(file), f"recipe {name}"
    layers = [_read(f"{file.partition('/')[0]}/{content['extends']}")] if "extends" in content else []
    layers.append(content)
    for axis, entry in zip(content.get("variants", []), entries, strict=True):
        layers.append(next(value for key, value in axis.items() if str(key) == entry))
    results = {str(key): value for key, value in content.get("results", {}).items()}
    layers.append({"published": results.get("-".join(entries), {})})
    raw: dict[str, Any] = {}
    for key, value in ((key, value) for layer in layers for key, value in layer.items() if key not in _FILE_KEYS):
        put(raw, key, [*raw.get("notes", []), *value] if key == "notes" else value, where)
    words = {str(i): _yaml(entry, where) for i, entry in enumerate(entries, 1)}
    words |= _filled(raw.pop("words", {}), words, where)
    return _filled(raw, words, where) | {"name": name}, where


def _filled(value: Any, words: Mapping[str, Any], where: str) -> Any:
    """With ``$word`` replaced by what it stands for; a number stays one where it is the whole value."""
    if isinstance(value, Mapping):
        return {key: _filled(v, words, where) for key, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, words, where) for v in value]
    if not isinstance(value, str):
        return value
    for word in _WORD.findall(value):
        if word not in words:
            raise ValueError(f"{where}: ${word} in {value!r} stands for nothing{did_you_mean(word, words)}")
    if whole := _WORD.fullmatch(value):
        return words[whole[1]]
    return _WORD.sub(lambda match: str(words[match[1]]), value)


def _own_file(name: str) -> tuple[dict[str, Any], str]:
    path = Path(name)
    try:
        raw = _yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read recipe {path}: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(raw).__name__}")
    base = raw.get("base")
    of = base.get("recipe") if isinstance(base, Mapping) else base
    if isinstance(of, str) and _is_path(of):  # beside this file, and found from the run's folder too
        raw["base"] = {**(base if isinstance(base, Mapping) else {}), "recipe": str((path.parent / of).resolve())}
    return {"name": path.stem, **raw}, str(path)


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def merged(low: Any, high: Any) -> Any:
    """``high`` over ``low``, dicts key by key; neither is changed."""
    if isinstance(low, Mapping) and isinstance(high, Mapping):
        return {key: merged(low.get(key), high[key]) if key in high else low[key] for key in {**low, **high}}
    return high


def put(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key."""
    *path, last = str(key).split(".")
    for i, part in enumerate(path):
        if raw.get(part) is None:
            raw[part] = {}
        raw = raw[part]
        if not isinstance(raw, dict):
            raise ValueError(f"{where}: {key}: {'.'.join(path[: i + 1])} is {raw!r} and has no keys")
    raw[last] = merged(raw.get(last), copy.deepcopy(value))  # a file's values are shared, by anchors too


def table(pattern: str | None = None) -> str:
    """Recipes and the numbers that they are held against, one per line.

    Args:
        pattern: Part of a name, or with ``*`` all of it; None: all recipes.

    Raises:
        ValueError: No name fits.
    """
    glob = pattern if pattern and any(c in pattern for c in "*?[") else f"*{pattern or ''}*"
    found = [name for name in names() if fnmatchcase(name, glob)]
    if not found:
        raise ValueError(f"list: no recipe fits {pattern!r}; leave it out to see all {len(names())}")
    rows = [("recipe", "data", "method", "accuracy", "speedup", "where")]
    for name in found:
        r = load(name)
        p, pruning = r.published, r.prune or r.train or r.scratch
        spread = f" +- {p.acc_std:.2%}" if p.acc_std is not None else ""
        acc = f"{p.acc:.2%}{spread}" if p.acc is not None else "-"
        speedup = f"{p.speedup:g}x" if p.speedup is not None else "-"
        rows.append((name, r.data.name, pruning.method or "-", acc, speedup, p.where or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """``["prune.ratio=0.7"]`` to ``{"prune.ratio": 0.7}``; values are YAML.

    Raises:
        ValueError: No ``=``, or no YAML behind it.
    """
    found = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"--set: expected key=value such as finetune.epochs=10, got {text!r}")
        found[key] = _yaml(value, f"--set {key}")
    return found


def dump(recipe: Recipe) -> str:
    """As YAML, with all defaults but the empty ones written out; :func:`load` reads it back."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False, width=110, allow_unicode=True)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        shown = {f.name: (getattr(value, f.name), f.default) for f in fields(value)}
        empty = (None, "", (), {})
        return {
            key: _plain(v) for key, (v, default) in shown.items() if v not in empty or default not in (*empty, MISSING)
        }
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
