"""The networks of the coverage table: torchvision's for classification, one or two of each CNN family of timm.

They are built small (few pixels, no pretrained weights) and with weights of our own: at initialisation many affine
parameters are 0 or 1 and batch norm has no statistics, so a mistake in a removal could cancel out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CLASSES = 997  # a prime: no other layer has as many outputs, so it tells the classifiers
BATCH = 2
TRANSFORMERS = ("maxvit", "swin", "vit")  # of torchvision, by the first letters of their names

# One or two small variants per family; a name behind another adds an op or a connection that the first has not.
TIMM = """
bat_resnext26ts botnet26t_256 convformer_s18 convmixer_768_32 convnext_atto convnext_atto_rms convnextv2_atto
cs3darknet_focus_s cs3edgenet_x cs3se_edgenet_x cspdarknet53 cspnext_tiny cspresnet50 cspresnext50 darknetaa53
densenetblur121d dla34 dla46x_c dla60_res2next dm_nfnet_f0 dpn48b dpn68 eca_halonext26ts eca_nfnet_l0 ecaresnet26t
edgenext_xx_small efficientnet_b0_gn efficientnet_blur_b0 efficientnet_cc_b0_4e efficientnet_es efficientnet_lite0
efficientnetv2_rw_t efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim_dw ese_vovnet39b fasternet_t0 fastvit_sa12
fastvit_t8 fbnetc_100 fbnetv3_b gc_efficientnetv2_rw_t gcresnext26ts gernet_s ghostnet_050 ghostnetv2_100
ghostnetv3_050 halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small inception_next_atto inception_resnet_v2
inception_v4 lambda_resnet26t lcnet_050 legacy_seresnext26_32x4d legacy_xception mambaout_femto mixnet_s mnasnet_small
mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_blur_medium mobilenetv4_conv_small_035
mobileone_s0 nasnetalarge nf_regnet_b0 nf_resnet26 pnasnet5large poolformer_s12 poolformerv2_s12 rdnet_tiny
regnetv_040 regnetx_002 regnety_002 regnetz_005 regnetz_b16 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s
res2next50 resnest14d resnest50d_4s2x40d resnet26t resnet50_clip resnet50_gn resnet51q resnetaa34d resnetblur18
resnetrs50 resnetv2_18 resnetv2_50d_evos resnetv2_50d_frn resnetv2_50x1_bit rexnet_100 sebotnet33ts_256 selecsls42
semnasnet_075 seresnext26t_32x4d skresnet18 skresnext50_32x4d spnasnet_100 starnet_s050 tf_efficientnet_b0 tinynet_e
tresnet_m visformer_tiny vovnet39a xception41 xception41p
""".split()

# These need some 12 GiB in float64, several minutes on a slow machine, and a machine to themselves.
HEAVY = frozenset({"regnet_y_128gf", "vit_h_14"})

# Pixels along a side where 64 do not do.
SIZES = {
    "maxvit_t": 224,  # five halvings must leave a window of 7
    "inception_v3": 299,  # its auxiliary head needs 17 x 17
    "vit_h_14": 56,
    "halonet26t": 256,  # its last stage must hold a block of 8
    "eca_halonext26ts": 256,
    "bat_resnext26ts": 256,
    "inception_v4": 96,
    "inception_resnet_v2": 96,
}


def names() -> list[tuple[str, str]]:
    """``(source, network)`` of all networks, source "torchvision" or "timm"."""
    import torchvision

    tv = torchvision.models.list_models(module=torchvision.models)
    return [("torchvision", n) for n in tv] + [("timm", n) for n in TIMM]


def kind(source: str, net: str) -> str:
    """The block of the table a network belongs to."""
    return f"{source} {'transformers' if source == 'torchvision' and net.startswith(TRANSFORMERS) else 'CNNs'}"


class _NoInit(TorchFunctionMode):
    """Leave out random initialisation: :func:`build` draws all weights again, and truncated normals are slow."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        skipped = func in (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, nn.init.trunc_normal_)
        return args[0] if skipped else func(*args, **(kwargs or {}))


def build(source: str, net: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network in eval mode with generic weights, and images for it.

    Returns: The model, float32 on the CPU, and (BATCH, 3, S, S) images.
    """
    size = SIZES.get(net, 64)
    torch.manual_seed(seed)
    with _NoInit():
        if source == "torchvision":
            import torchvision

            options = {"init_weights": False} if net in ("googlenet", "inception_v3") else {}
            options |= {"image_size": size} if net.startswith("vit") else {}
            model = torchvision.models.get_model(net, weights=None, num_classes=CLASSES, **options)
        else:
            import timm

            fixed = timm.get_pretrained_cfg(net)
            options = {}
            if fixed is not None and fixed.fixed_input_size:
                options = {"img_size": size}
            model = timm.create_model(net, pretrained=False, num_classes=CLASSES, **options)
    images = torch.randn(BATCH, 3, size, size)
    randomise(model, images, seed)
    return model.eval(), images


@torch.no_grad()
def randomise(model: nn.Module, images: Tensor, seed: int) -> None:
    """Draw all parameters and statistics, such that activations keep their scale and nothing is zero by accident.

    Vectors (scales, shifts, layer scales) get values that are all different.  Batch norm gets the variance it sees on
    ``images``, averaged over the layer, times 0.5 to 1.5.
    """
    generator = torch.Generator().manual_seed(seed)

    def distinct(shape: torch.Size, low: float, high: float) -> Tensor:
        n = shape.numel()
        return (low + (high - low) * (torch.randperm(n, generator=generator) + 0.5) / n).view(shape)

    for name, p in model.named_parameters():
        if p.numel() == max(p.shape, default=1):
            low, high = (-math.pi / 10, 0.3) if name.endswith("bias") else (0.5, 1.5)  # never exactly zero
            p.copy_(distinct(p.shape, low, high))
        else:
            fan_in = p[0].numel() if p.shape[0] > 1 else p.shape[-1]
            p.copy_(torch.randn(p.shape, generator=generator) * (1.5 / fan_in) ** 0.5)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = 1.0
    model.train()
    for m in model.modules():
        if "drop" in type(m).__name__.lower() or type(m).__name__ == "StochasticDepth":
            m.eval()
    model(images)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
        spread = m.running_var.nanmean().clamp(1e-3, 1e6) if m.running_var.isfinite().any() else torch.tensor(1.0)
        m.running_mean.nan_to_num_().add_(0.1 * spread.sqrt() * torch.randn(m.num_features, generator=generator))
        m.running_var.copy_(spread * distinct(m.running_var.shape, 0.5, 1.5))
    model.eval()


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The layers that make the network's outputs."""
    return [m for _, m in _layers(model) if m.weight.shape[0] == CLASSES]


def prunable(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by name, without classifiers and layers of a single output."""
    return {name: m for name, m in _layers(model) if m.weight.shape[0] not in (1, CLASSES)}


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]
