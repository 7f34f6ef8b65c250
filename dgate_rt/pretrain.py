"""Training a backbone from scratch, and the recipe of the demo.

Nesterov SGD under a one-cycle schedule, in bfloat16 where the hardware multiplies it natively; label smoothing
(Szegedy et al. 2016) and mixup (Zhang et al. 2018) where asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dgate_rt import data
from dgate_rt.backbones import BackboneMeta
from dgate_rt.data import DataBundle
from dgate_rt.progress import length_of, track
from dgate_rt.writing import replacing

_WARM_UP_SHARE = 0.25
_ONEDNN_BLOCK = 8  # channels
_CHECKPOINT_FORMAT = "dgate_rt.pretraining"


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training data gave."""

    loss: float  # mean, with label smoothing
    train_accuracy: float  # of the predictions made while training
    val_accuracy: float | None


@dataclass(frozen=True)
class _Settings:
    """What decides the weights that come out; a checkpoint holds it to refuse any other training."""

    epochs: int
    steps: int  # an epoch
    lr: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    mixup: float
    seed: int
    bfloat16: bool

    def learning_rate(self, step: int) -> float:
        """Up linearly for the first quarter, then down along a cosine to nothing."""
        total = self.epochs * self.steps
        warm_up = _WARM_UP_SHARE * total
        if step < warm_up:
            return self.lr * (step + 1) / (warm_up + 1)
        return self.lr * (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up))) / 2


def native_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether ``device`` multiplies bfloat16 matrices natively (a CPU: AMX or AVX-512 BF16)."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return kind == "cpu" and any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def train_backbone(
    model: nn.Module,
    source: DataBundle | Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    lr: float = 0.2,
    batch_size: int = 64,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    augment: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    bfloat16: bool | None = None,
    val_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> list[Epoch]:
    """Train ``model`` in place to classify, and leave it in eval mode.

    On one machine, with one number of threads, a seed gives the same weights, interrupted and resumed or not.

    Args:
        model: any classifier, ``[N, C, H, W] -> [N, K]`` logits.
        source: a `DataBundle`, or a loader of ``(x, y)`` that has a length and can be gone through again.
        epochs: passes over the training data.
        lr: the highest learning rate.
        batch_size: of the loader made from a bundle; a loader keeps its own.
        momentum: of Nesterov SGD.
        weight_decay: of matrices and kernels; norms and biases do not decay.
        label_smoothing: of the cross-entropy, in [0, 1).
        mixup: alpha of the Beta(alpha, alpha) by which pairs of images and their losses are mixed; 0 for none.
        augment: random crops (and flips), where ``source`` is a bundle.
        seed: of the order of samples and of augmentation. The weights are initialised before, by whoever made them.
        device: where to train; the model is moved there.
        bfloat16: autocast; None asks `native_bfloat16`.
        val_loader: measures accuracy after each epoch.
        progress: show a bar with the time left.
        checkpoint: file written after every epoch; where it exists, training goes on from it.

    Returns:
        What each epoch gave.

    Raises:
        ValueError: if there is nothing to train on, a number is out of range, the loss is not finite, or the
            checkpoint is damaged or belongs to another training.
    """
    loader = (
        source.loader("train", batch_size, shuffle=True, augment=augment) if isinstance(source, DataBundle) else source
    )
    steps = length_of(loader)
    if not steps:
        raise ValueError(f"source: expected a loader of known length, one batch at least, got length {steps}")
    if epochs < 1 or not lr > 0:
        raise ValueError(f"epochs and lr must be positive, got epochs={epochs}, lr={lr}")
    if not 0 <= label_smoothing < 1 or not 0 <= mixup < math.inf:
        raise ValueError(
            f"expected label_smoothing in [0, 1) and mixup >= 0, got label_smoothing={label_smoothing}, mixup={mixup}"
        )
    half = native_bfloat16(device) if bfloat16 is None else bfloat16
    settings = _Settings(epochs, steps, lr, momentum, weight_decay, label_smoothing, mixup, seed, half)
    model.to(device=device, memory_format=_layout(model))  # type: ignore[call-overload]  # stub lacks it
    optimizer = _optimizer(model, settings)
    history: list[Epoch] = []
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        history = _resume(path, model, optimizer, settings)
    try:
        for epoch in range(len(history), epochs):
            devices = [device] if torch.device(device).type == "cuda" else []
            with torch.random.fork_rng(devices), torch.enable_grad():
                torch.manual_seed(seed * 1_000_003 + epoch)
                title = f"training the backbone, epoch {epoch + 1} of {epochs}"
                batches = track(loader, title, enabled=progress)
                loss, accuracy = _one_epoch(model, batches, optimizer, settings, epoch * steps, device)
            held_out = None if val_loader is None else evaluate(model, val_loader, device=device, bfloat16=half)
            history.append(Epoch(loss, accuracy, held_out))
            if path is not None:
                _save_checkpoint(path, model, optimizer, settings, history)
    finally:
        model.eval()
    return history


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str = "cpu",
    bfloat16: bool = False,
    progress: bool = False,
) -> float:
    """The share of samples that ``model``, in eval mode, classifies as labelled.

    Raises:
        ValueError: if the loader yields nothing.
    """
    was_training, correct, count = model.training, 0, 0
    model.eval()
    with torch.inference_mode():
        for x, y in track(loader, "test accuracy", enabled=progress):
            logits, target = _forward(model, x, y, device, bfloat16)
            correct += int((logits.argmax(1) == target).sum())
            count += len(target)
    model.train(was_training)
    if not count:
        raise ValueError("loader: expected at least one batch of (x, y), got none")
    return correct / count


