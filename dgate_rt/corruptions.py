"""Noise, blur and loss of contrast, each at five severities: what happens to images once a network is in use.

After Hendrycks and Dietterich 2019 ("Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"),
from whose families these are taken. The strengths are our own: mild enough that a network on cluttered MNIST loses
accuracy little by little, so figures do not compare with theirs. Images are corrupted as bytes, before normalisation,
and in integers, so a seed gives the same bits on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from dgate_rt.data import ArrayDataset, DataBundle, Stats

SEVERITIES = (1, 2, 3, 4, 5)
_NOISE = (0.05, 0.10, 0.18, 0.26, 0.36)
"""Standard deviations, where white is 1."""
_BLUR = (0.4, 0.55, 0.7, 0.9, 1.2)
"""Standard deviations in pixels of an image that is 32 pixels high; in others they grow with its height."""
_CONTRAST = (0.95, 0.88, 0.78, 0.65, 0.5)
"""What is left of each pixel's distance from the mean of its image and channel."""
_ONE = 1 << 16  # fixed point
_VALUES = 1 << 20
"""Values that are worked on at a time; each takes eight bytes, a few times over."""

Pixels = NDArray[np.int64]  # [N, C, H, W]


def corrupt(
    images: Tensor,  # [N, C, H, W] uint8; with stats normalised float
    kind: str,
    severity: int,
    seed: int = 0,
    stats: Stats | None = None,
) -> Tensor:  # like images
    """Corrupt every image of a batch.

    Noise is drawn for the whole batch, so the same images in the same order have the same noise.

    Args:
        images: bytes; or, with ``stats``, what `normalise` made of bytes.
        kind: one of `KINDS`.
        severity: 1 (slight) to 5 (strong).
        seed: of the noise.
        stats: mean and standard deviation of each channel by which ``images`` are normalised.

    Raises:
        TypeError: if ``images`` are neither bytes nor, with ``stats``, floats.
        ValueError: on an unknown kind or severity, or images of another shape.
    """
    if kind not in _HOW:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity: expected 1 to {len(SEVERITIES)}, got {severity!r}")
    if images.ndim != 4:
        raise ValueError(f"images: expected shape [N, C, H, W], got {list(images.shape)}")
    if stats is None:
        if images.dtype != torch.uint8:
            raise TypeError(f"images: expected uint8, or floats with their stats, got {images.dtype}")
        return _corrupt(images, kind, severity, seed)
    if not images.is_floating_point():
        raise TypeError(f"images: expected floats with stats, got {images.dtype}")
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in stats)
    pixels = ((images.float() * std + mean) * 255).round().clamp(0, 255).byte()
    corrupted = _corrupt(pixels, kind, severity, seed)
    return ((corrupted.float() / 255 - mean) / std).to(images.dtype)


def corrupt_test(bundle: DataBundle, kind: str, severity: int, seed: int = 0) -> DataBundle:
    """The same data with corrupted test images; labels and the other splits stay.

    Raises:
        TypeError: if the test images are not held in memory, as those of folders are not.
        ValueError: as `corrupt` does.
    """
    test = bundle.test
    if not isinstance(test, ArrayDataset):
        raise TypeError(f"bundle: expected test images held in memory, got {type(test).__name__} in {bundle.name!r}")
    images = corrupt(test.images, kind, severity, seed)
    return replace(bundle, test=ArrayDataset(images, test.labels, test.stats))


def _corrupt(images: Tensor, kind: str, severity: int, seed: int) -> Tensor:  # [N, C, H, W] uint8
    rng, pixels = np.random.default_rng(seed), images.cpu().numpy()
    out = np.empty_like(pixels)
    count = max(1, _VALUES // max(1, pixels[:1].size))
    for start in range(0, len(pixels), count):
        rows = slice(start, start + count)
        out[rows] = _HOW[kind](pixels[rows].astype(np.int64), severity - 1, rng).clip(0, 255)
    return torch.from_numpy(out).to(images.device)


def _noise(pixels: Pixels, step: int, rng: Generator) -> Pixels:
    """Add a sum of four uniform bytes, which is nearly normal, with standard deviation 148."""
    drawn = rng.integers(0, 256, (4, *pixels.shape), np.uint8).sum(0, dtype=np.int64) - 2 * 255
    return pixels + _scaled(drawn, _NOISE[step] * 255 / (2 * math.sqrt((256**2 - 1) / 12)))


def _blur(pixels: Pixels, step: int, rng: Generator) -> Pixels:
    """Convolve with a Gaussian along rows and columns; beyond its border an image goes on as it ends."""
    deviation = _BLUR[step] * pixels.shape[2] / 32
    reach = math.ceil(3 * deviation)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    fixed = np.rint(weights / weights.sum() * _ONE).astype(np.int64)
    fixed[reach] += _ONE - fixed.sum()  # so that plain areas keep their brightness
    for axis in (2, 3):
        size = pixels.shape[axis]
        padding = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(pixels, padding, mode="edge")
        shifted = (padded.take(range(start, start + size), axis) for start in range(2 * reach + 1))
        pixels = sum(weight * part for weight, part in zip(fixed, shifted, strict=True)) + _ONE // 2 >> 16
    return pixels


def _contrast(pixels: Pixels, step: int, rng: Generator) -> Pixels:
    """Draw every pixel towards the mean of its image and channel."""
    mean = pixels.sum((2, 3), keepdims=True) // (pixels.shape[2] * pixels.shape[3])
    return mean + _scaled(pixels - mean, _CONTRAST[step])


def _scaled(values: Pixels, factor: float) -> Pixels:
    """``values * factor``, rounded."""
    return values * round(factor * _ONE) + _ONE // 2 >> 16


_HOW: dict[str, Callable[[Pixels, int, Generator], Pixels]] = {"noise": _noise, "blur": _blur, "contrast": _contrast}
KINDS = tuple(_HOW)
