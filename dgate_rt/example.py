"""Batches to try a model on: made from the user's example, or guessed from the model's first layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

_IMAGE_SIZES = ((64, 64), (224, 224), (32, 32))  # small first: a check need not cost what ImageNet costs
_SIZE_HINTS = ("image_size", "img_size")


def distinct_rows(
    example: Tensor,  # [N, ...]
    count: int,
) -> Tensor:  # [count, ...]
    """A batch of samples like ``example``'s, no two alike even where the example is all zeros.

    Floats get noise of the example's own spread, stronger from row to row; whole numbers are shuffled within the
    example. The generator is private: the caller's random state stays as it is.
    """
    generator = torch.Generator().manual_seed(0)
    rows = example.detach()[torch.arange(count) % len(example)].clone()
    for index, row in enumerate(rows):
        if row.is_floating_point():
            noise = torch.randn(row.shape, generator=generator).to(row)
            spread = row.std(correction=0)
            row += noise * (spread if spread > 0 else torch.ones_like(spread)) * (index + 1) / count
        else:
            shuffled = torch.randperm(row.numel(), generator=generator).to(row.device)
            row.copy_(row.flatten()[shuffled].view(row.shape))
    return rows


def guesses(model: nn.Module) -> Iterator[Tensor]:  # each [1, ...]
    """Zeros of the shapes that a model probably takes, likeliest first; none if its first layer tells nothing."""
    layers = (module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)))
    layer = next(layers, None)
    if isinstance(layer, nn.Linear):
        yield layer.weight.new_zeros((1, layer.in_features))
    elif isinstance(layer, nn.Conv2d):
        hints = [getattr(module, name, None) for module in model.modules() for name in _SIZE_HINTS]
        sizes = [size if isinstance(size, (tuple, list)) else (size, size) for size in hints if size]
        for height, width in dict.fromkeys([*map(tuple, sizes), *_IMAGE_SIZES]):
            yield layer.weight.new_zeros((1, layer.in_channels, height, width))
