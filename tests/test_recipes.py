"""Every published command is a recipe, recipes hold together, and what they cut is what the authors' code cuts."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from fastprune import recipes, run

REFERENCE = json.loads((Path(__file__).parent / "golden" / "flops_reference.json").read_text())
NAMES = recipes.names()


def sizes(recipe):
    """Classes and image shape of its data."""
    classes, channels, size = run.KNOWN[recipe.data.name]
    return classes, (channels, size, size)


@cache
def planned(name):
    """By what decides the choice, since many recipes differ in training only."""
    recipe = recipes.load(name)
    return run.plan(recipe, *sizes(recipe))


def written(spec):
    """A ratio, of the reference or of a recipe, in one form."""
    if isinstance(spec, dict):
        spec = ",".join(f"{key}:{value}" for key, value in spec.items())
    return str(spec).replace(" ", "")


# --- all of them ---------------------------------------------------------------------------------------------------


# Commands by README: what the name of each recipe begins with, and how many there must be.
COMMANDS = {
    "rni/vgg16-": 2 * 3 * 3,  # data sets, methods, train/50/90
    "rni/resnet56-": 2 * 3 * 3,
    "rni/readme-": 2,
    "greg/resnet56-cifar10-base": 1,
    "greg/vgg19-cifar100-base": 1,
    "greg/resnet56-cifar10-greg1-": 6,  # Table 1's ratios and 2.55x
    "greg/resnet56-cifar10-greg2-": 6,
    "greg/resnet56-cifar10-l1-": 6,
    "greg/vgg19-cifar100-greg1-": 5,
    "greg/vgg19-cifar100-greg2-": 5,
    "greg/vgg19-cifar100-l1-": 5,
    "greg/resnet34-imagenet-": 2,
    "greg/resnet50-imagenet-greg1-": 4,
    "greg/resnet50-imagenet-greg2-": 4,
    "greg/resnet50-imagenet-baselines-": 3,  # l1, random, max
    "greg/resnet50-imagenet-unstructured-": 2,
    "fisher/wrn-40-2-": 5,  # base, fisher, l1, both from scratch
    "fisher/densenet-bc-100-": 5,
    "fisher/wrn-reduced-": 16,
    "fisher/densenet-reduced-": 8,
    "taylor/resnet50-imagenet-": 4,
    "taylor/resnet101-imagenet-": 4,
    "tpp/resnet56-cifar10-tpp-": 2 * 5,  # learning rates, ratios
    "tpp/resnet56-cifar10-l1-": 2 * 5,
    "tpp/resnet56-cifar10-scratch-": 5,
    "tpp/vgg19-cifar100-tpp-": 5,
    "tpp/resnet34-imagenet-": 1,
    "tpp/resnet50-imagenet-": 4,
}


def test_every_command_has_its_recipe():
    longest = {name: max((p for p in COMMANDS if name.startswith(p)), key=len, default=None) for name in NAMES}
    assert None not in longest.values()
    assert {prefix: list(longest.values()).count(prefix) for prefix in COMMANDS} == COMMANDS


@pytest.mark.parametrize("name", NAMES)
def test_it_holds_together(name, tmp_path):
    recipe, tiny = recipes.load(name), recipes.load(name, tiny=True)
    assert recipe.name == name and recipe.source.paper and recipe.source.url.startswith("https://")
    assert recipe.source.command or recipe.notes  # else a note says why there is none
    assert "$" not in yaml.safe_dump(asdict(recipe) | {"tiny": {}})
    assert recipe.phases and list(recipe.phases) == list(tiny.phases)
    assert (recipe.base is None) == ("train" in recipe.phases or recipe.model.weights is not None)
    if recipe.base:
        base = recipes.load(recipe.base.recipe)
        assert list(base.phases) == ["train"] and (base.model, base.data) == (recipe.model, recipe.data)
    path = tmp_path / "own.yaml"
    for r in (recipe, tiny):
        path.write_text(recipes.dump(r))
        assert recipes.load(str(path)) == r
    assert tiny.data.name in ("synthetic", "digits") and tiny.model.weights is None
    assert all((phase.epochs or 0) <= 4 for phase in tiny.phases.values())
    if not name.startswith("fisher/") and recipe.published.acc is not None:
        assert recipe.published.where and 0 < recipe.published.acc < 1


# --- what they cut -------------------------------------------------------------------------------------------------


@cache
def pruning():
    """(model, ratio) to the recipes that cut so, one per way to choose."""
    found = {}
    for name in NAMES:
        recipe = recipes.load(name)
        if recipe.prune is not None and name.startswith(("greg/", "tpp/")):
            key = recipe.model.name, written(recipe.prune.ratio), recipe.prune.options.get("group")
            ways = found.setdefault(key, {})
            ways.setdefault((recipe.prune.method, str(recipe.prune.options.get("skip"))), name)
    return found


ROWS = REFERENCE["commands"]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['source'][:4]}-{r['model']}-{written(r['spec']['stage_pr'])}")
def test_cuts_are_the_authors(row):
    """Kept channels of every layer, MACs and parameters, exactly; the published speedup as far as it follows."""
    for name in pruning()[row["model"], written(row["spec"]["stage_pr"]), None].values():
        plan = planned(name)
        assert plan.before == {k: REFERENCE["unpruned"][NETWORKS[row["model"]]][v] for k, v in UNITS.items()}
        assert plan.after == {k: row[v] for k, v in UNITS.items()}, name
        if published := recipes.load(name).published.speedup:
            assert plan.before["macs"] / plan.after["macs"] == pytest.approx(published, rel=0.031), name


UNITS = {"macs": "macs", "params": "params_total"}
NETWORKS = {
    "resnet56": "resnet56_cifar10",
    "vgg19": "vgg19_cifar100_greg",
    "resnet34": "resnet34_imagenet",
    "resnet50": "resnet50_imagenet",
}


def test_all_cuts_are_in_the_reference():
    """Each recipe of GReg and TPP that removes filters is among the rows above, but for R34 of TPP (as GReg's)."""
    rows = {(row["model"], written(row["spec"]["stage_pr"]), None) for row in ROWS}
    assert {key for key in pruning() if key[2] is None} <= rows


@pytest.mark.parametrize("row", REFERENCE["ucs_local"], ids=lambda r: f"{r['model']}-{r['prune_pc']}")
def test_ucs_keeps_the_same_share_of_every_layer(row):
    net, data = row["model"].split("_")
    plan = planned(f"rni/{net}-{data}-ucs-{row['prune_pc']}")
    assert [kept for kept, _ in plan.layers.values()] == row["kept_per_bn"]
    assert plan.after == {k: row[v] for k, v in UNITS.items()}


def test_unstructured():
    row = REFERENCE["unstructured_resnet50_0.827"]
    plan = planned("greg/resnet50-imagenet-unstructured-greg1-0.827")
    expected = {
        f"{name}.weight": [numel - gone, numel] for name, (numel, gone) in row["per_layer_numel_zeroed"].items()
    }
    assert plan.layers == expected
    assert sum(of - kept for kept, of in plan.layers.values()) == row["zeroed"]


@pytest.mark.parametrize("net, one", [("resnet50", 72), ("resnet101", 40)])
def test_taylor_removes_the_authors_number_of_gates(net, one):
    gates = REFERENCE["taylor_gates"]
    plan = planned(f"taylor/{net}-imagenet-{one}")
    assert sum(of for _, of in plan.layers.values()) == gates[net]["total"] and plan.after is None
    assert f"{gates[f'{net}_prune{one}']['pct_gates_active']:.1f}%" in plan.note
    for name in NAMES:
        if name.startswith(f"taylor/{net}"):
            expected = gates[f"{net}_prune{name.rpartition('-')[2]}"]["prune_neurons_max"]
            assert recipes.load(name).prune.options["max_removed"] == expected


@pytest.mark.parametrize("name", [name for name in NAMES if "-reduced-" in name])
def test_reduced_families(name):
    kind, _, which = name.removeprefix("fisher/").split("-")
    if kind == "densenet":
        number = which.removeprefix("depth").removeprefix("growth")
        key = f"densenet_bc_{number}_12" if "depth" in which else f"densenet_bc_100_{number}"
    elif "bottle" in which:
        key = f"wrn_40_2_{which}"
    else:
        number = which.removeprefix("depth").removeprefix("width")
        key = f"wrn_depth{number}_width2.0" if "depth" in which else f"wrn_depth40_width{float(number)}"
    assert planned(name).before == {k: REFERENCE["reduced_families"][key][v] for k, v in UNITS.items()}


@pytest.mark.parametrize("net, channels", [("wrn-40-2", 1344), ("densenet-bc-100", 2304)])
def test_fisher_stops_where_set_says(net, channels):
    """As the recipes' notes promise of N."""
    recipe = recipes.load(f"fisher/{net}-fisher-scratch", changes={"prune.options.max_removed": 900})
    assert run.plan(recipe, *sizes(recipe)).note.startswith(f"{channels - 900} of {channels} channels stay")


@pytest.mark.parametrize("net, channels", [("wrn-40-2", 1344), ("densenet-bc-100", 2304)])
def test_fisher_masks_all_channels_inside_blocks(net, channels):
    for method in ("fisher", "l1"):
        assert sum(of for _, of in planned(f"fisher/{net}-{method}").layers.values()) == channels


def test_schedules_are_the_published_ones():
    """Learning rates by epoch, as each README lists them."""

    def rates(name, phase):
        training = recipes.load(name).phases[phase]
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], training.lr)
        schedule = run.make_schedule(training.schedule, optimizer, training.epochs)
        seen = {}
        for epoch in range(training.epochs):
            seen.setdefault(f"{optimizer.param_groups[0]['lr']:.6g}", epoch)
            optimizer.step()
            schedule.step()
        return seen

    assert rates("rni/vgg16-cifar10-rni-train", "train") == {"0.1": 0, "0.01": 80, "0.001": 120}
    assert rates("greg/resnet56-cifar10-base", "train") == {"0.1": 0, "0.01": 100, "0.001": 150}
    assert rates("greg/resnet56-cifar10-greg1-0.5", "finetune") == {"0.01": 0, "0.001": 60, "0.0001": 90}
    assert rates("greg/resnet50-imagenet-greg1-3.06x", "finetune") == {
        "0.01": 0,
        "0.001": 30,
        "0.0001": 60,
        "1e-05": 75,
    }
    assert rates("fisher/wrn-40-2-base", "train") == {"0.1": 0, "0.02": 60, "0.004": 120, "0.0008": 160}
    assert rates("fisher/densenet-bc-100-base", "train") == {"0.1": 0, "0.01": 150, "0.001": 225}
    assert rates("taylor/resnet50-imagenet-72", "prune") == {"0.001": 0, "0.0001": 9, "1e-05": 19}
    assert rates("tpp/resnet56-cifar10-tpp-lr0.001-0.9", "finetune") == {"0.001": 0, "0.0001": 60, "1e-05": 90}


