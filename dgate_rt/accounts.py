"""What a gate takes and what it saves, in milliseconds of a sample that comes in; and which gates do not pay.

A gate is run on everyone who reaches it, and spares those who leave there the stages behind it, up to the next gate
that is on, and that gate: whoever is sure at one gate is taken to be sure at the next. For gate g, the next being h::

    costs(g) = reach(g) * score(g),    saves(g) = leaves(g) * (stage(g + 1) + ... + stage(h) + score(h))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Account:
    """One gate that is on."""

    gate: int
    reached: float  # share of the samples that come to it
    left: float  # share that leaves there
    costs_ms: float  # of a sample that comes in
    saves_ms: float

    @property
    def pays(self) -> bool:
        return self.saves_ms >= self.costs_ms


def accounts(
    shares: Sequence[float],  # [G + 1]; of the samples that leave at each exit, with these gates on
    active: Sequence[bool],  # [G]
    stages_ms: Sequence[float],  # [G + 1]; of a sample that runs there
    gates_ms: Sequence[float],  # [G]
) -> list[Account]:
    """The account of every gate that is on."""
    found = []
    on = [*(g for g, is_on in enumerate(active) if is_on), len(active)]
    for g, following in itertools.pairwise(on):
        reached = 1 - sum(shares[:g])
        spared = sum(stages_ms[g + 1 : following + 1]) + sum(gates_ms[following : following + 1])
        found.append(Account(g, reached, shares[g], reached * gates_ms[g], shares[g] * spared))
    return found


def without_losses(
    thresholds: Sequence[float],  # [G]
    shares: Sequence[float],  # [G + 1]
    stages_ms: Sequence[float],  # [G + 1]
    gates_ms: Sequence[float],  # [G]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Thresholds and shares once the gates that lose time are off, the one that loses most first.

    Who left at a gate that goes off is taken to leave at the next that is on.
    """
    kept, left = list(thresholds), list(shares)
    while True:
        losing = [a for a in accounts(left, [t != math.inf for t in kept], stages_ms, gates_ms) if not a.pays]
        if not losing:
            return tuple(kept), tuple(left)
        worst = max(losing, key=lambda account: account.costs_ms - account.saves_ms).gate
        following = next((g for g in range(worst + 1, len(kept)) if kept[g] != math.inf), len(kept))
        left[following] += left[worst]
        left[worst], kept[worst] = 0.0, math.inf
