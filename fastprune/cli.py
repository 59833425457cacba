"""The ``fastprune`` command.

A command is a row of ``COMMANDS``: what it does, a function that runs it and returns the exit code, its options.  Bad
input ends in one line on stderr that says what to do: exit code 2 for the command line itself, 1 for what it asked for.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

import fastprune
from fastprune.errors import FastpruneError, did_you_mean


class UsageError(ValueError):
    """The command line does not parse."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse prints the whole usage and exits here
        raise UsageError(f"{message}; see {self.prog} --help")


class Command(NamedTuple):
    help: str
    run: Callable[[argparse.Namespace], int]
    options: dict[str, dict[str, Any]]  # name, or flags: keywords of add_argument
    example: str = ""  # shown below the help


def _quickstart(args: argparse.Namespace) -> int:
    from fastprune import quickstart

    return quickstart.run(args.out, seed=args.seed, epochs=args.epochs)


def _oracle(args: argparse.Namespace) -> int:
    from fastprune import study

    options = {key: value for key, value in vars(args).items() if key not in ("run", "command", "traceback", "methods")}
    return study.run(**options, criteria=args.methods or study.CRITERIA)


def _show(args: argparse.Namespace) -> int:
    from fastprune import files

    return files.show(args.file, shape=args.input, lists=args.lists, as_json=args.json)


def _eval(args: argparse.Namespace) -> int:
    from fastprune import files

    options = {key: getattr(args, key) for key in ("root", "model", "batch_size", "limit", "device")}
    return files.test(args.file, args.dataset, **options, options=dict(args.set), with_latency=args.latency)


def _compact(args: argparse.Namespace) -> int:
    from fastprune import files

    names = ("model", "classes", "weights", "keep", "method", "ratio", "scope")
    options = {key: getattr(args, key) for key in (*names, "target_macs", "target_params", "target_latency_ms")}
    return files.shrink(args.network, args.out, **options, shape=args.input, options=dict(args.set))


def _export(args: argparse.Namespace) -> int:
    from fastprune import files

    options = {key: getattr(args, key) for key in ("format", "model", "batch", "opset")}
    return files.write(args.file, args.out, **options, shape=args.input, folded=args.fold, check=not args.no_check)


def _bench(args: argparse.Namespace) -> int:
    from fastprune import speed

    return speed.run(args.ops, device=args.device, rounds=args.rounds)


def _report(args: argparse.Namespace) -> int:
    from fastprune import report

    return report.run(args.runs, args.out, title=args.title)


def _run(args: argparse.Namespace) -> int:
    from fastprune import parallel, recipes, run

    given = {"changes": recipes.parse_set(args.set), "seed": args.seed, "device": args.device, "root": args.data}
    fastprune.tune_cpu_memory()  # the process is ours: steps on a CPU need not fault in their pages again and again
    if args.dry_run:
        run.dry_run(args.recipe, **given, tiny=args.tiny)
    else:
        options = {"resume": args.resume, "tiny": args.tiny, "runs": args.out, "tensorboard": args.tensorboard}
        out = run.run(args.recipe, **given, **options)
        if parallel.rank() == 0:
            print(f"results are in {out}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from fastprune import doctor

    return doctor.run()


def _list(args: argparse.Namespace) -> int:
    from fastprune import data, methods, models, recipes

    if args.pattern is not None and args.what != "recipes":
        raise UsageError(f"list: a pattern goes with recipes, got {args.pattern!r}")
    if args.what == "recipes":
        print(recipes.table(args.pattern))
        return 0
    torchvision = [name for name in models.list_models() if name not in models.MODELS]
    tables = {"models": models.MODELS, "methods": methods.METHODS, "datasets": data.DATASETS}
    for what, table in tables.items():
        if args.what in (None, what):
            print(what)
            width = max(map(len, table))
            for name, thing in sorted(table.items()):
                first = (inspect.getdoc(thing) or "").partition("\n")[0]
                print(f"  {name:{width}}  {first}".rstrip())
            if what == "models":
                print("  and torchvision's:")
                print(textwrap.fill(", ".join(torchvision), 110, initial_indent="    ", subsequent_indent="    "))
    if args.what is None:
        print(f"recipes\n  {len(recipes.names())} published experiments: fastprune list recipes")
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {text!r}")
    return int(text)


def _dataset(text: str) -> str:
    from fastprune.data import DATASETS

    if text not in DATASETS:
        raise argparse.ArgumentTypeError(f"unknown data set {text!r}{did_you_mean(text, DATASETS)}")
    return text


def _criterion(text: str) -> str:
    from fastprune import study

    try:
        return study.criterion_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _device(text: str) -> str:
    try:
        if torch.empty(0, device=text).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0].partition(". ")[0]  # PyTorch goes on for a thousand characters
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {why}") from error
    return text


