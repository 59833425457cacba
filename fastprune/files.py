"""``fastprune show``, ``eval``, ``compact`` and ``export``: what the command line does with saved networks and runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml
from torch import Tensor, nn

from fastprune import checkpoint, data, methods, models
from fastprune.compact import compact
from fastprune.errors import FastpruneError, did_you_mean, in_a_line
from fastprune.export import FORMATS, export
from fastprune.flops import flops
from fastprune.graph import trace
from fastprune.latency import latency
from fastprune.methods.iterative import IterativeMethod
from fastprune.nn import convert_batchnorm
from fastprune.plain import fold, to_plain
from fastprune.report import find, read
from fastprune.report.runs import Run, object_of
from fastprune.report.svg import number
from fastprune.train import evaluate

Shape = tuple[int, int, int]


# What there is --------------------------------------------------------------------------------------------------------


def show(path: Path, *, shape: Shape | None = None, lists: bool = False, as_json: bool = False) -> int:
    """Print what a checkpoint or a run is: network, cost, widths, method, recipe.

    Args:
        path: A file of :func:`fastprune.save`, or a run folder.
        shape: (C, H, W) of an input, to count MACs; None: as noted in the file, if it is.
        lists: Also the indices that are left.
        as_json: The checkpoint's whole document instead, or a list with run.json and result.json of each run, as JSON.

    Returns: 0, the exit code.

    Raises:
        CheckpointError: No checkpoint of ours.
        ValueError: A folder without a run, or a network that does not run on ``shape``.
    """
    if path.is_dir():
        if not (runs := find(path)):
            raise ValueError(f"show: expected a checkpoint or a run folder, got {path}, which holds no run")
        if as_json:
            print(json.dumps([_about_run(read(each)) for each in runs], indent=1))
            return 0
        for each in runs:
            _show_run(read(each))
        return 0
    document = checkpoint.read(path)
    if as_json:
        print(json.dumps(document, indent=1))
        return 0
    print(
        f"{path}: {path.stat().st_size / 1e6:.2f} MB, by fastprune {document['fastprune']}, torch {document['torch']}"
    )
    facts = {"network": _call(document["architecture"]), "method": _method(document["method"])}
    sizes = {name: t["shape"] for name, t in document["tensors"].items()}
    before = sizes | {name: cut["shape"] for name, cut in document["keep"].items()}
    numbers = [sum(map(_count, of.values())) for of in (before, sizes)]
    facts["tensors"] = f"{_change(*numbers)} numbers, statistics included"
    if document["architecture"] is not None:
        facts |= _cost(path, document, shape or _noted_shape(document, path))
    for key in ("recipe", "extra"):
        if document[key]:
            facts[key] = json.dumps(document[key])
    _print(facts)
    widths = [(name, cut["shape"], sizes[name]) for name, cut in document["keep"].items() if len(cut["shape"]) > 1]
    if not widths:
        print("nothing was removed" if not document["keep"] else "only vectors were cut")
        return 0
    print("\nlayers that were cut: outputs, inputs")
    width = max(len(name) for name, *_ in widths)
    for name, old, new in widths:
        ins = f"{new[1]:>5} of {old[1]:<5}" if old[1] != new[1] else f"{new[1]:>5}"
        print(f"  {name:{width}}  {new[0]:>5} of {old[0]:<5} {ins}".rstrip())
    if lists:
        print("\nindices that are left, by tensor and dimension")
        for name, cut in document["keep"].items():
            for dim, ranges in cut["dims"].items():
                pairs = zip(ranges[::2], ranges[1::2], strict=True)
                print(f"  {name} {dim}: {', '.join(f'{a}' if b == a + 1 else f'{a}-{b - 1}' for a, b in pairs)}")
    return 0


def _show_run(run: Run) -> None:
    place = os.path.relpath(run.path)
    print(f"{place}: {run.name}" + ("" if run.seed is None else f", seed {run.seed}"))
    facts = {key: str(run.facts[key]) for key in ("arch", "dataset", "method", "device") if run.facts.get(key)}
    _print({"state": run.state} | facts | {f"problem {i}": text for i, text in enumerate(run.problems, 1)})
    for what, macs, acc in run.points:
        print(f"  {what:20} {acc:8.2%}  {number(macs):>8} MACs")
    if (best := run.last("acc_best")) is not None:
        print(f"  {'best epoch':20} {best:8.2%}")
    if isinstance(acc := run.published.get("acc"), float):
        print(f"  {'published':20} {acc:8.2%}")
    if kept := run.kept:
        print("  widths " + " ".join(f"{now}/{before}" for now, before in kept.values()))
    if files := sorted(p.name for p in run.path.glob("*.safetensors")):
        print(f"  networks {', '.join(files)}: fastprune show {os.path.join(place, files[0])}")


def _about_run(run: Run) -> dict[str, Any]:
    known = {"path": os.path.relpath(run.path), "state": run.state}
    return (
        known
        | {name: object_of(run, f"{name}.json") or None for name in ("run", "result")}
        | {"problems": list(dict.fromkeys(run.problems))}
    )


def _print(facts: Mapping[str, str]) -> None:
    width = max(map(len, facts))
    for key, text in facts.items():
        print(f"  {key:{width}}  {text}")


def _call(architecture: Mapping[str, Any] | None) -> str:
    if architecture is None:
        return "not one of fastprune.models: build it yourself, fp.load(path, model_fn)"
    return ", ".join([architecture["name"], *(f"{key}={value}" for key, value in architecture["arguments"].items())])


def _method(about: Any) -> str:
    if not isinstance(about, dict):
        return "not noted"
    words = [f"{key} {about[key]}" for key in ("ratio", "target", "scope") if about.get(key) is not None]
    return ", ".join([str(about.get("name")), *words])


def _change(before: int, now: int) -> str:
    return f"{now:,}" + (f" of {before:,} ({now / before:.1%})" if now < before else "")


def _count(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _cost(path: Path, document: dict[str, Any], shape: Shape | None) -> dict[str, str]:
    """MACs and parameters, now and before."""
    try:
        small = checkpoint.load(path)
        whole = models.create(document["architecture"]["name"], **document["architecture"]["arguments"])
    except (FastpruneError, ValueError) as error:  # timm's, where it is not installed
        return {"parameters": f"unknown: {error}"}
    params = [sum(p.numel() for p in m.parameters()) for m in (whole, small)]
    facts = {"parameters": _change(*params)}
    if shape is None:
        return facts | {"MACs": "say of which input: --input 3x224x224"}
    with running(f"an input of {text_of(shape)}"):
        macs = [flops(m, torch.zeros(1, *shape))["macs"] for m in (whole, small)]
    return facts | {"MACs": f"{_change(*macs)}, for an input of {text_of(shape)}"}


def _noted_shape(document: Mapping[str, Any], path: Path) -> Shape | None:
    """Of an input: as the file says, or the run that it lies in."""
    extra = document["extra"]
    noted = extra.get("input") if isinstance(extra, dict) else None
    if noted is None and (about := path.parent / "run.json").is_file():
        try:
            noted = json.loads(about.read_text())["data"]["image_shape"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    fits = isinstance(noted, list) and len(noted) == 3 and all(type(n) is int and 0 < n < 1 << 15 for n in noted)
    return tuple(noted) if fits and _count(noted) <= 1 << 24 else None  # nobody's file makes us fill the memory


def text_of(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# Networks -------------------------------------------------------------------------------------------------------------


def running(what: str, hint: str = "; name the right one with --input") -> AbstractContextManager[None]:
    """Say in a line that a network does not run on ``what``: its own code may raise anything."""
    return in_a_line(f"the network does not run on {what}", hint)


def maker(text: str) -> Callable[[], nn.Module]:
    """``FILE.py:FUNCTION``, a function of your own that makes the network as it was before it was cut.

    Raises:
        ValueError: No such file or function, or it fails when run.
    """
    file, _, name = text.rpartition(":")
    path = Path(file)
    if not name.isidentifier() or path.suffix != ".py":
        raise ValueError(f"--model: expected FILE.py:FUNCTION, got {text!r}")
    if not path.is_file():
        raise ValueError(f"--model: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # as python FILE.py would find what it imports

    def told(what: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:  # of the user's own code: any
            raise ValueError(f"--model: {what} failed: {type(error).__name__}: {error}") from error

    told(str(path), lambda: spec.loader.exec_module(module))
    if not callable(make := getattr(module, name, None)):
        raise ValueError(f"--model: {path} has no function {name}")
    return lambda: told(text, make)


def network(
    name: str, model: str | None, *, classes: int | None = None, weights: str | None = None
) -> tuple[nn.Module, dict[str, Any] | None]:
    """A checkpoint's network and document, or the network of that name and None.

    Raises:
        ValueError, CheckpointError: There is neither.
    """
    path = Path(name)
    if path.is_file() or os.sep in name or path.suffix in (".safetensors", ".pt", ".pth", ".onnx"):
        if classes is not None or weights is not None:
            raise ValueError(f"--classes and --weights are for networks by name; {path} is a file")
        return saved(path, model)
    if weights is not None:
        if name in models.MODELS or name not in models.list_models():
            raise ValueError(f"--weights: they are torchvision's, and {name} is no network of it")
        names = [*(w.name for w in torchvision.models.get_model_weights(name)), "DEFAULT"]
        if weights not in names:
            raise ValueError(f"--weights: {name} has no {weights!r}{did_you_mean(weights, names)}")
    made_of = {} if weights is None else {"weights": weights}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torchvision, about how it will initialise
        try:
            return models.create(name, 1000 if classes is None else classes, **made_of), None
        except OSError as error:
            raise ValueError(f"--weights: cannot get {weights} of {name}: {error}") from error


def saved(path: Path, model: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """A checkpoint's network and document; ``model``: see :func:`maker`."""
    document = checkpoint.read(path)
    return checkpoint.load(path, maker(model) if model else None), document


