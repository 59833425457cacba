"""``fastprune run``: a recipe's phases, one after the other; see docs/recipes.md for what a run leaves.

Every phase starts from a file that the one before it wrote, in an uninterrupted run too, with random numbers seeded
anew.  So a finished phase is never done again, and a resumed run ends bit for bit like one that nothing stopped (on a
CPU).
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

import fastprune as fp
from fastprune import checkpoint, data, methods, models, parallel, recipes
from fastprune.compact import compact
from fastprune.data import ImageSet, example_of
from fastprune.errors import DataError, TrainingError, in_a_line
from fastprune.flops import flops
from fastprune.methods.base import Method
from fastprune.methods.greg import GrowingMethod
from fastprune.methods.iterative import IterativeMethod
from fastprune.methods.magnitude import MagnitudeMethod
from fastprune.optim import GrowingSGD
from fastprune.recipes import Recipe
from fastprune.recipes.schema import Pruning, Schedule, Training
from fastprune.train import MetricsLog, evaluate, fit, from_scratch, param_groups
from fastprune.train.metrics import summary_writer
from fastprune.train.resume import remedy, replace_file
from fastprune.train.step import Settings

FORMAT = 1
BINS = 32
NETWORKS = {"train": "dense", "prune": "pruned", "finetune": "pruned", "scratch": "scratch"}  # what a phase writes
KNOWN = {"cifar10": (10, 3, 32), "cifar100": (100, 3, 32), "digits": (10, 1, 8), "imagenet": (1000, 3, 224)}


def run(
    name: str,
    *,
    changes: Mapping[str, Any] | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    root: str | Path | None = None,
    resume: bool = False,
    tiny: bool = False,
    runs: str | Path = "runs",
    tensorboard: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Do what a recipe says; where it starts from another recipe's network that is not there, that one first.

    Args:
        name: Of the recipe, or path of a YAML file.
        changes: Dotted keys to values, over the recipe's.
        seed: In place of the recipe's.
        device: None: the first GPU if there is one, else the CPU.
        root: Folder of the data set.
        resume: Continue the run that is in the folder; a finished one is left as it is.
        tiny: The recipe's form for trials.
        runs: Folder of all runs.
        tensorboard: Write the numbers of each epoch as TensorBoard events as well, to ``tensorboard/`` in the run.
        say: Gets a line about each phase.

    Returns: The folder of the run.

    Raises:
        TrainingError: ``tensorboard``, which is not installed.
        ValueError: A recipe that does not hold together, or a folder that holds a run already.
        DataError: The data set is missing or damaged.
    """
    if tensorboard:
        summary_writer()  # it is missed now, not after an hour
    changes = dict(changes or {}) | ({} if seed is None else {"seed": seed})
    recipe = recipes.load(name, tiny=tiny, changes=changes)
    device = parallel.start(device)
    Settings.of(asdict(recipe.engine)).check(device)
    say = say if parallel.rank() == 0 else lambda line: None
    work = Run(recipe, folder(recipe, tiny, runs), device, root, tiny, changes, progress, say, tensorboard)
    if parallel.as_first_says((work.out / "run.json").exists()) and not resume:
        raise ValueError(
            f"run: {work.out} holds a run already; --resume continues it, --out another folder starts afresh, "
            "or remove it"
        )
    work.check_same()
    images = load_data(recipe, root, device)
    work.try_out(images)
    base = None
    if recipe.base is not None:
        of_base = {**recipe.base.set, "data": asdict(recipe.data)}
        base = _base(recipe, of_base, tiny, runs, say)
        if base is None:
            say(f"{recipe.name} starts from {recipe.base.recipe}, which is not there yet: doing it first")
            run(
                recipe.base.recipe, changes=of_base, seed=recipe.seed, device=device, root=root, resume=True,
                tiny=tiny, runs=runs, tensorboard=tensorboard, progress=progress, say=say,
            )  # fmt: skip
            base = _base(recipe, of_base, tiny, runs, say)
    with _alone(work.out):
        work.do(images, base)
    return work.out


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Only one run at a time writes into a folder; the lock goes with its process, however that ends."""
    folder, free = None, True
    if parallel.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass  # a file system without locks
    try:
        if not parallel.as_first_says(free):
            raise ValueError(f"run: another process is at the run in {out}; wait for it, or stop it")
        yield
    finally:
        if folder is not None:
            os.close(folder)


def folder(recipe: Recipe, tiny: bool, runs: str | Path = "runs") -> Path:
    """Where a run of it lies."""
    return Path(runs) / ("tiny" if tiny else "") / recipe.name / f"seed{recipe.seed}"


def load_data(recipe: Recipe, root: str | Path | None, device: torch.device | str = "cpu") -> ImageSet:
    options = {key: value for key, value in asdict(recipe.data).items() if key not in ("name", "options")}
    with in_a_line("data.options"):
        try:
            return data.load(recipe.data.name, root, device=device, **options, **recipe.data.options)
        except DataError as error:
            if root is not None:
                raise
            raise DataError(f"{error} (on the command line: --data DIR)") from error


def _base(
    recipe: Recipe, changes: Mapping[str, Any], tiny: bool, runs: str | Path, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Recipe, path and accuracy of the network that a recipe starts from, if its run is finished."""
    wanted = recipes.load(recipe.base.recipe, tiny=tiny, changes={**changes, "seed": recipe.seed})
    out = folder(wanted, tiny, runs)
    result = parallel.as_first_says(_read_json(out / "result.json"))
    if result is None or not result["finished"]:
        return None
    if "train" not in result["phases"] or not (out / "dense.safetensors").exists():
        raise ValueError(f"run: {out} holds no trained dense.safetensors, which {recipe.name} starts from")
    was = recipes.load(str(out / "recipe.yaml"))
    for key in ("mean", "std"):
        there, here = getattr(was.data, key), getattr(wanted.data, key)
        if there != here:
            raise ValueError(
                f"run: {recipe.name} starts from {out}, trained on images with data.{key} {_shown(there)}, and would "
                f"go on with {_shown(here)}; --set data.{key}={_shown(there)}, or --out another folder"
            )
    if was != wanted:
        say(f"{recipe.name} starts from {out}, of another recipe: {_first_difference(asdict(was), asdict(wanted))}")
    path = str(out / "dense.safetensors")
    return {"recipe": wanted.name, "path": path, "acc": result["phases"]["train"]["acc"]}