def _optimizer(model: nn.Module, settings: _Settings) -> torch.optim.SGD:
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    free = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, settings.lr, settings.momentum, nesterov=settings.momentum > 0)


def _layout(model: nn.Module) -> torch.memory_format:
    """channels_last, but for narrow networks that cannot be trained in it on every CPU.

    With AVX2 and no more, oneDNN's gradient of the kernel of a strided 1x1 convolution of fewer than 8 channels writes
    past its workspace (its issue 6035; seen with torch 2.14.1): wrong gradients, a crash, or threads that never end.
    """
    broken = any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < _ONEDNN_BLOCK
        for m in model.modules()
    )
    return torch.contiguous_format if broken else torch.channels_last


def _forward(
    model: nn.Module, x: Tensor, y: Tensor, device: torch.device | str, bfloat16: bool
) -> tuple[Tensor, Tensor]:
    layout = _layout(model) if x.ndim == 4 else torch.contiguous_format
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16):
        return model(x.to(device).contiguous(memory_format=layout)).float(), y.to(device)


def _mixed(x: Tensor, alpha: float) -> tuple[Tensor, Tensor, float]:  # images, the other of each pair, share of the one
    order = torch.arange(len(x))
    if alpha == 0:
        return x, order, 1.0
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(len(x))
    return torch.lerp(x[order], x, share), order, share


def _one_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.SGD,
    settings: _Settings,
    first_step: int,
    device: torch.device | str,
) -> tuple[float, float]:  # mean loss, accuracy
    model.train()
    surprise = partial(nn.functional.cross_entropy, label_smoothing=settings.label_smoothing)
    loss_sum, correct, count = 0.0, 0, 0
    for step, (x, y) in enumerate(batches, first_step):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate(step)
        x, order, share = _mixed(x, settings.mixup)
        logits, target = _forward(model, x, y, device, settings.bfloat16)
        loss = share * surprise(logits, target)
        if share < 1:
            loss += (1 - share) * surprise(logits, target[order.to(target.device)])
        if not loss.isfinite():
            raise ValueError(f"loss: {loss.item()} at step {step}; lower lr, or look for NaN in the images")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(target)
        correct += int((logits.argmax(1) == target).sum())
        count += len(target)
    return loss_sum / count, correct / count


def _momenta(optimizer: torch.optim.SGD) -> Iterator[tuple[str, Tensor]]:
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        yield f"momentum.{index}", parameter


def _save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.SGD, settings: _Settings, history: list[Epoch]
) -> None:
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for key, parameter in _momenta(optimizer):
        if (buffer := optimizer.state[parameter].get("momentum_buffer")) is not None:
            tensors[key] = buffer
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    header = {"settings": json.dumps(asdict(settings)), "history": json.dumps([asdict(epoch) for epoch in history])}
    with replacing(path) as partial:
        save_file(tensors, partial, {"format": _CHECKPOINT_FORMAT, **header})


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.SGD, settings: _Settings) -> list[Epoch]:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint: {path} is not a whole safetensors file: {error}") from error
    if header.get("format") != _CHECKPOINT_FORMAT:
        raise ValueError(f"checkpoint: {path}: expected {_CHECKPOINT_FORMAT!r}, got {header.get('format')!r}")
    found, wanted = json.loads(header["settings"]), asdict(settings)
    if found != wanted:
        differ = {k: (wanted[k], found.get(k)) for k in wanted if wanted[k] != found.get(k)}
        raise ValueError(f"checkpoint: {path} is of another training; (expected, got): {differ}")
    try:
        model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    except RuntimeError as error:
        raise ValueError(f"checkpoint: {path} does not fit the model: {error}") from error
    for key, parameter in _momenta(optimizer):
        if key in tensors:
            buffer = torch.empty_like(parameter).copy_(tensors[key])
            optimizer.state[parameter]["momentum_buffer"] = buffer
    return [Epoch(**epoch) for epoch in json.loads(header["history"])]


@dataclass(frozen=True)
class Recipe:
    """Data, network and training that belong together."""

    dataset: str
    name: str  # of the backbone
    width: float
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 5e-4
    image_size: int | None = None
    renderings: int = 8  # of each training digit; cluttered-mnist only

    def load_data(self) -> DataBundle:
        """The images that the recipe trains on and is tested with."""
        return data.load(self.dataset, image_size=self.image_size, renderings=self.renderings)


DEMO = Recipe("cluttered-mnist", "resnet26", width=0.25, epochs=2, batch_size=64, lr=0.2)
"""A ResNet of real depth that two cores train in about two minutes."""

QUICK = Recipe("digits", "resnet26", width=0.125, epochs=8, batch_size=32, lr=0.1, image_size=16)
"""The same network on small, easy images: seconds, to see that everything works."""


def train_recipe(
    recipe: Recipe, bundle: DataBundle, *, seed: int = 0, bfloat16: bool | None = None, progress: bool = True
) -> tuple[nn.Module, BackboneMeta]:
    """Make and train the recipe's network on ``bundle`` (of `Recipe.load_data`), and measure it on the test split."""
    meta = BackboneMeta.of(recipe.name, recipe.width, bundle)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = meta.build()
    train_backbone(
        model,
        bundle,
        epochs=recipe.epochs,
        lr=recipe.lr,
        batch_size=recipe.batch_size,
        weight_decay=recipe.weight_decay,
        seed=seed,
        bfloat16=bfloat16,
        progress=progress,
    )
    return model, replace(meta, accuracy=evaluate(model, bundle.loader("test", 128), progress=progress))