def _shape(text: str) -> tuple[int, int, int]:
    from fastprune import files

    try:
        return files.shape_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _option(text: str) -> tuple[str, Any]:
    """``name=value``, the value as YAML reads it."""
    import yaml

    name, equals, value = text.partition("=")
    try:
        if not equals or not name.isidentifier():
            raise ValueError
        return name, yaml.safe_load(value)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"expected name=value such as coupled=true, got {text!r}") from error


def _amount(text: str) -> float:
    try:
        if (value := float(text)) > 0:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")


def _ratio(text: str) -> float | str:
    """A number, or shares by stage, layer or name, as docs/ratios.md has them."""
    try:
        return float(text)
    except ValueError:
        return text


DEVICE = {"type": _device, "metavar": "NAME", "help": "such as cpu or cuda:0 (the first GPU if there is one)"}
FILE = {"type": Path, "metavar": "FILE", "help": "a network that fp.save wrote"}
INPUT = {"type": _shape, "metavar": "CxHxW", "help": "size of an input, such as 3x224x224 (as the file says)"}
MODEL = {
    "metavar": "FILE.py:FUNCTION",
    "help": "makes your own network as it was before cutting; runs that file (not needed for fp.models' networks)",
}
COMMANDS = {
    "quickstart": Command(
        "train, prune and fine-tune a small network on handwritten digits: CPU, about 3 minutes",
        _quickstart,
        {
            "--out": {
                "type": Path,
                "default": Path("runs/quickstart"),
                "metavar": "DIR",
                "help": "where results go (%(default)s)",
            },
            "--seed": {"type": int, "default": 0, "metavar": "N", "help": "of every random choice (%(default)s)"},
            "--epochs": {"type": _count, "default": None, "metavar": "N", "help": "of each training and fine-tuning"},
        },
        "fastprune quickstart --out runs/quickstart --seed 1",
    ),
    "run": Command(
        "a published experiment, or your own: train, prune, fine-tune",
        _run,
        {
            "recipe": {"metavar": "RECIPE", "help": "see fastprune list recipes; or the path of a YAML file"},
            "--set": {
                "action": "append",
                "default": [],
                "metavar": "KEY=VALUE",
                "help": "change the recipe, such as prune.ratio=0.7 (repeatable)",
            },
            "--seed": {"type": int, "metavar": "N", "help": "of every random choice (the recipe's)"},
            "--data --root": {"type": Path, "metavar": "DIR", "help": "folder of the data set"},
            "--out": {
                "type": Path,
                "default": Path("runs"),
                "metavar": "DIR",
                "help": "folder of all runs (%(default)s)",
            },
            "--resume": {"action": "store_true", "help": "continue the run that --out holds"},
            "--tiny": {"action": "store_true", "help": "the recipe's form for trials: small, on synthetic data"},
            "--tensorboard": {"action": "store_true", "help": "write TensorBoard events into the run's folder as well"},
            "--dry-run": {"action": "store_true", "help": "say what it would do, what it would cost, and do nothing"},
            "--device": DEVICE,
        },
        "fastprune run rni/vgg16-cifar10-rni-0.9 --tiny",
    ),
    "oracle": Command(
        "how well each criterion ranks channels as removing them one by one does",
        _oracle,
        {
            "--out": {
                "type": Path,
                "default": Path("runs/oracle"),
                "metavar": "DIR",
                "help": "where results go (%(default)s)",
            },
            "--dataset": {
                "type": _dataset,
                "default": "digits",
                "metavar": "NAME",
                "help": "see fastprune list datasets (%(default)s)",
            },
            "--root --data": {"type": Path, "metavar": "DIR", "help": "folder of the data set"},
            "--name": {"metavar": "TEXT", "help": "what the report calls the data (the folder's name)"},
            "--arch": {"default": "resnet20", "metavar": "NAME", "help": "see fastprune list models (%(default)s)"},
            "--epochs": {"type": _count, "default": 10, "metavar": "N", "help": "of training (%(default)s)"},
            "--batch-size": {"type": _count, "default": 64, "metavar": "N", "help": "images (%(default)s)"},
            "--lr": {"type": float, "default": 0.1, "metavar": "X", "help": "learning rate (%(default)s)"},
            "--limit": {"type": _count, "metavar": "N", "help": "at most so many training and test images"},
            "--images": {
                "type": _count,
                "default": 512,
                "metavar": "N",
                "help": "training images for the oracle and the criteria (%(default)s)",
            },
            "--methods": {
                "type": _criterion,
                "nargs": "+",
                "metavar": "M",
                "help": "criteria by name or number, such as taylor-gate or 22 (all)",
            },
            "--variant": {
                "choices": ("paper", "code"),
                "default": "paper",
                "help": "criteria as in Taylor's paper or as in its authors' code (%(default)s)",
            },
            "--seed": {"type": int, "default": 0, "metavar": "N", "help": "of every random choice (%(default)s)"},
            "--device": DEVICE,
            "--resume": {"action": "store_true", "help": "continue, or reuse, the training that --out holds"},
        },
        "fastprune oracle --dataset imagefolder --root photos --arch resnet18 --methods taylor-gate fisher",
    ),
    "show": Command(
        "what a saved network or a run is: cost, widths, method, recipe",
        _show,
        {
            "file": {"type": Path, "metavar": "FILE|RUN", "help": "a network that fp.save wrote, or a run folder"},
            "--input": INPUT,
            "--lists": {"action": "store_true", "help": "also which channels are left"},
            "--json": {"action": "store_true", "help": "all that the file says of itself, as JSON"},
        },
        "fastprune show small.safetensors --input 3x224x224",
    ),
    "eval": Command(
        "accuracy of a saved network on the test images of a data set",
        _eval,
        {
            "file": FILE,
            "--dataset": {
                "type": _dataset,
                "required": True,
                "metavar": "NAME",
                "help": "see fastprune list datasets; imagefolder for your own images",
            },
            "--root --data": {"type": Path, "metavar": "DIR", "help": "folder of the data set"},
            "--set": {
                "type": _option,
                "action": "append",
                "default": [],
                "metavar": "NAME=VALUE",
                "help": "option of the data set, such as image_size=224 (as the file says; repeatable)",
            },
            "--batch-size": {"type": _count, "default": 250, "metavar": "N", "help": "images (%(default)s)"},
            "--limit": {"type": _count, "metavar": "N", "help": "at most so many images"},
            "--latency": {"action": "store_true", "help": "also milliseconds, layer by layer"},
            "--model": MODEL,
            "--device": DEVICE,
        },
        "fastprune eval small.safetensors --dataset imagefolder --root photos",
    ),
    "compact": Command(
        "cut a network by a look at its weights, or by lists of what to keep; save what is left",
        _compact,
        {
            "network": {"metavar": "FILE|NAME", "help": "a saved network, or one of fastprune list models, or timm's"},
            "--out": {"type": Path, "required": True, "metavar": "FILE", "help": "the smaller network (.safetensors)"},
            "--input": INPUT,
            "--method": {"default": "l1", "metavar": "NAME", "help": "one that needs no training (%(default)s)"},
            "--ratio": {"type": _ratio, "metavar": "X", "help": "share of channels to remove, or by layer (0.5)"},
            "--scope": {"choices": ("global", "local"), "help": "rank all layers together, or each (the method's)"},
            "--target-macs": {
                "type": _amount,
                "metavar": "X",
                "help": "instead: multiply-accumulates, share or number",
            },
            "--target-params": {"type": _amount, "metavar": "X", "help": "instead: parameters, share or number"},
            "--target-latency-ms": {"type": _amount, "metavar": "X", "help": "instead: milliseconds of a forward"},
            "--set": {
                "type": _option,
                "action": "append",
                "default": [],
                "metavar": "NAME=VALUE",
                "help": "option of the method, such as round_to=8 (repeatable)",
            },
            "--keep": {"type": Path, "metavar": "JSON", "help": "instead of a method: {group: [indices that stay]}"},
            "--classes": {"type": _count, "metavar": "N", "help": "outputs of a network by name (1000)"},
            "--weights": {"metavar": "NAME", "help": "of torchvision for a network by name, such as DEFAULT"},
            "--model": MODEL,
        },
        "fastprune compact resnet18 --weights DEFAULT --input 3x224x224 --target-macs 0.5 --out small.safetensors",
    ),
    "export": Command(
        "write a saved network as ONNX or torch.export, read back and checked",
        _export,
        {
            "file": FILE,
            "--format": {"choices": ("onnx", "pt2"), "help": "of the file (as --out ends)"},
            "--out": {"type": Path, "metavar": "FILE", "help": "where to (beside the network)"},
            "--input": INPUT,
            "--fold": {"action": "store_true", "help": "fold norms into the convolutions before them"},
            "--batch": {"type": _count, "metavar": "N", "help": "only batches of this size (any)"},
            "--opset": {"type": _count, "metavar": "N", "help": "of ONNX (the exporter's default)"},
            "--no-check": {"action": "store_true", "help": "do not compare the file with the network"},
            "--model": MODEL,
        },
        "fastprune export small.safetensors --format onnx --fold",
    ),
    "bench": Command(
        "how fast the ops are on this machine, against plain PyTorch: about half a minute",
        _bench,
        {
            "ops": {"nargs": "*", "metavar": "OP", "help": "only these, such as batch_norm_act or train_step"},
            "--rounds": {"type": _count, "default": 9, "metavar": "N", "help": "samples of each side (%(default)s)"},
            "--device": DEVICE,
        },
        "fastprune bench batch_norm_act train_step",
    ),
    "report": Command(
        "one self-contained HTML page about one or more runs: accuracy, widths, importances, cost",
        _report,
        {
            "runs": {"type": Path, "nargs": "+", "metavar": "RUN", "help": "run folders, or folders that hold some"},
            "--out": {
                "type": Path,
                "default": Path("report.html"),
                "metavar": "FILE",
                "help": "the page; an older one is replaced (%(default)s)",
            },
            "--title": {"metavar": "TEXT", "help": "headline (the names of the runs)"},
        },
        "fastprune report runs/quickstart --out quickstart.html",
    ),
    "doctor": Command("what works on this machine, what does not and why", _doctor, {}, "fastprune doctor"),
    "list": Command(
        "models, methods, data sets and recipes by name",
        _list,
        {
            "what": {"nargs": "?", "choices": ("models", "methods", "datasets", "recipes"), "help": "only these"},
            "pattern": {"nargs": "?", "metavar": "PATTERN", "help": "only recipes with this in their name"},
        },
        "fastprune list recipes greg/resnet56",
    ),
}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="fastprune", description=fastprune.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastprune {fastprune.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    parser.set_defaults(run=lambda args: parser.print_help() or 0)
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        about = {"help": command.help, "description": command.help, "epilog": f"example: {command.example}"}
        sub = subparsers.add_parser(name, **about, allow_abbrev=False)
        sub.set_defaults(run=command.run)
        sub.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        for option, keywords in command.options.items():
            sub.add_argument(*option.split(), **keywords)

    asked = next((arg for arg in argv if not arg.startswith("-")), None)
    if asked and asked not in COMMANDS:
        raise UsageError(f"unknown command {asked!r}{did_you_mean(asked, COMMANDS)}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for option in COMMANDS[asked].options if option.startswith("-")] if asked else []
        hint = did_you_mean(unknown[0].partition("=")[0], [*known, "--help"])
        raise UsageError(f"{asked or 'fastprune'}: unknown argument {unknown[0]!r}{hint}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parse(argv)
        code = args.run(args)
        sys.stdout.flush()  # a closed pipe shows here, not when Python exits
        return code
    except KeyboardInterrupt:
        print(f"fastprune: interrupted{'; --resume continues the run' * ('run' in argv[:1])}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # fastprune list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it exits
        return 141
    except (FastpruneError, ValueError, OSError, torch.OutOfMemoryError) as error:
        if "--traceback" in argv:
            raise
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        elif isinstance(error, torch.OutOfMemoryError):
            text = f"the GPU has too little memory ({text.partition('. ')[0]}); lower the batch size, or free the GPU"
        print(f"fastprune: error: {' '.join(text.split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