def _shown(value: Sequence[float] | None) -> str:
    """As ``--set`` takes it."""
    return "null" if value is None else f"[{','.join(map(str, value))}]"


# What it would do -----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What pruning will make of the network, as far as that can be known before."""

    before: dict[str, int]  # macs, params
    after: dict[str, int] | None  # None: which channels go depends on what training finds
    layers: dict[str, list[int]]  # what is cut in each group, or in each weight: [kept, of]; by name
    note: str = ""


def plan(recipe: Recipe, classes: int, shape: Sequence[int]) -> Plan:
    """Make the network, with random weights, and choose what goes.

    Args:
        classes: Of the data set.
        shape: (C, H, W) of an image.
    """
    torch.manual_seed(recipe.seed)
    model = make_model(recipe, classes, shape[0], weights=False)
    image = torch.zeros(1, *shape)
    for m in model.modules():
        if isinstance(m, _BatchNorm) and m.weight is not None:
            nn.init.uniform_(m.weight)  # at first all are the same, and ties go together
    before = _sizes(model, image)
    phase = recipe.prune
    if phase is None:
        return Plan(before, before, {}, "nothing is pruned")
    # which channels belong together does not depend on the size of the image, the cost of them does
    small = image if _has_target(phase) else image[:, :, :64, :64]
    method = make_method(phase, model, small.repeat(2, 1, 1, 1))
    if isinstance(method, IterativeMethod) and method.cuts is not None:
        total, goes = sum(method.units().values()), method.cuts.schedule.max_removed
        if (most := method.cuts.schedule.max_cuts) is not None:
            goes = min(goes, most * method.cuts.schedule.per_cut)
        note = f"{total - goes} of {total} channels stay ({(total - goes) / total:.1%}); which, shows while it trains"
        return Plan(before, None, {name: [size, size] for name, size in method.units().items()}, note)
    if isinstance(method, IterativeMethod):
        return Plan(before, None, {name: [g.size, g.size] for name, g in method.groups.items()}, "chosen at the end")
    if method.scope == "global":
        groups = {name: [group.size, group.size] for name, group in method.groups.items()}
        total = sum(size for size, _ in groups.values())
        return Plan(before, None, groups, f"of {total} channels in all; which stay, follows from the trained weights")
    model, layers = cut(model, method, phase, small, check=False)
    return Plan(before, _sizes(model, image), layers)


