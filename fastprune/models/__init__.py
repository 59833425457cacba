"""Networks by name: the pruning papers' CIFAR networks, torchvision's classifiers, timm's if it is installed."""

from fastprune.models import densenet_cifar, lenet, mlp, resnet_cifar, vgg, wide_resnet
from fastprune.models.registry import MODELS, create, list_models, recorded, register

__all__ = [
    "MODELS",
    "create",
    "densenet_cifar",
    "lenet",
    "list_models",
    "mlp",
    "recorded",
    "register",
    "resnet_cifar",
    "vgg",
    "wide_resnet",
]