# --- bad input -----------------------------------------------------------------------------------------------------

ANY = "greg/resnet56-cifar10-greg1-0.5"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"prune.ratoi": 0.5}, f"recipe {ANY}: prune.ratoi: unknown key 'ratoi'; did you mean 'ratio'?"),
        ({"fintune.epochs": 3}, "fintune: unknown key 'fintune'; did you mean 'finetune'?"),
        ({"finetune.epochs": "many"}, "finetune.epochs: expected a whole number, got 'many'"),
        ({"finetune.epochs": 1.5}, "finetune.epochs: expected a whole number, got 1.5"),
        ({"finetune.epochs": 0}, "finetune.epochs: expected 1 or more, got 0"),
        ({"finetune.nesterov": 1}, "finetune.nesterov: expected true or false, got 1"),
        ({"finetune.schedule.kind": "cosin"}, "finetune.schedule.kind: expected one of constant, step, cosine, got"),
        ({"finetune.schedule.at": [30, 150]}, "finetune.schedule.at[1]: expected a share below 1 or a whole epoch"),
        ({"finetune.epochs.x": 1}, "--set: finetune.epochs.x: finetune.epochs is 120 and has no keys"),
        ({"prune.method": "greg1"}, "prune.method: unknown name 'greg1'; did you mean 'greg-1'?"),
        (
            {"prune.options.stabilise": 5},
            "prune.options.stabilise: unknown name 'stabilise'; did you mean 'stabilize'?",
        ),
        ({"prune.options.stabilize": "x"}, "prune.options.stabilize: expected int, got 'x'"),
        ({"data.name": "cifar"}, "data.name: unknown name 'cifar'; did you mean 'cifar10'?"),
        ({"data.mean": [0.5, "x", 0.5]}, "data.mean[1]: expected a number, got 'x'"),
        ({"model.name": "resnet65"}, "model.name: unknown name 'resnet65'; did you mean 'resnet56'?"),
        ({"model": {"name": "resnet50", "weights": "V1"}}, "model.weights: unknown name 'V1'"),
        ({"name": "../../elsewhere"}, "name: expected the name of a folder below --out, got '../../elsewhere'"),
        ({"seed": -1}, "seed: expected 0 or more and less than 2**62, got -1"),
        ({"importances_every": -2}, "importances_every: expected 0 or more, got -2"),
        ({"base": ANY}, f"base: it starts from itself: {ANY} <- {ANY}"),
        ({"finetune.momentum": -1}, "finetune.momentum: expected 0 or more, got -1"),
        ({"finetune.weight_decay": -1}, "finetune.weight_decay: expected 0 or more, got -1"),
        ({"finetune.momentum": 0, "finetune.nesterov": True}, "finetune.nesterov: finetune.momentum must be above 0"),
        ({"finetune.schedule.warmup": -3}, "finetune.schedule.warmup: expected 0 or more, got -3"),
        ({"engine.checkpoint_minutes": -1}, "engine.checkpoint_minutes: expected 0 or more, got -1"),
        ({"engine.ema": 1.5}, "engine.ema: expected between 0 and 1, got 1.5"),
        ({"engine.precision": "fp8"}, "engine.precision: expected one of fp32, bf16, fp16, got 'fp8'"),
        ({"model.weights": "IMAGENET1K_V1"}, "model.weights: resnet56 has no published weights"),
        ({"finetune": None, "prune": None}, "it has no phase"),
        ({"scratch": {"epochs": 1}}, "scratch.batch_size: missing; expected a whole number"),
        ({"prune": "l1"}, "prune: expected keys and values"),
        ({"base": "greg/nothing"}, "unknown recipe 'greg/nothing'"),
        ({"base": {"recipe": "greg/vgg19-cifar100-base", "sett": {}}}, "base.sett: unknown key 'sett'"),
    ],
)
def test_errors_name_file_key_and_what_was_expected(changes, says):
    with pytest.raises(ValueError) as error:
        recipes.load(ANY, changes=changes)
    assert says in str(error.value)