def _has_target(phase: Pruning) -> bool:
    return phase.target_macs is not None or phase.target_params is not None


def _sizes(model: nn.Module, image: Tensor) -> dict[str, int]:
    count = flops(model, image)
    return {"macs": count["macs"], "params": count["params"]}


def dry_run(
    name: str,
    *,
    changes: Mapping[str, Any] | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    root: str | Path | None = None,
    tiny: bool = False,
    say: Callable[[str], None] = print,
) -> Plan:
    """Say what :func:`run` would do: recipe, groups and what goes of them, costs, and the time of an epoch.

    The time is measured on a few real batches if the data set is there.
    """
    changes = dict(changes or {}) | ({} if seed is None else {"seed": seed})
    recipe = recipes.load(name, tiny=tiny, changes=changes)
    device = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    say(recipes.dump(replace(recipe, tiny={})))  # that part is applied already, or not wanted
    try:
        images, missing = load_data(recipe, root, device), ""
        classes, shape = len(images.classes), images.image_shape
    except DataError as error:
        if recipe.data.name not in KNOWN:
            raise
        images, missing = None, " ".join(str(error).split())
        classes, channels, size = KNOWN[recipe.data.name]
        size = recipe.data.options.get("size", size)  # imagenet's
        shape = (channels, size, size)
    found = plan(recipe, classes, shape)
    if found.layers:
        width = max(map(len, found.layers))
        say(f"{'removed from':{width}}  stays      of")
        for layer, (kept, of) in found.layers.items():
            say(f"{layer:{width}}  {'?' if found.after is None else kept:>5}  {of:>6}")
    if found.note:
        say(found.note)
    for key, unit in (("macs", "MACs"), ("params", "parameters")):
        before, after = found.before[key], found.after and found.after[key]
        rest = f", {after:,} after ({before / after:.4g}x)" if found.layers and after else ""
        say(f"{unit}: {before:,} before{rest}")
    for phase, training in recipe.phases.items():
        if training.epochs == 0:
            continue
        if images is None:
            say(f"{phase}: {_length(recipe, phase, classes, shape)}")
            continue
        per_epoch, epochs = time_per_epoch(recipe, phase, images, device)
        say(f"{phase}: {per_epoch:.3g} s per epoch, {epochs} epochs, {per_epoch * epochs / 3600:.3g} h on {device}")
    if images is None:
        say(f"time per epoch: not measured: {missing}")
    return found


def _length(recipe: Recipe, name: str, classes: int, shape: Sequence[int]) -> str:
    phase = recipe.phases[name]
    if phase.epochs is not None:
        return f"{phase.epochs} epochs"
    model = make_model(recipe, classes, shape[0], weights=False)
    method = make_method(phase, model, torch.zeros(2, *shape)[:, :, :64, :64])
    return f"at most {steps_needed(method):,} steps of {phase.batch_size} images"


def time_per_epoch(recipe: Recipe, name: str, images: ImageSet, device: torch.device) -> tuple[float, int]:
    """Seconds of training per epoch, by a few steps on the network before pruning, and the number of epochs."""
    phase = recipe.phases[name]
    torch.manual_seed(recipe.seed)
    model = make_model(recipe, len(images.classes), images.image_shape[0], weights=False)
    if recipe.model.fuse:
        model = fp.nn.convert_batchnorm(model, fuse=True)
    model.to(device)
    method = make_method(phase, model, example_of(images)) if phase.method else None
    optimizer = make_optimizer(phase, model)
    batches = len(images.loaders(phase.batch_size).train)
    epochs = epochs_of(phase, method, batches)
    few = images.limit(4 * phase.batch_size).loaders(phase.batch_size)
    for _ in range(2):  # the first epoch warms up
        few = images.limit(4 * phase.batch_size).loaders(phase.batch_size)
        done = fit(
            model, few, epochs=1, optimizer=optimizer, method=method, progress=False, **asdict(recipe.engine)
        )  # fmt: skip
    return len(images.train_labels) / done[-1]["images_per_s"], epochs


