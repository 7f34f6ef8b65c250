"""Whether samples still leave where validation samples left, and with scores like theirs. No labels are needed.

Two tests an exit, each at ``alpha`` divided by the number of tests (Bonferroni), so that at most a share ``alpha`` of
the reports on samples like the validation samples is a false alarm, however many samples there are:

* whether its share of the samples moved: Fisher's exact test on the 2x2 table (Fisher 1934);
* whether the scores of those that left there moved: ``D``, the largest distance between the two cumulative
  histograms (Kolmogorov-Smirnov), has ``P(D >= d) <= 4 exp(-2 d^2 nm / (sqrt(n) + sqrt(m))^2)``: the inequality of
  Dvoretzky, Kiefer and Wolfowitz with Massart's constant (1990), of each sample for its part of ``d``, the parts in
  such proportion that both are as likely. Bins only make ``D`` smaller.

Both take the samples for independent of each other. Frames of one film are not, nor are many views of one object; and
who asks again and again while samples pile up takes a new chance of a false alarm each time.

Neither sees a gate that is as sure as before and wrong. On blurred images of cluttered MNIST ten points of accuracy
were lost with hardly an alarm, because as many samples left with scores as high (``dgate experiment drift``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dgate_rt.executors.base import Predictions
from dgate_rt.gate import leaves

ALPHA = 0.01
"""Share of reports without drift that may be false alarms, unless told otherwise."""
_BINS = 32
"""Bins of equal mass into which each exit's own scores are divided."""
_GRAIN = 1e-4
"""Edges keep clear of scores that lie on a multiple of this, relative to the largest; see `_edges`."""


@dataclass(frozen=True)
class Reference:
    """How validation samples leave at some thresholds: counts of their scores, by exit.

    A score is in bin ``i`` if ``edges[i - 1] < score <= edges[i]``; NaN has the last bin for itself. All exits share
    the edges: for each exit those between bins of equal mass, together.
    """

    thresholds: tuple[float, ...]  # length G
    edges: Tensor  # [E] float32, ascending; the last is +inf
    counts: Tensor  # [G + 1, E + 1] int64

    @classmethod
    def at(
        cls,
        scores: Tensor,  # [G + 1, N] float32; of every gate, and of the network
        thresholds: Sequence[float],  # [G]
    ) -> Reference:
        """Let samples leave at ``thresholds``, and count."""
        exits = torch.full(scores.shape[1:], len(thresholds))
        for g in reversed(range(len(thresholds))):
            exits[leaves(scores[g], thresholds[g])] = g
        left = scores.gather(0, exits[None])[0]
        edges = torch.cat([_edges(left[exits == e]) for e in range(len(scores))] + [torch.tensor([math.inf])]).unique()
        return cls(tuple(thresholds), edges, _counts(len(scores), edges, exits, left))

    @classmethod
    def unknown(cls, thresholds: Sequence[float]) -> Reference:
        """No validation samples: exits are counted, scores are not told apart, and nothing is judged."""
        empty = torch.zeros((len(thresholds) + 1, 2), dtype=torch.int64)
        return cls(tuple(thresholds), torch.tensor([math.inf]), empty)

    @property
    def samples(self) -> int:
        """How many samples it counts."""
        return int(self.counts.sum())

    def count(
        self,
        exits: Tensor,  # [N] int64
        scores: Tensor,  # [N] float32
    ) -> Tensor:  # [G + 1, E + 1] int64
        """Count samples by exit and by bin of their score, as these are counted."""
        return _counts(len(self.thresholds) + 1, self.edges, exits, scores)

    def judge(self, answers: Predictions, alpha: float = ALPHA) -> DriftReport:
        """`compare` of answers that a runtime gave at these thresholds, on any device."""
        return self.compare(self.count(answers.exits.cpu(), answers.scores.cpu()), alpha)

    def compare(
        self,
        counts: Tensor,  # [G + 1, E + 1] int64
        alpha: float = ALPHA,
    ) -> DriftReport:
        """Test every exit that a sample can leave at.

        Raises:
            ValueError: if ``alpha`` is not in (0, 1), or ``counts`` are of other exits or bins.
        """
        if not 0 < alpha < 1:
            raise ValueError(f"alpha: expected a number between 0 and 1, got {alpha}")
        if counts.shape != self.counts.shape:
            raise ValueError(f"counts: expected shape {list(self.counts.shape)}, got {list(counts.shape)}")
        used = [e for e, threshold in enumerate((*self.thresholds, 0.0)) if threshold != math.inf]
        tests = 2 * len(used)
        now, before = counts.sum(1).tolist(), self.counts.sum(1).tolist()
        n, m = sum(now), sum(before)
        exits = []
        for e in range(len(now)):
            shift, score_p = _shift(counts[e], self.counts[e])
            share_p = _fisher(now[e], n, before[e], m)
            judged = m > 0 and e in used
            exits.append(
                ExitDrift(
                    exit=e,
                    samples=now[e],
                    share=now[e] / max(n, 1),
                    expected_share=before[e] / max(m, 1),
                    share_p=share_p,
                    share_moved=judged and share_p <= alpha / tests,
                    score_shift=shift,
                    score_p=score_p,
                    scores_moved=judged and score_p <= alpha / tests,
                )
            )
        return DriftReport(n, m, alpha, tests, tuple(exits))