def _shape(shape: Shape | None, document: dict[str, Any] | None, path: Path) -> Shape:
    shape = shape or (_noted_shape(document, path) if document else None)
    if shape is None:
        raise ValueError("expected the size of an input, which is not noted in the file: --input 3x224x224")
    return shape


# What is done with them -----------------------------------------------------------------------------------------------


def test(
    path: Path,
    dataset: str,
    *,
    root: Path | None = None,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 250,
    limit: int | None = None,
    device: str | None = None,
    with_latency: bool = False,
) -> int:
    """Print the accuracy of a saved network on the test images of a data set.

    Args:
        options: Of the data set; ``image_size`` of ``imagefolder`` is as noted in the file, if it is.

    Returns: 0, the exit code.

    Raises:
        CheckpointError, DataError: File or data are missing or damaged.
        ValueError: The network does not fit the data.
    """
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    small, document = saved(path, model)
    options, noted = dict(options or {}), _noted_shape(document, path)
    if dataset == "imagefolder" and noted:
        options = {"image_size": noted[1]} | options
    known = _data_of_run(path, dataset)
    options = known.pop("options", {}) | options
    with in_a_line(f"{dataset} cannot be made with {options}", "; mend what --set says"):
        images = data.load(dataset, root, device=device, limit=limit, **known, **options)
    loader = images.loaders(batch_size).test
    small = small.to(device)
    with running(
        f"images of {dataset}, {text_of(images.image_shape)}", "; it was made for others, see --dataset and --set"
    ):
        outputs = small.eval()(next(iter(loader))[0][:1])
        if not isinstance(outputs, Tensor) or outputs.shape[1:] != (len(images.classes),):
            got = tuple(outputs.shape[1:]) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"expected {len(images.classes)} outputs, a class of {dataset} each, got {got}")
        found = evaluate(small, loader)
        cost = flops(small, torch.zeros(1, *images.image_shape, device=device))
    print(
        f"{path}: {found['acc']:.2%} right of {len(images.test_labels):,} test images of {dataset}, cross-entropy "
        f"{found['loss']:.4f}; {number(cost['macs'])} MACs, {number(cost['params'])} parameters"
    )
    if with_latency:
        print(latency(small, next(iter(loader))[0][:batch_size]))
    return 0