# Doing it -------------------------------------------------------------------------------------------------------------


class Run:
    """One recipe, one seed, one folder."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: torch.device,
        root: str | Path | None,
        tiny: bool,
        changes: Mapping[str, Any],
        progress: bool,
        say: Callable[[str], None],
        tensorboard: bool = False,
    ) -> None:
        self.tensorboard = tensorboard
        self.recipe, self.out, self.device, self.root = recipe, out, device, root
        self.tiny, self.changes, self.progress, self.say = tiny, dict(changes), progress, say

    def check_same(self) -> None:
        """A run in the folder must be one of this very recipe, but for learning rates of phases that are not over."""
        self.rates: dict[str, list[float]] = {}  # dotted key to the rate as it was and as it is to be
        if not (self.out / "run.json").exists():
            return
        was, now = recipes.load(str(self.out / "recipe.yaml")), self.recipe
        over = (_read_json(self.out / "result.json") or self._no_result())["phases"]
        for name, phase in now.phases.items():
            old = was.phases.get(name)
            key = f"{name}.lr"
            if old is not None and name not in over and old.lr != phase.lr and key in self.changes:  # not by omission
                self.rates[key] = [old.lr, phase.lr]
                was = replace(was, **{name: replace(old, lr=phase.lr)})
        if was != now:
            key = _first_difference(asdict(was), asdict(now))
            raise ValueError(
                f"run: {self.out} holds a run of another recipe: {key}; give the same --set as then, "
                "or --out another folder"
            )

    def _note_rates(self) -> None:
        """Write down that the run goes on by other learning rates."""
        facts = _read_json(self.out / "run.json")
        at = datetime.now(UTC).isoformat(timespec="seconds")
        facts["rates"] = [*facts.get("rates", []), {"at": at, **self.rates}]
        facts["set"] |= {key: new for key, (_, new) in self.rates.items()}
        _write_json(self.out / "run.json", facts)
        _write(self.out / "recipe.yaml", recipes.dump(self.recipe))

    def try_out(self, images: ImageSet) -> None:
        """Make once what the phases need: what is refused shows here, before a folder is made or a base trained."""
        if parallel.as_first_says((self.out / "run.json").exists()):
            return
        r, example = self.recipe, example_of(images).cpu()
        torch.manual_seed(r.seed)
        model = make_model(r, len(images.classes), images.image_shape[0], weights=False)
        with in_a_line(f"{r.model.name} does not run on images of {r.data.name}, {tuple(example.shape[1:])}"):
            flops(model, example[:1])
        for name, phase in r.phases.items():
            batches = len(images.loaders(phase.batch_size, r.seed).train)
            method = make_method(phase, model, example) if phase.method is not None else None
            Settings.of(asdict(r.engine)).check(self.device, method)
            epochs = epochs_of(phase, method, batches)
            make_schedule(phase.schedule, make_optimizer(phase, model), epochs)
            if name == "scratch":
                from_scratch(model, r.seed)

    def do(self, images: ImageSet, base: dict[str, Any] | None) -> None:
        """All phases that are not done yet."""
        self.images, self.example = images, example_of(images)
        path = self.out / "result.json"
        if parallel.rank() == 0 and not (self.out / "run.json").exists():
            self.out.mkdir(parents=True, exist_ok=True)
            _write(self.out / "recipe.yaml", recipes.dump(self.recipe))
            for name in ("metrics", "importances"):
                (self.out / f"{name}.jsonl").touch()
            _write_json(self.out / "run.json", self._facts(base))
        if self.rates:
            if parallel.rank() == 0:
                self._note_rates()
            rates = ", ".join(f"{key} {old:g} -> {new:g}" for key, (old, new) in self.rates.items())
            self.say(f"{self.recipe.name} goes on with other learning rates: {rates}")
        self.result = parallel.as_first_says(_read_json(path)) or self._no_result()
        first = self.out / f"{self._first()}.safetensors"
        if not parallel.as_first_says(bool(self.result["phases"]) or first.exists()):
            self._save(self._start(base), self._first())
        for number, (name, phase) in enumerate(self.recipe.phases.items()):
            if name not in self.result["phases"]:
                block, self.result["dense"] = self._phase(name, phase, number)
                self.result["phases"][name] = block
                self.result["finished"] = len(self.result["phases"]) == len(self.recipe.phases)
                if parallel.rank() == 0:
                    _write_json(path, self.result)
                self.say(f"{self.recipe.name} {name}: {describe(block)}")
            self._remove(f"{name}.pt")
        self._remove("start.safetensors")  # dense.safetensors has the same shape

    def _remove(self, name: str) -> None:
        path = self.out / name
        if parallel.rank() == 0 and path.exists():  # a finished run may lie where nothing can be written
            path.unlink()

    def _no_result(self) -> dict[str, Any]:
        r = self.recipe
        known = {"recipe": r.name, "seed": r.seed, "tiny": self.tiny, "finished": False}
        return {"format": FORMAT, **known, "published": _known(r.published), "dense": {}, "phases": {}}

    def _facts(self, base: dict[str, Any] | None) -> dict[str, Any]:
        r, images = self.recipe, self.images
        gpu = self.device.type == "cuda"
        return {
            "format": FORMAT,
            "recipe": r.name,
            "system": r.system,
            "seed": r.seed,
            "tiny": self.tiny,
            "set": {key: value for key, value in self.changes.items() if key != "seed"},
            "phases": list(r.phases),
            "fastprune": fp.__version__,
            "torch": str(torch.__version__),
            "device": str(self.device),
            "device_name": torch.cuda.get_device_name(self.device) if gpu else platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": parallel.processes(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "data": {
                "name": images.name,
                "root": None if self.root is None else str(self.root),
                "classes": len(images.classes),
                "image_shape": list(images.image_shape),
                "train_images": len(images.train_labels),
                "test_images": len(images.test_labels),
            },
            "base": base,
            "source": asdict(r.source),
            "published": _known(r.published),
            "notes": list(r.notes),
        }

    # Networks

    def _start(self, base: dict[str, Any] | None) -> nn.Module:
        torch.manual_seed(self.recipe.seed)
        if base is None:
            return make_model(self.recipe, len(self.images.classes), self.images.image_shape[0])
        return checkpoint.load(base["path"])

    def _first(self) -> str:
        return "start" if self.recipe.train is not None else "dense"

    def _load(self, network: str) -> nn.Module:
        model = checkpoint.load(self.out / f"{network}.safetensors")
        if self.recipe.model.fuse:
            model = fp.nn.convert_batchnorm(model, fuse=True)
        if parallel.processes() > 1:  # as one process would train it
            model = fp.nn.convert_sync_batchnorm(model)
        return model.to(self.device)

    def _save(self, model: nn.Module, network: str, method: Method | None = None) -> None:
        if parallel.rank() == 0:
            about = {"recipe": self.recipe.name, "seed": self.recipe.seed}
            checkpoint.save(model, self.out / f"{network}.safetensors", method=method, extra=about)
        parallel.as_first_says(None)  # all wait until it is there

    def _before(self, name: str) -> str:
        """The file that a phase starts from."""
        earlier = [NETWORKS[done] for done in self.result["phases"]]
        if name == "scratch" and "pruned" in earlier:
            return "pruned"
        return earlier[-1] if earlier else self._first()

    # Phases

    def _phase(self, name: str, phase: Training, number: int) -> tuple[dict[str, Any], dict[str, int]]:
        """Its block of ``result.json``, and what the network costs that it all began with."""
        r = self.recipe
        network = self._before(name)
        # nothing of the random numbers that earlier phases drew matters: a resumed run has not drawn them
        torch.manual_seed(r.seed + 1000 * number)
        model = self._load(network)
        if name == "scratch":
            model = from_scratch(model, r.seed + 1000 * number)
        loaders = self.images.loaders(phase.batch_size, r.seed + 1000 * number)
        test = {"precision": r.engine.precision, "channels_last": r.engine.channels_last}
        block: dict[str, Any] = {"acc_before": evaluate(model, loaders.test, **test)["acc"]}
        holds = network == "pruned" and name != "scratch" and r.prune is not None and not r.prune.compact
        method = make_method(phase, model, self.example) if phase.method else _holder(model, self.example, holds)
        optimizer = make_optimizer(phase, model)
        board = self.out / "tensorboard" / name if self.tensorboard and parallel.rank() == 0 else None
        epochs = epochs_of(phase, method, len(loaders.train))
        every = r.importances_every or max(1, epochs // 20)
        log = PhaseLog(self.out, name, method if phase.method else None, every, phase.epochs, board)
        history = []
        if epochs:
            history = fit(
                model,
                loaders,
                epochs=epochs,
                optimizer=optimizer,
                schedule=make_schedule(phase.schedule, optimizer, epochs),
                method=method,
                log=log,
                checkpoint=self.out / f"{name}.pt",
                resume=True,
                until=(lambda: method.finished) if phase.epochs is None else None,
                progress=self.progress,
                **asdict(r.engine),
            )
            if phase.hand_on == "best":
                model.load_state_dict(history.best_state)
            elif history.ema is not None:
                model.load_state_dict(history.ema.state_dict())
        elif parallel.rank() == 0:
            log.importances(-1, 0)
        if name == "prune":
            if not getattr(method, "finished", True):
                self.say(f"{r.name} prune: {method.name} had not finished when prune.epochs={phase.epochs} ended it")
            model, block["channels"] = cut(model, method, phase, self.example)
        accs = [row["test_acc"] for row in history]
        block |= {
            "acc": evaluate(model, loaders.test, **test)["acc"],
            "acc_last": accs[-1] if accs else None,
            "acc_best": max(accs, default=None),
            "epoch_best": accs.index(max(accs)) if accs else None,
            "epochs": len(history),
            "steps": history[-1]["step"] if history else 0,
            "seconds": sum(row["seconds"] for row in history),
        }
        self._save(model, NETWORKS[name], method if name == "prune" else None)
        dense = flops(self._load("dense"), self.example[:1])
        return block | costs(model, self.example, dense), {key: dense[key] for key in ("macs", "params")}


def make_model(recipe: Recipe, classes: int, channels: int, *, weights: bool = True) -> nn.Module:
    """As the recipe says, before training; random numbers from the global state.  ``weights``: the published ones."""
    options = dict(recipe.model.options)
    if recipe.model.name in models.MODELS:
        options.setdefault("in_channels", channels)
    elif weights and recipe.model.weights is not None:
        options["weights"] = recipe.model.weights
    with in_a_line("model.options"):
        return models.create(recipe.model.name, classes, **options)


def make_method(phase: Training, model: nn.Module, example: Tensor) -> Method:
    aim = {}
    if isinstance(phase, Pruning):
        aim = {key: getattr(phase, key) for key in ("ratio", "scope", "target_macs", "target_params")}
    method = methods.create(phase.method, model, example, **aim, **phase.options)
    if isinstance(phase, Pruning):
        if phase.compact == (isinstance(method, MagnitudeMethod) and method.by_weight):
            raise ValueError("run: expected prune.compact=false for single weights, group=weight or N:M, and else true")
        if phase.epochs == 0 and isinstance(method, IterativeMethod) and method.per_step:
            raise ValueError(f"run: {method.name} makes its scores while it trains; give prune.epochs, 1 or more")
    return method


def make_optimizer(phase: Training, model: nn.Module) -> torch.optim.SGD:
    kind = GrowingSGD if isinstance(phase, Pruning) else torch.optim.SGD
    groups = param_groups(model, phase.lr, phase.weight_decay) if phase.groups == "rni" else model.parameters()
    return kind(groups, phase.lr, phase.momentum, weight_decay=phase.weight_decay, nesterov=phase.nesterov)


def make_schedule(schedule: Schedule, optimizer: torch.optim.Optimizer, epochs: int) -> LambdaLR:
    """The rate of each epoch as a multiple of the first one's."""
    at = [math.ceil(a * epochs) if a < 1 else int(a) for a in schedule.at]

    def factor(epoch: int) -> float:
        if epoch < schedule.warmup:
            return (epoch + 1) / (schedule.warmup + 1)
        if schedule.kind == "step":
            return schedule.factor ** sum(epoch >= a for a in at)
        if schedule.kind == "cosine":
            done = (epoch - schedule.warmup) / max(1, epochs - schedule.warmup)
            return schedule.last + (1 - schedule.last) * (1 + math.cos(math.pi * done)) / 2
        return 1.0

    return LambdaLR(optimizer, factor)


