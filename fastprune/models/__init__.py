"""Networks by name: the pruning papers' CIFAR networks, torchvision's classifiers, timm's if it is installed."""

from fastprune.models import resnet_cifar, vgg
from fastprune.models.registry import MODELS, create, list_models, register

__all__ = ["MODELS", "create", "list_models", "register", "resnet_cifar", "vgg"]