def test_many_cuts_need_training():
    with pytest.raises(ValueError, match=r"prune\.epochs: 0 is one cut without training"):
        recipes.load("fisher/wrn-40-2-fisher", changes={"prune.epochs": 0})


def test_changes_leave_what_comes_from_the_base():
    base, name = "greg/resnet56-cifar10-base", "tpp/resnet56-cifar10-tpp-0.5"
    folder = {"data.name": "imagefolder", "data.limit": 50}
    assert recipes.load(name, changes=folder).data == recipes.load(base, changes=folder).data
    assert recipes.load(name, changes={"model.name": "resnet20"}).model.fuse
    changed = recipes.load(name, changes={"base": "rni/resnet56-cifar10-l1-train", "data.limit": 50})
    assert changed.data == recipes.load("rni/resnet56-cifar10-l1-train", changes={"data.limit": 50}).data
    assert changed.model == recipes.load("rni/resnet56-cifar10-l1-train").model


def test_unknown_recipe():
    with pytest.raises(ValueError, match=r"did you mean 'greg/resnet56-cifar10-greg2-0\.5'"):
        recipes.load("greg/resnet56-cifar10-greg-0.5")


@pytest.mark.parametrize(
    "text, says",
    [
        ("a: [1", "no valid YAML"),
        ("a: " + 5000 * "[" + 5000 * "]", "no valid YAML"),
        ("a: 1\na: 2", "'a' is there twice"),
        ("- 1", "expected keys and values, got list"),
        ("data: {name: cifar10}", "own.yaml: source: missing"),
    ],
)
def test_own_files(tmp_path, text, says):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"own\.yaml") as error:
        recipes.load(str(path))
    assert says in str(error.value)
    with pytest.raises(ValueError, match="cannot read recipe"):
        recipes.load(str(tmp_path / "none.yaml"))


def test_own_files_that_start_from_each_other(tmp_path):
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"source: {{paper: none}}\nbase: {{recipe: {base}.yaml}}\n")
    with pytest.raises(ValueError, match=r"it starts from itself: .*a\.yaml <- .*b\.yaml <- .*a\.yaml"):
        recipes.load(str(tmp_path / "a.yaml"))


def test_set_reads_yaml():
    given = ["a.b=1e-3", "c=[1, 2]", "d={x: no}", "e=", "f=a=b"]
    assert recipes.parse_set(given) == {"a.b": 1e-3, "c": [1, 2], "d": {"x": False}, "e": None, "f": "a=b"}
    for bad in ("a", "=1", "a..b=1"):
        with pytest.raises(ValueError, match="expected key=value"):
            recipes.parse_set([bad])
    with pytest.raises(ValueError, match="--set a: no valid YAML"):
        recipes.parse_set(["a=[1"])


def test_table():
    text = recipes.table("taylor")
    assert "taylor/resnet50-imagenet-72  " in text and "74.50%" in text and text.count("\n") == 8
    assert recipes.table("greg/*-base").count("\n") == 2
    with pytest.raises(ValueError, match="no recipe fits 'nonsense'"):
        recipes.table("nonsense")