def epochs_of(phase: Training, method: Method | None, batches: int) -> int:
    """Of a phase with so many batches each; where it ends with its method, at most."""
    if phase.epochs != 0 and batches == 0:
        raise DataError(f"run: expected at least a training image for each of {parallel.processes()} processes")
    return math.ceil(steps_needed(method) / batches) if phase.epochs is None else phase.epochs


def steps_needed(method: Method) -> int:
    """Optimizer steps until the method is done, at most."""
    o = method.options
    if isinstance(method, GrowingMethod):
        if method.kind == "fixed":
            return o.fixed_steps + o.stabilize + 1
        updates = math.ceil(o.reg_limit / o.reg_step) + (o.pick_limit / o.pick_step if method.picks_later else 0)
        # the coefficient is a sum of rounded steps, so that it may take an update or two more
        return math.ceil(updates + 3) * o.update_interval + o.stabilize
    if isinstance(method, IterativeMethod) and method.cuts is not None:
        schedule = method.cuts.schedule
        number = math.ceil(schedule.max_removed / schedule.per_cut)
        number = number if schedule.max_cuts is None else min(number, schedule.max_cuts)
        return schedule.start_after + schedule.first_extra + number * schedule.frequency
    raise ValueError(f"run: {method.name} is never done by itself; give prune.epochs")


