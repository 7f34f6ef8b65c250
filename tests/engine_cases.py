"""Networks that every engine must run, and parameters that skip where an engine is not installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from conftest import conv_block
from torch import Tensor, nn

from dgate_rt import StagedModel
from dgate_rt.engines import ENGINES

COMPILED = ("inductor", "openvino", "onnxruntime")


def installed(name: str) -> bool:
    return all(importlib.util.find_spec(package) for package in ENGINES[name].packages)


def needs(name: str, *values: object):
    """A parameter that is skipped where an engine's packages are missing."""
    missing = pytest.mark.skipif(not installed(name), reason=f'needs pip install "dgate-rt[{name}]"')
    return pytest.param(name, *values, marks=missing, id="-".join([name, *map(str, values)]))


class Fork(nn.Module):
    """A convolution, and what skips the next stage."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_block(3, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, y.mean((2, 3))


class Join(nn.Module):
    """The end of the residual branch, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv_block(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)) + skip)


class Tokens(nn.Module):
    """Patches, a class token, positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.cls, self.places = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(x.shape[0], -1, -1), tokens], 1) + self.places


class Attention(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16)])
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Classify(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, 0])


def network(kind: str) -> StagedModel:
    torch.manual_seed(0)
    stages = {
        "conv": lambda: [conv_block(3, 8), nn.Sequential(conv_block(8, 16, 2), Pooled(16))],
        "in place": lambda: [
            nn.Conv2d(3, 8, 3),
            nn.Sequential(nn.ReLU(inplace=True), conv_block(8, 16, 2), Pooled(16)),
        ],
        "residual": lambda: [Fork(), Join()],
        "vit": lambda: [nn.Sequential(Tokens(), Attention()), Classify()],
    }[kind]()
    model = StagedModel(stages)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model.eval()


class Pooled(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
