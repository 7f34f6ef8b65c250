"""Cluttered MNIST: every image shows one whole digit, among pieces of others.

After Mnih et al. 2014, with a difficulty that varies from sample to sample: at 0 the digit is nearly clean, at 1 it is
turned, sheared, faint, half hidden, and lies among pieces of other digits under noise. All pixel arithmetic is in
integers, so a seed gives the same bits on every machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

SIDE = 32
"""Height and width of a rendered image."""

_DIGIT_SIDE = 28
_MAX_PIECES = 6
_PIECE_SIDE = 9
_MAX_DEGREES = 35
_MAX_HIDDEN = 9
_MAX_FADE = 0.4
_MAX_NOISE = 0.35
_ONE = 1 << 16  # fixed point
_CHUNK = 1024

_COS, _SIN = (
    np.array([round(_ONE * f(math.radians(degrees))) for degrees in range(-_MAX_DEGREES, _MAX_DEGREES + 1)], np.int64)
    for f in (math.cos, math.sin)
)


@dataclass(frozen=True)
class Rendering:
    """Rendered images and what they were made from."""

    images: NDArray[np.uint8]  # [N, 32, 32]
    labels: NDArray[np.int64]  # [N]
    sources: NDArray[np.int64]  # [N]; row of the digit that the image shows
    difficulty: NDArray[np.float32]  # [N], in [0, 1)


def render(
    digits: NDArray[np.uint8],  # [M, 28, 28]
    labels: NDArray[np.int64],  # [M]
    renderings: int,
    seed: int | list[int],
) -> Rendering:
    """Render every digit ``renderings`` times, each time with a difficulty of its own, clutter taken from the others.

    Raises:
        ValueError: if ``digits`` is empty or not ``[M, 28, 28]`` uint8, ``labels`` does not fit, or ``renderings < 1``.
    """
    if digits.dtype != np.uint8 or digits.shape != (len(digits), _DIGIT_SIDE, _DIGIT_SIDE) or not len(digits):
        raise ValueError(f"digits: expected uint8 [M >= 1, 28, 28], got {digits.dtype} {digits.shape}")
    if labels.shape != (len(digits),):
        raise ValueError(f"labels: expected shape ({len(digits)},), one a digit, got {labels.shape}")
    if renderings < 1:
        raise ValueError(f"renderings: expected at least 1, got {renderings}")
    rng = np.random.default_rng(seed)
    sources = np.tile(np.arange(len(digits)), renderings)
    difficulty = rng.random(len(sources)) ** 2  # easy samples are common, hard ones rare
    images = np.empty((len(sources), SIDE, SIDE), np.uint8)
    for start in range(0, len(sources), _CHUNK):
        rows = slice(start, start + _CHUNK)
        images[rows] = _render_chunk(rng, digits, sources[rows], difficulty[rows])
    return Rendering(images, labels[sources].astype(np.int64), sources, difficulty.astype(np.float32))


def _render_chunk(
    rng: Generator,
    digits: NDArray[np.uint8],
    sources: NDArray[np.int64],  # [N]
    difficulty: NDArray[np.float64],  # [N]
) -> NDArray[np.uint8]:  # [N, 32, 32]
    canvas = _affine(rng, digits[sources], difficulty)
    _fade(rng, canvas, difficulty)
    _add_pieces(rng, canvas, digits, sources, difficulty)
    _occlude(rng, canvas, difficulty)
    noise = rng.integers(0, 256, (2, *canvas.shape), np.uint8).astype(np.int64).sum(0) - 255  # triangular, sd 104
    canvas += noise * _fixed(_MAX_NOISE * difficulty)[:, None, None] >> 16
    return canvas.clip(0, 255).astype(np.uint8)


def _fixed(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(values * _ONE).astype(np.int64)


def _spread(rng: Generator, reach: NDArray[np.float64]) -> NDArray[np.float64]:
    """Uniform in ``[-reach, reach)``."""
    return (2 * rng.random(len(reach)) - 1) * reach


def _affine(rng: Generator, digits: NDArray[np.uint8], difficulty: NDArray[np.float64]) -> NDArray[np.int64]:
    """Turn, shear, scale and shift each digit onto a canvas; bilinear, in 16-bit fixed point."""
    n = len(digits)
    angle = np.rint(_spread(rng, 8 + (_MAX_DEGREES - 8) * difficulty)).astype(np.int64) + _MAX_DEGREES
    zoom = _fixed(1 + _spread(rng, 0.05 + 0.25 * difficulty))
    shear = _fixed(_spread(rng, 0.3 * difficulty))
    shift_y, shift_x = (_fixed(_spread(rng, 1 + 4 * difficulty)) for _ in range(2))
    cos, sin = _COS[angle] * zoom >> 16, _SIN[angle] * zoom >> 16
    inverse = ((cos, (cos * shear >> 16) - sin), (sin, (sin * shear >> 16) + cos))  # canvas -> digit

    centre = (np.arange(SIDE, dtype=np.int64) * 2 - (SIDE - 1)) * _ONE // 2
    y = centre[None, :, None] - shift_y[:, None, None]
    x = centre[None, None, :] - shift_x[:, None, None]
    padded = np.zeros((n, _DIGIT_SIDE + 3, _DIGIT_SIDE + 3), np.int64)
    padded[:, 1 : _DIGIT_SIDE + 1, 1 : _DIGIT_SIDE + 1] = digits
    corner, weight = [], []
    for to_y, to_x in inverse:
        at = (y * to_y[:, None, None] >> 16) + (x * to_x[:, None, None] >> 16) + (_DIGIT_SIDE + 1) * _ONE // 2
        at = at.clip(0, (_DIGIT_SIDE + 1) * _ONE)
        corner.append(at >> 16)
        weight.append((at & (_ONE - 1)) >> 8)
    flat = padded.reshape(-1)
    pitch = padded.shape[2]
    base = np.arange(n)[:, None, None] * padded[0].size + corner[0] * pitch + corner[1]
    top = flat[base] * (256 - weight[1]) + flat[base + 1] * weight[1]
    bottom = flat[base + pitch] * (256 - weight[1]) + flat[base + pitch + 1] * weight[1]
    return top * (256 - weight[0]) + bottom * weight[0] >> 16


def _fade(rng: Generator, canvas: NDArray[np.int64], difficulty: NDArray[np.float64]) -> None:
    """Lower the contrast of the digit, by at most 40 %."""
    canvas *= _fixed(1 - _MAX_FADE * difficulty * rng.random(len(canvas)))[:, None, None]
    canvas >>= 16


def _add_pieces(
    rng: Generator,
    canvas: NDArray[np.int64],
    digits: NDArray[np.uint8],
    sources: NDArray[np.int64],
    difficulty: NDArray[np.float64],
) -> None:
    """Lay square pieces of other digits over the canvas, brighter pixel wins: none at difficulty 0, up to 6 at 1."""
    n, inside = len(canvas), np.arange(_PIECE_SIDE)
    pieces = np.floor(_MAX_PIECES * difficulty + rng.random(n))
    for index in range(_MAX_PIECES):
        other = (sources + rng.integers(1, max(2, len(digits)), n)) % len(digits)
        cut_y, cut_x = rng.integers(3, _DIGIT_SIDE - _PIECE_SIDE - 2, (2, n))
        strength = _fixed(0.4 + 0.5 * rng.random(n))
        put_y, put_x = rng.integers(0, SIDE - _PIECE_SIDE + 1, (2, n))
        rows = np.flatnonzero(pieces > index)
        piece = digits[
            other[rows, None, None],
            cut_y[rows, None, None] + inside[:, None],
            cut_x[rows, None, None] + inside,
        ]
        piece = piece * strength[rows, None, None] >> 16
        place = (rows[:, None, None], put_y[rows, None, None] + inside[:, None], put_x[rows, None, None] + inside)
        canvas[place] = np.maximum(canvas[place], piece)


def _occlude(rng: Generator, canvas: NDArray[np.int64], difficulty: NDArray[np.float64]) -> None:
    """Hide a rectangle near the middle behind one grey level; its sides grow with difficulty, up to 9 pixels."""
    n, along = len(canvas), np.arange(SIDE)
    covers = []
    for _ in range(2):
        length = np.rint(difficulty * rng.integers(3, _MAX_HIDDEN + 1, n)).astype(np.int64)
        start = rng.integers(5, SIDE - 5, n) - length // 2
        covers.append((along >= start[:, None]) & (along < (start + length)[:, None]))
    grey = rng.integers(0, 160, n)
    hidden = covers[0][:, :, None] & covers[1][:, None, :]
    np.copyto(canvas, grey[:, None, None], where=hidden)