@dataclass(frozen=True)
class ExitDrift:
    """One exit beside the validation samples. A p-value is the chance of so large a difference if nothing drifted."""

    exit: int  # index of a gate, or G for the network's own classifier
    samples: int  # that left here
    share: float  # of all samples
    expected_share: float  # on validation data
    share_p: float
    share_moved: bool  # beyond chance, given the number of tests
    score_shift: float  # in [-1, 1]: the largest difference of the cumulative histograms; above 0, scores are higher
    score_p: float
    scores_moved: bool

    @property
    def moved(self) -> bool:
        """Whether share or scores moved."""
        return self.share_moved or self.scores_moved


@dataclass(frozen=True)
class DriftReport:
    """What moved, by exit; ``str`` is for people, `as_dict` for JSON."""

    samples: int
    reference_samples: int  # validation samples; 0 if the program keeps none, and then nothing is judged
    alpha: float  # chance of an alarm without drift, at most
    tests: int
    exits: tuple[ExitDrift, ...]  # length G + 1

    @property
    def alarm(self) -> bool:
        """Whether any exit moved."""
        return any(e.moved for e in self.exits)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        return {"alarm": self.alarm, **asdict(self), "exits": [asdict(e) for e in self.exits]}

    def __str__(self) -> str:
        if not self.reference_samples:
            shares = " / ".join(f"{e.share:.1%}" for e in self.exits)
            return (
                f"no verdict on {self.samples} samples: the program keeps no validation scores to compare with; "
                f"calibrate again\nleft at each exit: {shares}"
            )
        verdict = "drift" if self.alarm else "no drift seen"
        against = f"{self.samples} samples against {self.reference_samples} of validation"
        lines = [f"{verdict}: {against}; a false alarm in at most {self.alpha:.2g} of such reports"]
        return "\n".join([*lines, *(self._line(e) for e in self.exits)])

    def _line(self, e: ExitDrift) -> str:
        where = f"gate {e.exit}" if e.exit + 1 < len(self.exits) else f"exit {e.exit}, the network's own classifier"
        share = f"{e.share:.1%} left here, {e.expected_share:.1%} expected (p = {e.share_p:.2g})"
        scores = (
            f"scores {'higher' if e.score_shift > 0 else 'lower'} by {abs(e.score_shift):.2f} (p = {e.score_p:.2g})"
        )
        moved = [name for name, it in (("share", e.share_moved), ("scores", e.scores_moved)) if it]
        return f"{where}: {share}; {scores}{'; moved: ' + ' and '.join(moved) if moved else ''}"


@torch.inference_mode()
def count_into(
    counts: Tensor,  # [(G + 1) * (E + 1)] int64; added to
    edges: Tensor,  # [E] float32
    exits: Tensor,  # [N] int64
    scores: Tensor,  # [N] float32
) -> None:
    """Add samples to the counts of their exit and bin, all on one device. The host reads nothing."""
    cells = torch.add(torch.bucketize(scores, edges), exits, alpha=len(edges) + 1)
    counts.scatter_add_(0, cells, torch.ones_like(cells))


def _counts(exit_count: int, edges: Tensor, exits: Tensor, scores: Tensor) -> Tensor:  # [G + 1, E + 1] int64
    counts = torch.zeros(exit_count * (len(edges) + 1), dtype=torch.int64)
    count_into(counts, edges, exits, scores)
    return counts.view(exit_count, -1)


def _edges(scores: Tensor) -> Tensor:  # [N] float32 -> [E] float32
    """Edges between bins of equal mass.

    They lie halfway between multiples of a grain. Where a criterion saturates, as softmax does at 1, many samples have
    scores that differ by float error only; no edge may divide those.
    """
    finite = scores[scores.isfinite()].double()
    if not len(finite):
        return scores[:0]
    grain = max(float(finite.abs().max()) * _GRAIN, 1e-30)
    ordered = finite.sort().values
    chosen = ordered[torch.arange(1, _BINS) * len(ordered) // _BINS]
    return (((chosen / grain).floor() + 0.5) * grain).float().unique()


def _fisher(a: int, n: int, b: int, m: int) -> float:
    """Fisher's exact test of ``a`` of ``n`` against ``b`` of ``m``; ``a + b`` is given, and rarer tables count in."""
    k = torch.arange(max(0, a + b - n), min(a + b, m) + 1, dtype=torch.float64)  # what b could be

    def inverse_factorial(count: Tensor) -> Tensor:
        return -torch.lgamma(count + 1)

    likely = inverse_factorial(k) + inverse_factorial(m - k)
    likely += inverse_factorial(a + b - k) + inverse_factorial(n - a - b + k)
    likely -= likely.max().clone()
    observed = likely[b - int(k[0])]
    return float(likely[likely <= observed + 1e-7].exp().sum() / likely.exp().sum())


def _shift(now: Tensor, before: Tensor) -> tuple[float, float]:  # [E + 1] int64 each
    """The signed distance of two cumulative histograms where it is largest, and its p-value."""
    n, m = int(now.sum()), int(before.sum())
    if not n or not m:
        return 0.0, 1.0
    gaps = before.cumsum(0).double() / m - now.cumsum(0).double() / n
    shift = float(gaps[gaps.abs().argmax()])
    return shift, min(1.0, 4 * math.exp(-2 * shift**2 * n * m / (math.sqrt(n) + math.sqrt(m)) ** 2))