def _data_of_run(path: Path, dataset: str) -> dict[str, Any]:
    """How the run that a network lies in brought these images to it: options, and mean and std other than usual."""
    recipe = path.parent / "recipe.yaml"
    try:
        about = yaml.safe_load(recipe.read_text()) if recipe.is_file() else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{recipe}: no valid YAML; mend or remove it") from error
    about = about.get("data") if isinstance(about, dict) else None
    if not isinstance(about, dict) or about.get("name") != dataset:
        return {}
    found = {key: tuple(about[key]) for key in ("mean", "std") if isinstance(about.get(key), list)}
    if found:
        print(f"normalised as in {recipe}: {', '.join(f'{key} {list(value)}' for key, value in found.items())}")
    return found | {"options": about["options"]} if isinstance(about.get("options"), dict) else found


def shrink(
    name: str,
    out: Path,
    *,
    model: str | None = None,
    classes: int | None = None,
    weights: str | None = None,
    shape: Shape | None = None,
    keep: Path | None = None,
    method: str = "l1",
    options: Mapping[str, Any] | None = None,
    **aim: Any,
) -> int:
    """Cut a network by one look at its weights, or by lists of what to keep, and save it.

    Args:
        name: A checkpoint, or a name for :func:`fastprune.models.create`.
        keep: JSON, ``{"group": [indices that stay]}``; in place of a method.
        method: One that needs neither data nor training steps.
        options: Of the method.
        aim: ``ratio``, ``target_macs``, ``target_params`` or ``target_latency_ms``, and ``scope``.

    Returns: 0, the exit code.

    Raises:
        ValueError, GraphError, CheckpointError: As the functions it is made of.
    """
    if not out.parent.is_dir() or out.is_dir():
        wrong = f"{out} is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise ValueError(f"--out: expected a file to write, but {wrong}")
    aim = {key: value for key, value in aim.items() if value is not None}
    if keep is not None and (aim or options):
        raise ValueError(f"--keep says all; leave out {', '.join(sorted([*aim, *(options or {})]))}")
    net, document = network(name, model, classes=classes, weights=weights)
    shape = _shape(shape, document, Path(name))
    if keep is None and method == "rni" and document is None:
        convert_batchnorm(net, bound="sigmoid")
    with running(f"an input of {text_of(shape)}"):
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        before = flops(net, x[:1])
    graph = trace(net, x)
    if keep is not None:
        masks, pruner = _masks(keep, {key: group.size for key, group in graph.groups.items()}), None
    else:
        pruner = methods.create(int(method) if method.isdecimal() else method, net, x, **aim, **(options or {}))
        if _needs_steps(pruner):
            raise ValueError(
                f"--method: {method} needs training steps; use your own loop (docs/plug-into-your-loop.md), or one of "
                f"{', '.join(ONE_LOOK)}"
            )
        if getattr(pruner, "by_weight", False):
            raise ValueError(
                "--set group: single weights leave the network as large as it was; cut filters or channels"
            )
        masks, graph = pruner.keep_masks(), pruner.graph
    compact(net, masks, x, graph=graph)
    after = flops(net, x[:1])
    checkpoint.save(net, out, method=pruner, extra={"input": list(shape)})
    left, had = (sum(f(m) for m in masks.values()) for f in (lambda m: int(m.sum()), len))
    print(
        f"{out}: {left} of {had} channels, {number(before['macs'])} -> {number(after['macs'])} MACs "
        f"({after['macs'] / before['macs']:.1%}), {number(before['params'])} -> {number(after['params'])} parameters; "
        "proven equal to the masked network"
    )
    if document is None and weights is None:
        print("its weights are random: name a checkpoint, or give --weights, for a trained network")
    return 0


