"""Networks of the smallest size."""

from __future__ import annotations

from typing import Any

import torch

from src.classifiers.cnn3 import CNN3
from src.classifiers.cnn6 import CNN6
from src.classifiers.lenet import LeNet
from src.classifiers.network import Network
from src.classifiers.resnet18 import ResNet18
from src.classifiers.torchvision import TorchvisionModel
from src.classifiers.vgg16_bn import VGG16BN

OWN: list[type[Network]] = [LeNet, CNN3, CNN6, VGG16BN, ResNet18]
SMALL = {"model": "mobilenet_v3_small", "resize": 32}


def make(kind: type[Network], channels: int, size: int, **options: Any) -> Network:
    torch.manual_seed(0)
    if kind is TorchvisionModel:
        options = SMALL | options
    if kind is CNN6:
        options = {"patches": torch.eye(4 * channels).tolist(), "symmetric": True} | options
    return kind(
        channels=channels,
        size=(size, size),
        num_classes=10,
        mean=[0.4] * channels,
        std=[0.2] * channels,
        **options,
    )
