"""Networks of timm, smallest of their kind: what the graph leaves alone in them, and that the rest can go."""

from __future__ import annotations

import pytest
import torch
from graph_cases import uneven_keep
from torch import nn

from fastprune.compact import compact
from fastprune.graph import trace

timm = pytest.importorskip("timm")

SCALE = "the scale of attention depends on how many there are"
OF_INPUT = "the code of Attention relies on how many there are"  # reshape(B, N, C) with C of another tensor
OVER_CHANNELS = "a convolution slides over it"
LAYER_NORM = "layer norm averages over it"
STANDARDISED = "weights are standardised over it"
# name -> (options, what is left alone besides the classifier: reason -> number of layers)
CASES = {
    "res2net50_26w_4s": (dict(layers=(2, 1, 1, 1)), {}),
    "skresnet18": (dict(layers=(1, 1, 1, 1)), {}),
    "resnest14d": ({}, {}),
    "resnetblur50": (dict(layers=(1, 1, 1, 1)), {}),
    "ecaresnet26t": (dict(layers=(1, 1, 1, 1)), {OVER_CHANNELS: 8, "it has a single output channel": 4}),
    "cs3darknet_focus_s": ({}, {}),
    "dpn48b": (dict(k_sec=(2, 1, 1, 1)), {}),
    "mixnet_s": ({}, {}),
    "nf_resnet26": (dict(depths=(1, 1, 1, 1)), {STANDARDISED: 15}),
    "convnext_atto": (dict(depths=(1, 1, 1, 1)), {LAYER_NORM: 12}),
    "fasternet_t0": ({}, {}),
    "fastvit_t8": (dict(layers=(1, 1, 1, 1), token_mixers=("repmixer",) * 3 + ("attention",)), {OF_INPUT: 33}),
    "test_vit": ({}, {LAYER_NORM: 13, SCALE: 6}),
}


@pytest.mark.parametrize("name", CASES)
def test_pruned_and_proved(name):
    options, expected = CASES[name]
    model = timm.create_model(name, num_classes=11, **options).eval()
    x = torch.randn(2, 3, *(model.default_cfg["input_size"][1:] if name == "test_vit" else (64, 64)))
    graph, left = trace(model, x), {}
    widths = {n: len(m.weight) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Conv1d, nn.Linear))}
    compact(model, uneven_keep(graph), x)
    for layer, width in widths.items():
        if width == len(model.get_submodule(layer).weight) != 11:
            left[graph.frozen[layer]] = left.get(graph.frozen[layer], 0) + 1
    assert left == expected
    model.train()
    model(x).square().mean().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
