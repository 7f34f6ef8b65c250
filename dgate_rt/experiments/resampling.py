"""Data drawn anew, for the spread over seeds. What was made of one source stays together.

Fitting a gate is convex and ends at one optimum, so the seed of its mini-batches hardly matters; which samples there
were does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
_BOOTSTRAP, _SPLIT = 0, 1  # streams of random numbers


def bootstrap(
    sources: Rows,  # [N]; the number of what each sample was made of
    seed: int,
) -> Rows:  # [M], sorted; a sample may come several times
    """As many sources as there are, drawn with replacement, each with all its samples."""
    groups = _groups(sources)
    drawn = np.random.default_rng([seed, _BOOTSTRAP]).integers(0, len(groups), len(groups))
    return np.sort(np.concatenate([groups[index] for index in drawn]))


def split_anew(
    first: Rows,  # [N]; the sources of the samples of one split
    second: Rows,  # [M]; those of the other, which are none of these
    seed: int,
) -> tuple[Rows, Rows]:  # [N], [M]; rows of the first split with the second behind it
    """Two new splits of the old sizes."""
    groups = [*_groups(first), *(rows + len(first) for rows in _groups(second))]
    order = np.random.default_rng([seed, _SPLIT]).permutation(len(groups))
    mixed = np.concatenate([groups[index] for index in order])
    return np.sort(mixed[: len(first)]), np.sort(mixed[len(first) :])


def _groups(sources: Rows) -> list[Rows]:
    """The rows of each source, by its number."""
    order = np.argsort(sources, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(sources[order])) + 1)
