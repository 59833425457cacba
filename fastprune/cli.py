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
    options: dict[str, dict[str, Any]]  # name or flag: keywords of add_argument
    example: str = ""  # shown below the help


def _quickstart(args: argparse.Namespace) -> int:
    from fastprune import quickstart

    return quickstart.run(args.out, seed=args.seed, epochs=args.epochs)


def _oracle(args: argparse.Namespace) -> int:
    from fastprune import study

    options = {key: value for key, value in vars(args).items() if key not in ("run", "command", "traceback", "methods")}
    return study.run(**options, criteria=args.methods or study.CRITERIA)


def _report(args: argparse.Namespace) -> int:
    from fastprune import report

    return report.run(args.runs, args.out, title=args.title)


def _doctor(args: argparse.Namespace) -> int:
    from fastprune import doctor

    return doctor.run()


def _list(args: argparse.Namespace) -> int:
    from fastprune import data, methods, models

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
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {str(error).partition(chr(10))[0]}") from error
    return text


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
            "--root": {"type": Path, "metavar": "DIR", "help": "folder of the data set"},
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
            "--device": {
                "type": _device,
                "metavar": "NAME",
                "help": "such as cpu or cuda:0 (the first GPU if there is one)",
            },
            "--resume": {"action": "store_true", "help": "continue, or reuse, the training that --out holds"},
        },
        "fastprune oracle --dataset imagefolder --root photos --arch resnet18 --methods taylor-gate fisher",
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
        "models, methods and data sets by name",
        _list,
        {"what": {"nargs": "?", "choices": ("models", "methods", "datasets"), "help": "only these"}},
        "fastprune list methods",
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
        for option, keywords in command.options.items():
            sub.add_argument(option, **keywords)

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
        print("fastprune: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # fastprune list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it exits
        return 141
    except (FastpruneError, ValueError, OSError) as error:
        if "--traceback" in argv:
            raise
        print(f"fastprune: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