def _needs_steps(pruner: methods.Method) -> bool:
    if isinstance(pruner, IterativeMethod):
        return pruner.per_step or pruner.cuts is not None
    return not getattr(pruner, "finished", True)


ONE_LOOK = ("bn-scale", "l1", "max", "random", "rni", "slimming", "ucs")


def _masks(path: Path, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Keep-masks of a file of lists.

    Raises:
        ValueError: It has another form, or names groups or channels that are not there.
    """
    try:
        lists = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--keep: {path} is no JSON: {error}") from error
    if not isinstance(lists, dict) or not lists:
        raise ValueError(f'--keep: expected {{"group": [indices that stay]}} in {path}, got {str(lists)[:60]}')
    masks = {}
    for name, indices in lists.items():
        if name not in sizes:
            hint = did_you_mean(name, sizes) if len(sizes) < 40 else ""
            raise ValueError(f"--keep: the network has no group {name!r}{hint}")
        size = sizes[name]
        fits = isinstance(indices, list) and all(type(i) is int and 0 <= i < size for i in indices)
        if not fits or not indices:
            raise ValueError(f"--keep: expected indices from 0 to {size - 1} for {name}, got {str(indices)[:60]}")
        masks[name] = torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.tensor(indices), True)
    return masks


def write(
    path: Path,
    out: Path | None,
    *,
    format: str | None = None,
    model: str | None = None,
    shape: Shape | None = None,
    folded: bool = False,
    batch: int | None = None,
    opset: int | None = None,
    check: bool = True,
) -> int:
    """Write a saved network to a file that serves without fastprune.

    Args:
        out: Ends in ``.onnx`` or ``.pt2``; None: beside ``path``, with the suffix of ``format``.
        format: ``"onnx"`` or ``"pt2"``.
        folded: Norms folded into the convolutions before them.
        batch: A fixed batch size; None: any.

    Returns: 0, the exit code.

    Raises:
        ValueError, CheckpointError, ExportError: As the functions it is made of.
    """
    if out is None:
        if format is None:
            raise ValueError("expected --format onnx or pt2, or --out FILE.onnx or FILE.pt2")
        out = path.with_suffix(f".{format}")
    elif format is not None and out.suffix != f".{format}":
        raise ValueError(f"--format {format} does not fit {out}; leave one out")
    if out.suffix not in FORMATS.values():
        raise ValueError(f"--out: expected a name that ends in {' or '.join(FORMATS.values())}, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"--out: expected a file to write, but there is no folder {out.parent}")
    net, document = saved(path, model)
    shape = _shape(shape, document, path)
    with running(f"an input of {text_of(shape)}"):
        x = torch.randn(batch or 2, *shape, generator=torch.Generator().manual_seed(0))
        net.eval()(x)
    net = to_plain(net.eval(), x)
    if folded:
        net = fold(net, x)
    print(export(net, out, x, dynamic_batch=batch is None, opset=opset, check=check))
    return 0


def shape_of(text: str) -> Shape:
    """``"3x224x224"`` as numbers.

    Raises:
        ValueError: Another form.
    """
    if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}x[1-9]\d{0,4}", text):
        raise ValueError(f"expected CHANNELSxHEIGHTxWIDTH such as 3x224x224, got {text!r}")
    return tuple(map(int, text.split("x")))
