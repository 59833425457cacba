"""The contract every registered method keeps (a new one is tested here without an edit), and RNI's family by number."""

import json
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastprune
from fastprune import backends, methods, models, ops
from fastprune import nn as fpnn
from fastprune.methods import rni

GOLDEN = np.load(Path(__file__).parent / "golden" / "rni.npz")
UCS = json.loads((Path(__file__).parent / "golden" / "flops_reference.json").read_text())["ucs_local"]
NAMES = sorted(methods.METHODS)
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def bound_of(name):
    return getattr(methods.METHODS[name], "bound", None)


def create(name, model, **kw):
    if any(field.name == "data" for field in fields(methods.METHODS[name].Options)):
        kw["data"] = [(X, torch.tensor([0, 1]))]
    return methods.create(name, model, X, **kw)


def make(name, model=None, **kw):
    model = model or models.create("vgg-small", bound=bound_of(name))
    return model, create(name, model, **kw)


def spread(model):
    """Scales without ties, as after some training."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight)


def train(method, model, steps, lr=0.01):
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        x, y = torch.randn(6, 1, 8, 8, generator=draw), torch.arange(6)
        loss = nn.functional.cross_entropy(model(x), y) + method.penalty()
        optimizer.zero_grad()
        loss.backward()
        method.step(optimizer)


# --- every method --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_one_finite_number_per_channel(name):
    model, method = make(name)
    train(method, model, 3)
    scores = method.scores()
    assert set(scores) == set(method.groups) and method.steps == 3
    for key, group in method.groups.items():
        assert scores[key].shape == (group.size,) and scores[key].is_floating_point() and not scores[key].requires_grad
        assert scores[key].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_keep_masks_remove_the_asked_share(name):
    model, method = make(name, ratio=0.5)
    spread(model)
    train(method, model, 2)
    keep = method.keep_masks()
    assert all(mask.dtype == torch.bool and mask.shape == (method.groups[key].size,) for key, mask in keep.items())
    kept, total = sum(int(m.sum()) for m in keep.values()), sum(g.size for g in method.groups.values())
    assert abs(kept / total - 0.5) < 0.02


@pytest.mark.parametrize("what, name", [*(("macs", name) for name in NAMES), ("params", "l1"), ("params", "slimming")])
def test_keep_masks_meet_a_target(what, name):
    model, method = make(name, **{f"target_{what}": 0.4}, scope="global")
    spread(model)
    train(method, model, 2)
    keep = method.keep_masks()
    dense = fastprune.flops(model, X)[what]
    share = fastprune.flops(fastprune.compact(model, keep, X, check=False), X)[what] / dense
    assert 0.35 < share <= 0.4
    assert min(int(mask.sum()) for mask in keep.values()) >= method.options.min_keep


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope, by", [("local", "ratio"), ("global", "target_macs")])
def test_round_to_and_max_ratio_hold(name, scope, by):
    model, method = make(name, **{by: 0.5}, scope=scope, round_to=4, max_ratio={"features.[03]": 0.3, "*": 0.75})
    spread(model)
    train(method, model, 2)
    widths = {key: int(mask.sum()) for key, mask in method.keep_masks().items()}
    sizes = {key: method.groups[key].size for key in widths}
    assert all(width % 4 == 0 and width >= 0.25 * sizes[key] for key, width in widths.items())
    narrow = [key for key in widths if key in ("features.0", "features.3")]
    assert narrow and all(widths[key] >= 0.7 * sizes[key] for key in narrow)
    assert 0.3 < sum(widths.values()) / sum(sizes.values()) < 0.9


@pytest.mark.parametrize("name", NAMES)
def test_a_target_out_of_reach_is_refused_at_once(name):
    with pytest.raises(ValueError, match=r"target_params asks for .* smallest network .* \(0\.\d+ of the dense one\)"):
        make(name, target_params=0.3, max_ratio=0.2)
    with pytest.raises(ValueError, match=r"expected a ratio or a target, got ratio=0\.5 and target_macs"):
        make(name, ratio=0.5, target_macs=0.5)
    with pytest.raises(ValueError, match="max_ratio"):
        make(name, max_ratio=1.5)
    with pytest.raises(ValueError, match="round_to must be a whole number"):
        make(name, round_to=0)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_keep_masks_and_weights(name):
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        model, method = make(name)
        train(method, model, 3)
        runs.append((method.keep_masks(), model.state_dict()))
    for a, b in zip(*runs, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_method_changes_nothing(name):
    model, whole = make(name)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    train(whole, model, 4)
    expected = whole.scores()
    model.load_state_dict(start)
    first = create(name, model)
    train(first, model, 4)
    second = create(name, model)
    second.load_state_dict(first.state_dict())
    assert second.steps == 4 and all(torch.equal(second.scores()[k], expected[k]) for k in expected)


@pytest.mark.parametrize("name", NAMES)
def test_making_a_method_leaves_the_model_alone(name):
    model = models.create("vgg-small", bound=bound_of(name))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    make(name, model)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_step_calls_few_more_operators_whatever_the_depth(name):
    counts = []
    for depth in (2, 12):
        layers = []
        for i in range(depth):
            norm = fpnn.SigmoidBatchNorm2d(4) if bound_of(name) else nn.BatchNorm2d(4)
            layers += [nn.Conv2d(4 if i else 1, 4, 3, padding=1), norm, nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))
        method, counted = create(name, model), {}
        for key, penalised in (("plain", False), ("method", True)):
            optimizer = torch.optim.SGD(model.parameters(), 0.01, foreach=True)
            for _ in range(2):  # the second step has gradients to accumulate into, as any later one
                with Counted() as counted[key]:
                    loss = nn.functional.cross_entropy(model(X), torch.tensor([0, 1]))
                    if penalised:
                        loss = loss + method.penalty()
                    optimizer.zero_grad()
                    loss.backward()
                    method.step(optimizer) if penalised else optimizer.step()
        counts.append(sum(counted["method"].calls.values()) - sum(counted["plain"].calls.values()))
    assert counts[0] == counts[1], "grows with the depth"
    # Eager writes our ops as several of PyTorch's.
    eager = backends.select("scale_penalty", None, torch.ones(4)) == "eager"
    assert counts[1] <= (20 if eager else 10)


class Counted(TorchDispatchMode):
    def __enter__(self):
        self.calls = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


# --- by name -------------------------------------------------------------------------------------------------------


def test_unknown_names_and_options_get_a_hint():
    model = models.create("vgg-small")
    with pytest.raises(ValueError, match="unknown method 'sliming'; did you mean 'slimming'"):
        methods.create("sliming", model, X)
    with pytest.raises(ValueError, match="'slimming' has no option 'weight'; did you mean 'reg_weight'"):
        methods.create("slimming", model, X, weight=1.0)
    with pytest.raises(ValueError, match="ratio"):
        methods.create("slimming", model, X, ratio=1.0)
    with pytest.raises(ValueError, match="scope"):
        methods.create("slimming", model, X, scope="everywhere")


@pytest.mark.parametrize(
    "option, value, kind",
    [
        ("update_interval", "10", "int"),
        ("update_interval", 2.5, "int"),
        ("stabilize", True, "int"),
        ("reg_step", "1e-4", "float"),  # as YAML reads it
        ("coupled", "no", "bool"),
        ("group", None, "str"),
        ("skip", 2.1, "str | tuple[str, ...]"),
        ("ratio_limit", "inf", "float | None"),
    ],
)
def test_options_of_another_type_are_refused(option, value, kind):
    with pytest.raises(ValueError, match=re.escape(f"option {option!r} of 'greg-1' must be {kind}, got {value!r}")):
        methods.create("greg-1", models.create("vgg-small"), X, **{option: value})


def test_options_of_like_types_are_taken():
    options = {"update_interval": np.int64(3), "reg_limit": 1, "reg_step": np.float32(0.5), "ratio_limit": None}
    method = methods.create("greg-1", models.create("vgg-small"), X, skip=["features.0"], **options)
    assert "features.0" not in method.groups


def test_register_refuses_a_taken_name():
    with pytest.raises(ValueError, match=r"'rni' is already taken by fastprune\.methods\.rni"):
        methods.register("rni")(type("Other", (methods.Method,), {}))


def test_a_model_without_the_right_norms_is_told_what_to_do():
    with pytest.raises(ValueError, match=r"no sigmoid norm; call fastprune\.nn\.convert_batchnorm.*bound='sigmoid'"):
        make("rni", models.create("vgg-small"))
    with pytest.raises(ValueError, match="no ordinary batch norm with a weight"):
        make("slimming", models.create("vgg-small", bound="sigmoid"))


# --- RNI's family --------------------------------------------------------------------------------------------------


def two_norms(bound):
    norms = [fpnn.SigmoidBatchNorm2d(n) if bound else nn.BatchNorm2d(n) for n in (3, 4)]
    for m, w in zip(norms, (GOLDEN["rni/model/w0"], GOLDEN["rni/model/w1"]), strict=True):
        m.weight.data.copy_(torch.from_numpy(w))
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), norms[0], nn.ReLU(), nn.Conv2d(3, 4, 3), norms[1], nn.Flatten(), nn.Linear(64, 2)
    )


@pytest.mark.parametrize(
    "name, options, key",
    [("rni", {"reg_weight": 1e-3, "b": 3}, "loss_rni_b3_1e-3"), ("slimming", {"reg_weight": 1e-4}, "loss_l1_1e-4")],
)
def test_penalty_is_the_authors(name, options, key):
    _, method = make(name, two_norms(bound_of(name)), **options)
    np.testing.assert_allclose(method.penalty().item(), GOLDEN[f"rni/model/{key}"], rtol=1e-6)


@pytest.mark.parametrize("name", ["rni", "slimming"])
@pytest.mark.parametrize("zeroed", [True, False])
def test_gradients_are_those_of_the_penalty_in_plain_autograd(name, zeroed):
    model, method = make(name, reg_weight=0.01)
    scales = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    kind, shift = ("rni", 3.0) if name == "rni" else ("l1", 0.0)
    grads = []
    for penalty in (method.penalty, lambda: 0.01 * ops.scale_penalty(scales, kind, shift)):
        torch.manual_seed(0)
        model.zero_grad(set_to_none=zeroed)
        if not zeroed:
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.5)  # of an earlier micro-batch
        model.eval()
        (3 * (nn.functional.cross_entropy(model(X), torch.tensor([0, 1])) + penalty())).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_penalty_alone_and_two_micro_batches_work():
    model, method = make("slimming", reg_weight=0.5)
    for _ in range(2):
        method.penalty().backward()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            torch.testing.assert_close(m.weight.grad, m.weight.sign())


def test_a_frozen_scale_gets_no_push():
    model = models.create("vgg-small")
    model.features[1].weight.requires_grad_(False)
    _, method = make("slimming", model, reg_weight=1.0)
    method.penalty().backward()
    assert model.features[1].weight.grad is None and model.features[4].weight.grad.all()


def test_ucs_has_no_penalty_and_ranks_within_layers():
    model, method = make("ucs", ratio=0.5)
    assert method.penalty() == 0 and method.scope == "local"
    spread(model)
    assert all(int(m.sum()) * 2 == len(m) for m in method.keep_masks().values())


def test_scores_are_the_scales():
    for name, score in (("rni", torch.sigmoid), ("slimming", torch.abs), ("ucs", torch.abs)):
        model, method = make(name)
        for key, group in method.groups.items():
            (norm,) = group.norms
            assert torch.equal(method.scores()[key], score(model.get_submodule(norm).weight.detach()))


@pytest.mark.parametrize("bound", ["sigmoid", None])
def test_vgg16_prunes_all_thirteen_norms(bound):
    model = models.create("vgg16-rni", bound=bound)
    method = methods.create("rni" if bound else "slimming", model, torch.randn(2, 3, 32, 32), ratio=0.5)
    assert len(method.groups) == 13 and sum(g.size for g in method.groups.values()) == 4224
    spread(model)
    assert sum(int(m.sum()) for m in method.keep_masks().values()) == 2112


def test_resnet56_prunes_the_first_norm_of_each_block_and_keeps_the_authors_channels():
    model = models.create("resnet56-rni", bound="sigmoid")
    method = methods.create("rni", model, torch.randn(2, 3, 32, 32), ratio=0.9)
    assert [g.norms for g in method.groups.values()] == [
        (f"layer{stage}.{block}.bn1",) for stage in (1, 2, 3) for block in range(9)
    ]
    start = 0
    for group in method.groups.values():
        weight = torch.from_numpy(GOLDEN["rni_masks/resnet56_sigbn/bn1"][start : start + group.size])
        model.get_submodule(group.norms[0]).weight.data.copy_(weight)
        start += group.size
    keep = method.keep_masks()
    assert [int(m.sum()) for m in keep.values()] == GOLDEN["rni_masks/resnet56_sigbn/kept_p0.9"].tolist()
    assert torch.cat(list(keep.values())).int().tolist() == GOLDEN["rni_masks/resnet56_sigbn/masks_p0.9"].tolist()
    assert len(method._scales) == 55  # penalised are all norms, prunable or not


@pytest.mark.parametrize("case", UCS, ids=lambda c: f"{c['model']}-{c['prune_pc']}")
def test_ucs_cuts_to_the_authors_widths_and_costs(case):
    name, _, dataset = case["model"].partition("_")
    model, x = models.create(f"{name}-rni", num_classes=int(dataset[5:])), torch.randn(2, 3, 32, 32)
    spread(model)
    keep = methods.create("ucs", model, x, ratio=case["prune_pc"]).keep_masks()
    assert [int(m.sum()) for m in keep.values()] == case["kept_per_bn"]
    count = fastprune.flops(fastprune.compact(model, keep, x), x)
    assert (count["macs"], count["params"]) == (case["macs"], case["params_total"])


def test_coupled_adds_the_residual_streams():
    model, x = models.create("resnet20"), torch.randn(2, 3, 16, 16)
    plain, coupled = methods.create("ucs", model, x), methods.create("ucs", model, x, coupled=True)
    assert len(plain.groups) == 9 and len(coupled.groups) > 9
    extra = [key for key, group in coupled.groups.items() if group.coupled]
    for key in extra:  # the mean over the norms on the stream
        group = coupled.groups[key]
        norms = [group.per_channel(f"{n}.weight", 0, model.get_submodule(n).weight.detach().abs()) for n in group.norms]
        torch.testing.assert_close(coupled.scores()[key], torch.stack(norms).mean(0))


def test_rni_polarises_the_scales():
    """A long time under the penalty alone: channels below the force's peak recede, those far above it stay."""
    model, method = make("rni", reg_weight=0.1, b=0)
    norm = model.features[1]
    norm.weight.data.copy_(torch.linspace(-3, 8, 32))
    before = method.scores()["features.0"].clone()
    optimizer = torch.optim.SGD([p for p in method._scales], 1.0)
    for _ in range(300):
        optimizer.zero_grad()
        method.penalty().backward()
        method.step(optimizer)
    after = method.scores()["features.0"]
    assert (after[before < 0.5] < 0.1).all() and (after[before > 0.999] > 0.99).all()


@pytest.mark.parametrize("kind", ["rni", "l1"])
def test_ddp_keeps_the_penalty(kind, tmp_path):
    """DistributedDataParallel writes .grad at the end of the backward: the penalty must not be lost under it."""
    import torch.distributed as dist

    name = "rni" if kind == "rni" else "slimming"
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model, method = make(name, reg_weight=0.1)
        y = torch.tensor([0, 1])
        model.eval()
        (nn.functional.cross_entropy(model(X), y) + method.penalty()).backward()
        expected = [p.grad.clone() for p in model.parameters()]
        for bucket_view in (False, True):
            model.zero_grad()
            ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
            (nn.functional.cross_entropy(ddp(X), y) + method.penalty()).backward()
            for p, grad in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, grad, rtol=1e-6, atol=1e-8)
    finally:
        dist.destroy_process_group()


def test_rni_module_documents_every_method_it_registers():
    assert all(f"| {n} " in rni.__doc__ for n, cls in methods.METHODS.items() if cls.__module__ == rni.__name__)