def cut(
    model: nn.Module, method: Method, phase: Pruning, example: Tensor, check: bool = True
) -> tuple[nn.Module, dict[str, list[int]]]:
    """Remove what the method chose; per group the channels kept and those it had.  ``check``: prove it."""
    if isinstance(method, MagnitudeMethod) and method.by_weight:
        method.cut()
        return model, {name: [int(mask.sum()), mask.numel()] for name, mask in method.weight_masks().items()}
    keep = method.keep_masks()
    whole = method.survivors() if isinstance(method, IterativeMethod) and method.cuts is not None else keep
    channels = {name: [int(mask.sum()), len(mask)] for name, mask in whole.items()}
    if not all(mask.all() for mask in keep.values()):
        compact(model, keep, example, graph=method.graph, check=check)
    return model, channels


def _holder(model: nn.Module, example: Tensor, holds: bool) -> Method | None:
    """What keeps the weights at zero that pruning set to zero; None if it removed them."""
    if not holds:
        return None
    method = methods.create("l1", model, example, 0.0, group="weight")
    method.hold({w: w != 0 for w in method.weights.values()})
    return method


def costs(model: nn.Module, example: Tensor, before: Mapping[str, Any]) -> dict[str, Any]:
    """MACs, parameters, zeros, and the output channels of each layer, now and ``before`` (:func:`flops`)."""
    now = flops(model, example[:1])
    widths = {row["name"]: row["out_channels"] for row in now["layers"]}
    layers = (m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd | nn.Linear))
    return {
        "macs": now["macs"],
        "params": now["params"],
        "zeros": sum(int((m.weight == 0).sum()) for m in layers),
        "kept": {row["name"]: [widths[row["name"]], row["out_channels"]] for row in before["layers"]},
    }


