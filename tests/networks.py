"""The networks that must split and run alike, at sizes that a test can afford; random weights, eval mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """One network, where to cut it, and the side of its square input."""

    build: Callable[[], nn.Module]
    cuts: tuple[str, ...]
    side: int = 64

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return settle(self.build().eval(), self.images(8))

    def images(self, count: int) -> Tensor:
        return torch.randn(count, 3, self.side, self.side, generator=torch.Generator().manual_seed(1))


def settle(model: nn.Module, images: Tensor) -> nn.Module:
    """Give BatchNorm the statistics of some images, so that random weights neither vanish nor blow up."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = None
    with torch.no_grad():
        model(images)
    return model.eval()


RESNET, DENSENET = ("layer1", "layer2", "layer3"), tuple(f"features.denseblock{i}" for i in (1, 2, 3))

NETWORKS: dict[str, Network] = {
    "resnet18": Network(tv.resnet18, RESNET),
    "resnet101": Network(tv.resnet101, RESNET, 32),
    "resnet18 inside a residual branch": Network(
        tv.resnet18, ("layer1.1.conv1", "layer2.0.bn1", "layer3.0.downsample")
    ),
    "densenet121": Network(tv.densenet121, DENSENET),
    "densenet201": Network(tv.densenet201, DENSENET, 32),
    "mobilenet_v3_small": Network(tv.mobilenet_v3_small, ("features.3", "features.8")),
    "efficientnet_b0": Network(tv.efficientnet_b0, ("features.3", "features.5")),
    "convnext_tiny": Network(tv.convnext_tiny, ("features.1", "features.3", "features.5")),
    "regnet_y_400mf": Network(tv.regnet_y_400mf, ("trunk_output.block1", "trunk_output.block3")),
    "vit_b_16": Network(
        lambda: tv.vit_b_16(image_size=64), tuple(f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8))
    ),
    "swin_t": Network(tv.swin_t, ("features.1", "features.3", "features.5")),
    "googlenet": Network(lambda: tv.googlenet(init_weights=False), ("inception3b", "inception4e")),
    "timm mobilenetv3_small_100": Network(
        lambda: timm.create_model("mobilenetv3_small_100"), ("blocks.2", "blocks.4"), 64
    ),
    "timm vit_tiny_patch16_224": Network(
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64), ("blocks.3", "blocks.7"), 64
    ),
}
