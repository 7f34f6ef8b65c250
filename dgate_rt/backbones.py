"""CIFAR forms of torchvision's ResNet and DenseNet families, at any width, EfficientNet-Lite0, and their files.

The CIFAR form has a 3x3 stem of stride 1 and no max-pool, so a 32x32 image keeps its size up to the second block (the
networks of the paper's Tables 1 and 2). Submodules are named as torchvision names them. EfficientNet-Lite0 is timm's;
its weights come with a package, see `transfer`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import DenseNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from dgate_rt.data import DataBundle, Stats
from dgate_rt.flops import count_flops
from dgate_rt.writing import replacing

_CHANNEL_MULTIPLE = 8
_FORMAT = "dgate_rt.backbone"
_VERSION = "1"


def _scaled(channels: int, width: float, multiple: int) -> int:
    """``channels * width`` to the nearest multiple, at least one; the full width is exact."""
    if width == 1:
        return channels
    return max(1, int(channels * width / multiple + 0.5)) * multiple


class CifarResNet(nn.Module):
    """A ResNet (He et al. 2016) of torchvision's blocks behind a 3x3 stem.

    Args:
        block: `BasicBlock` (two 3x3 layers) or `Bottleneck` (1x1, 3x3, 1x1).
        depths: number of blocks in layer1 to layer4.
        num_classes: see `build`.
        width: see `build`.
        in_channels: see `build`.
        multiple: see `build`.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, int, int, int],
        *,
        num_classes: int,
        width: float,
        in_channels: int,
        multiple: int = _CHANNEL_MULTIPLE,
    ) -> None:
        super().__init__()
        channels = base = _scaled(64, width, multiple)
        self.conv1 = nn.Conv2d(in_channels, base, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.relu = nn.ReLU(inplace=True)
        for index, depth in enumerate(depths):
            planes, blocks = base << index, []
            for number in range(depth):
                stride = 2 if index and not number else 1
                shortcut = None
                if stride > 1 or channels != planes * block.expansion:
                    shortcut = nn.Sequential(
                        nn.Conv2d(channels, planes * block.expansion, 1, stride, bias=False),
                        nn.BatchNorm2d(planes * block.expansion),
                    )
                blocks.append(block(channels, planes, stride, shortcut))
                channels = planes * block.expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # [N, in_channels, H, W] -> [N, num_classes]
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _densenet(
    growth: int,
    depths: tuple[int, int, int, int],
    stem: int,
    *,
    num_classes: int,
    width: float,
    in_channels: int,
    multiple: int,
) -> nn.Module:
    """torchvision's DenseNet (Huang et al. 2017) with its stem replaced by a 3x3 layer of stride 1."""
    stem = _scaled(stem, width, multiple)
    model = DenseNet(_scaled(growth, width, multiple), depths, stem, num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)
    del model.features.pool0
    return model


def _efficientnet_lite0(*, num_classes: int, width: float, in_channels: int, multiple: int) -> nn.Module:
    """timm's port of TensorFlow's network, in the form that its weights are for."""
    if width != 1:
        raise ValueError(f"width: efficientnet_lite0 has the width of its weights, 1, got {width:g}")
    from timm import create_model

    return create_model("tf_efficientnet_lite0", num_classes=num_classes, in_chans=in_channels)


@dataclass(frozen=True)
class _Family:
    """Where networks of one kind can be cut."""

    ends: tuple[str, ...]  # of each main block but the last
    blocks: str  # a pattern of the names of all blocks
    image_size: int = 32  # of the images that it is made for


_RESNET = _Family(("layer1", "layer2", "layer3"), r"layer\d\.\d+")
_DENSENET = _Family(
    ("features.denseblock1", "features.denseblock2", "features.denseblock3"),
    r"features\.(denseblock|transition)\d",
)
_EFFICIENTNET = _Family(("blocks.1", "blocks.2", "blocks.4"), r"blocks\.\d\.\d", 224)  # at 56, 28 and 14 pixels

_BACKBONES: dict[str, tuple[_Family, Callable[..., nn.Module]]] = {
    "resnet18": (_RESNET, partial(CifarResNet, BasicBlock, (2, 2, 2, 2))),
    "resnet26": (_RESNET, partial(CifarResNet, BasicBlock, (3, 3, 3, 3))),
    "resnet34": (_RESNET, partial(CifarResNet, BasicBlock, (3, 4, 6, 3))),
    "resnet50": (_RESNET, partial(CifarResNet, Bottleneck, (3, 4, 6, 3))),
    "resnet101": (_RESNET, partial(CifarResNet, Bottleneck, (3, 4, 23, 3))),
    "resnet152": (_RESNET, partial(CifarResNet, Bottleneck, (3, 8, 36, 3))),
    "densenet121": (_DENSENET, partial(_densenet, 32, (6, 12, 24, 16), 64)),
    "densenet161": (_DENSENET, partial(_densenet, 48, (6, 12, 36, 24), 96)),
    "densenet169": (_DENSENET, partial(_densenet, 32, (6, 12, 32, 32), 64)),
    "densenet201": (_DENSENET, partial(_densenet, 32, (6, 12, 48, 32), 64)),
    "efficientnet_lite0": (_EFFICIENTNET, _efficientnet_lite0),
}


def names() -> list[str]:
    """The names that `build` takes."""
    return list(_BACKBONES)


def _find(name: str) -> tuple[_Family, Callable[..., nn.Module]]:
    if name not in _BACKBONES:
        near = difflib.get_close_matches(name, _BACKBONES, n=3) or names()
        raise ValueError(f"name: no backbone {name!r}; near names: {', '.join(near)}")
    return _BACKBONES[name]


def build(
    name: str,
    *,
    num_classes: int = 10,
    width: float = 1.0,
    in_channels: int = 3,
    multiple: int = _CHANNEL_MULTIPLE,
) -> nn.Module:
    """A freshly initialised backbone.

    Args:
        name: one of `names`. ``resnet26`` has three basic blocks a layer, for small machines.
        num_classes: outputs of the classifier, K.
        width: factor on every channel count; 1 for ``efficientnet_lite0``.
        in_channels: channels of the image.
        multiple: channel counts are rounded to multiples of this, at least one; what a width other than 1 leaves.

    Raises:
        ValueError: if the name is unknown (near names are listed) or a number is not positive.
    """
    _, builder = _find(name)
    if num_classes < 1 or in_channels < 1 or multiple < 1 or not width > 0:
        raise ValueError(
            "num_classes, in_channels, multiple and width must be positive, "
            f"got num_classes={num_classes}, in_channels={in_channels}, multiple={multiple}, width={width}"
        )
    return builder(num_classes=num_classes, width=width, in_channels=in_channels, multiple=multiple)


def default_cuts(name: str) -> tuple[str, ...]:
    """Where gates go unless said otherwise, as in the paper: after each main block but the last."""
    return _find(name)[0].ends


def block_cuts(name: str) -> tuple[str, ...]:
    """Every place where a gate could be: after each block, or dense block and transition, but the last."""
    blocks = _find(name)[0].blocks
    with torch.device("meta"):
        model = build(name)
    return tuple(child for child, _ in model.named_modules() if re.fullmatch(blocks, child))[:-1]


def image_size(name: str) -> int:
    """Pixels a side of the images that the network is made for."""
    return _find(name)[0].image_size


def stage_flops(name: str, num_classes: int = 10) -> list[int]:
    """FLOPs a sample up to each of the default cuts, and of the rest, for `image_size`; nothing is computed."""
    size = image_size(name)
    with torch.device("meta"):
        model, example = build(name, num_classes=num_classes).eval(), torch.empty(1, 3, size, size)
    so_far = [0]
    with torch.no_grad(), count_flops() as counter:
        for cut in default_cuts(name):
            model.get_submodule(cut).register_forward_hook(lambda *_: so_far.append(counter.get_total_flops()))
        model(example)
    return [after - before for before, after in pairwise([*so_far, counter.get_total_flops()])]


@dataclass(frozen=True)
class BackboneMeta:
    """What a backbone file says of its network, and of the images that it was trained on."""

    name: str
    width: float = 1.0
    num_classes: int = 10
    in_channels: int = 3
    image_size: int = 32
    dataset: str = ""
    data_seed: int = 0  # of the split into train, val and test
    classes: tuple[str, ...] = ()  # their names
    stats: Stats = ((), ())  # mean and deviation of each channel, by which images are normalised
    accuracy: float | None = None  # on the test split
    origin: str = ""  # the command that made it

    def __post_init__(self) -> None:
        mean, std = self.stats
        object.__setattr__(self, "stats", (tuple(mean), tuple(std)))  # JSON has lists only
        object.__setattr__(self, "classes", tuple(self.classes))

    @classmethod
    def of(cls, name: str, width: float, bundle: DataBundle, data_seed: int = 0) -> BackboneMeta:
        """The network ``name`` for the images of ``bundle``."""
        channels, height, _ = bundle.image_shape
        classes, stats = bundle.classes, bundle.stats
        return cls(name, width, len(classes), channels, height, bundle.name, data_seed, classes, stats)

    def build(self) -> nn.Module:
        """The network, freshly initialised."""
        return build(self.name, num_classes=self.num_classes, width=self.width, in_channels=self.in_channels)


def save_backbone(path: str | Path, model: nn.Module, meta: BackboneMeta) -> None:
    """Write parameters and buffers, with ``meta`` as JSON, to one safetensors file; an existing file is replaced whole.

    Raises:
        ValueError: if ``model`` is not the network that ``meta`` describes.
        FileNotFoundError: if there is no such folder.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with torch.device("meta"):
        _check_state(state, meta.build().state_dict(), "model")
    with replacing(Path(path)) as partial_path:
        save_file(state, partial_path, {"format": _FORMAT, "version": _VERSION, "meta": json.dumps(asdict(meta))})


def load_backbone(path: str | Path) -> tuple[nn.Module, BackboneMeta]:
    """Read a file of `save_backbone`; the network comes in eval mode. Nothing is unpickled.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, foreign, of another version, or its tensors do not fit its network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no file {path}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {path} is not a whole safetensors file: {error}") from error
    if header.get("format") != _FORMAT or header.get("version") != _VERSION:
        raise ValueError(
            f"path: {path}: expected format {_FORMAT!r} version {_VERSION!r}, "
            f"got {header.get('format')!r} version {header.get('version')!r}"
        )
    try:
        meta = BackboneMeta(**json.loads(header["meta"]))
        model = meta.build()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: {path} holds no usable description of a backbone: {error}") from error
    _check_state(state, model.state_dict(), f"path: {path}")
    model.load_state_dict(state)
    return model.eval(), meta


def _check_state(state: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    for key in [*expected, *(state.keys() - expected.keys())]:
        have, want = (None if t is None else (tuple(t.shape), t.dtype) for t in (state.get(key), expected.get(key)))
        if have != want:
            raise ValueError(f"{what}: tensor {key!r}: expected {want}, got {have}")


if __name__ == "__main__":
    for backbone in names():
        print(f"{backbone:18} {sum(stage_flops(backbone)) / 1e9:7.3f}")