def describe(block: Mapping[str, Any]) -> str:
    """A finished phase in a line."""
    words = [f"accuracy {block['acc']:.2%}"]
    if block["acc_last"] is not None:
        words.append(f"last {block['acc_last']:.2%}, best {block['acc_best']:.2%} of {block['epochs']} epochs")
    words.append(f"{block['macs'] / 1e6:.4g} M MACs, {block['params'] / 1e6:.4g} M parameters")
    return ", ".join(words)


# Files ----------------------------------------------------------------------------------------------------------------


class PhaseLog(MetricsLog):
    """Rows of one phase in ``metrics.jsonl``, and now and then histograms of the scores in ``importances.jsonl``."""

    def __init__(
        self,
        out: Path,
        phase: str,
        method: Method | None,
        every: int,
        epochs: int | None,
        tensorboard: Path | None = None,
    ) -> None:
        super().__init__(out / "metrics.jsonl", tensorboard)
        self.histograms = MetricsLog(out / "importances.jsonl")
        self.phase, self.method, self.every, self.epochs = phase, method, every, epochs
        self.unsure = True  # a resumed phase does some epochs again, and a full disk may have left half of them
        self.made: dict[int, list[dict[str, Any]]] = {}  # epoch to histograms that are not on the disk yet

    def write(self, row: dict[str, Any]) -> None:
        """At the end of an epoch; what ``fit`` calls, again with the same row if the disk was full."""
        last = self.method.finished if self.method and self.epochs is None else row["epoch"] + 1 == self.epochs
        if row["epoch"] in self.made or last or (row["epoch"] + 1) % self.every == 0:
            self.importances(row["epoch"], row["step"])
        try:
            super().write({"phase": self.phase, **row})
        except OSError:
            self.unsure = True
            raise
        self.made.clear()

    def importances(self, epoch: int, step: int) -> None:
        if epoch not in self.made:
            self.made[epoch] = []
            for group, scores in (self.scored() if self.method is not None else {}).items():
                scores = scores.detach().double().cpu()
                if not scores.isfinite().all():  # of weights that the next checkpoint will refuse, in a line
                    continue
                counts, edges = torch.histogram(scores, BINS)
                row = {"phase": self.phase, "epoch": epoch, "step": step, "group": group}
                self.made[epoch].append(row | {"edges": edges.tolist(), "counts": counts.long().tolist()})
        if self.unsure:
            _drop(self.histograms.path, lambda old: old["phase"] == self.phase and old["epoch"] >= epoch)
        self.unsure = True
        for row in self.made[epoch]:
            self.histograms.write(row)
        self.unsure = False

    def scored(self) -> dict[str, Tensor]:
        if isinstance(self.method, IterativeMethod):
            if self.method.cuts is not None and self.method.cuts.averaged is None:
                return {}  # there are none before the first cut
        return self.method.scores()


def _drop(path: Path, gone: Callable[[dict[str, Any]], bool]) -> None:
    if path.exists():
        rows = MetricsLog.read(path)
        stay = [row for row in rows if not gone(row)]
        if len(stay) < len(rows) or not path.read_bytes().endswith(b"\n"):
            replace_file(path, "".join(json.dumps(row) + "\n" for row in stay).encode())


def _write(path: Path, text: str) -> None:
    """In one step, so that a kill leaves the old file or the new one."""
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise TrainingError(
            f"run: cannot write {path} ({error.strerror}); {remedy(error)}, and the same command with --resume goes on"
        ) from error


def _read_json(path: Path) -> Any:
    """None if there is no such file."""
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"run: {path} is damaged; remove its folder, or put a copy of the file back") from error


def _write_json(path: Path, content: Any) -> None:
    _write(path, json.dumps(content, indent=1) + "\n")


def _known(published: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(published).items() if value not in (None, "")}


def _first_difference(was: Any, now: Any, path: str = "") -> str:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in {**was, **now}:
            if was.get(key) != now.get(key):
                return _first_difference(was.get(key), now.get(key), f"{path}.{key}" if path else key)
    return f"{path} was {was!r} then, and is {now!r} now"
