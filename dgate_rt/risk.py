"""Thresholds with a guarantee: on new data the accuracy drop is at most a bound, with a given confidence.

The validation samples are cut in two at random. The first half proposes operating points and an order to test them in,
safest first (by what it sees itself). The second half, which has had no say in that, tests one after another the
hypothesis that the drop is above the bound, each at level ``1 - confidence``, and stops at the first that it cannot
reject; the cheapest point before that is the answer. Testing in an order fixed beforehand needs no correction for the
number of tests: a point that breaks the bound is accepted only if the first such point in the order is, and the test
of that one errs with probability ``1 - confidence`` at most. This is fixed-sequence testing, as in "Learn then Test"
(Angelopoulos, Bates, Candès, Jordan, Lei; arXiv:2110.01052). The point with all gates off loses nothing, and needs no
test.

A sample is *broken* where the network is right and the gated network wrong, and *fixed* where it is the other way
round; the drop is ``P(broken) - P(fixed)``. Two tests are exact for every number of samples; the first half also says
which of them is used at a point:

* `broken_p_value` takes the drop for ``P(broken)``, and so gives away what is fixed; best where few samples leave;
* `paired_p_value` sees both. How many samples change at all is a nuisance, bounded as in Berger and Boos, "P values
  maximized over a confidence set for the nuisance parameter", J. Am. Stat. Assoc. 89 (1994).

All of it holds for samples that are independent draws from the distribution that new data comes from. Several
renderings or crops of one object are not independent, and then the guarantee is weaker than it says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dgate_rt.cost import Costs
from dgate_rt.frontier import OperatingPoint, Thresholds, operating_point, search_frontier
from dgate_rt.trace import Trace

_NUISANCE_SHARE = 0.1
"""The share of the allowed error that goes to the bound on how many samples change."""


@dataclass(frozen=True)
class Guarantee:
    """What holds of a program's thresholds on new data from the distribution of its validation data."""

    max_accuracy_drop: float
    confidence: float
    samples: int  # that tested it

    def __str__(self) -> str:
        return (
            f"accuracy drop at most {100 * self.max_accuracy_drop:g} % with {100 * self.confidence:g} % confidence "
            f"(n = {self.samples})"
        )


def certify(
    trace: Trace, costs: Costs, max_accuracy_drop: float, confidence: float
) -> tuple[OperatingPoint, Guarantee]:
    """The cheapest point found whose accuracy drop on new data is at most ``max_accuracy_drop``, with this confidence.

    That is the point with all gates off where nothing cheaper can be certified.

    Args:
        trace: margins and predictions on validation data, which `halves` cuts in two; the gates must not have
            been chosen by what the second half says.
        costs: of the stages and gates.
        max_accuracy_drop: accuracy of the whole network less that of the gated one, as a share of all new samples.
        confidence: the probability, over the draw of the validation data, that the drop is no larger.

    Raises:
        ValueError: if ``max_accuracy_drop`` is not in [0, 1), or ``confidence`` not in (0, 1).
    """
    check_bound(max_accuracy_drop, confidence)
    level = 1 - confidence
    first, second = halves(trace)
    chosen, saving = (math.inf,) * len(trace.margins), 0.0
    for proposal in _path(first, costs, max_accuracy_drop, level):
        broken, fixed = _changes(second, proposal.thresholds)
        if proposal.paired:
            p_value = paired_p_value(broken, fixed, len(second.targets), max_accuracy_drop, level)
        else:
            p_value = broken_p_value(broken, len(second.targets), max_accuracy_drop)
        if p_value > level:
            break
        if proposal.saving > saving:
            chosen, saving = proposal.thresholds, proposal.saving
    return operating_point(trace, costs, chosen), Guarantee(max_accuracy_drop, confidence, len(second.targets))


def halves(trace: Trace) -> tuple[Trace, Trace]:
    """The samples that propose operating points, and those that test them: cut in two at random, by a fixed seed."""
    count = len(trace.targets)
    order = np.random.default_rng(0).permutation(count)
    return trace.take(order[: count // 2]), trace.take(order[count // 2 :])


def check_bound(max_accuracy_drop: float, confidence: float) -> None:
    """Refuse what no guarantee can be given for.

    Raises:
        ValueError: if ``max_accuracy_drop`` is not in [0, 1), or ``confidence`` not in (0, 1).
    """
    if not 0 <= max_accuracy_drop < 1:
        raise ValueError(f"max_accuracy_drop: expected a number in [0, 1), got {max_accuracy_drop}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")


def samples_needed(max_accuracy_drop: float, confidence: float) -> float:
    """Fewer validation samples certify nothing but the whole network; infinite for a drop of 0.

    So many suffice if no answer of the gated network is worse than the whole network's.
    """
    if max_accuracy_drop == 0:
        return math.inf
    return 2 * math.ceil(math.log(1 - confidence) / math.log1p(-max_accuracy_drop)) - 1


def broken_p_value(broken: int, count: int, max_drop: float) -> float:
    """The probability of so few broken samples of ``count``, or fewer, if the drop is above ``max_drop``, at most.

    ``P(Bin(count, max_drop) <= broken)``, since samples break at least as often as accuracy drops.
    """
    return min(1.0, float(_binomial(count, max_drop, broken).sum()))


def paired_p_value(broken: int, fixed: int, count: int, max_drop: float, level: float) -> float:
    """As `broken_p_value`, of so small a ``broken - fixed``; for tests at ``level``, of which it uses up a part.

    With a probability of all but a tenth of ``level``, the share of samples that change is at most ``d``, its exact
    (Clopper-Pearson) upper limit. Of all distributions with a larger drop and no more changes, the one with the drop
    ``max_drop`` and ``d`` changes gives small sums the most weight. For a larger drop raises the sum; and the
    derivative of ``P(sum <= s)`` by the share of changes is ``count / 2 * (P(rest = s + 1) - P(rest = s))``, with
    ``rest`` the sum of all samples but one, and not negative left of its mode. Where at most half of the samples
    change, one sample is the difference of two independent 0-1 variables, with chances ``max_drop`` apart: so the sum
    is the difference of two binomial variables, and the mode of ``rest`` is within 1 of its mean (Darroch, Ann. Math.
    Stat. 35, 1964).
    """
    difference, slack = broken - fixed, _NUISANCE_SHARE * level
    if difference > (count - 1) * max_drop - 2 or 2 * (broken + fixed) > count:  # the bound below says nothing
        return 1.0
    changing = _upper_limit(broken + fixed, count, slack)
    if changing < max_drop:
        return slack
    if changing > 0.5:
        return 1.0
    up = (1 + max_drop - math.sqrt(1 + max_drop**2 - 2 * changing)) / 2
    down = up - max_drop
    most = min(count, int(count * down + 10 * math.sqrt(count * down)) + 20)
    minus = _binomial(count, down, most)
    plus = np.append(0.0, _binomial(count, up, min(count, max(0, difference + most))).cumsum())
    at_most = plus[np.clip(difference + np.arange(most + 1) + 1, 0, len(plus) - 1)]
    return min(1.0, float(minus @ at_most + max(0.0, 1 - minus.sum())) + slack)


@dataclass(frozen=True, order=True)
class _Proposal:
    """A point to test; the smaller, the earlier."""

    p_value: float  # on the samples that propose it
    saving: float  # a sample; of equals, the dearest is the safest
    paired: bool  # by which test
    thresholds: Thresholds


def _path(trace: Trace, costs: Costs, max_drop: float, level: float) -> list[_Proposal]:
    """The frontier of these samples, in the order to test it in: from the smallest p-value to the largest."""
    count = len(trace.targets)
    if count == 0:
        return []
    proposals = []
    for point in search_frontier(trace, costs).points:
        broken, fixed = _changes(trace, point.thresholds)
        one, two = broken_p_value(broken, count, max_drop), paired_p_value(broken, fixed, count, max_drop, level)
        proposals.append(_Proposal(min(one, two), costs.dense - point.cost, two < one, point.thresholds))
    return sorted(proposals)


def _changes(trace: Trace, thresholds: Thresholds) -> tuple[int, int]:
    """How many samples break, and how many are fixed."""
    _, correct, _ = trace.gated(thresholds)
    network = trace.correct[-1]
    return int(np.count_nonzero(network & ~correct)), int(np.count_nonzero(correct & ~network))


@lru_cache(maxsize=1024)
def _upper_limit(found: int, count: int, error: float) -> float:
    """The Clopper-Pearson upper limit of a chance: the smallest at which so few or fewer are found in ``error``."""
    low, high = found / count, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _binomial(count, middle, found).sum() > error else (low, middle)
    return high


def _binomial(count: int, chance: float, most: int) -> NDArray[np.float64]:  # [most + 1]
    """``P(Bin(count, chance) = k)`` for ``k = 0 .. most``."""
    k, factorials = np.arange(most + 1), _log_factorials(count)
    chance = max(chance, 1e-300)  # for 0, without its logarithm
    logarithms = k * math.log(chance) + (count - k) * math.log1p(-chance)
    return np.exp(factorials[count] - factorials[k] - factorials[count - k] + logarithms)


@lru_cache(maxsize=4)
def _log_factorials(count: int) -> NDArray[np.float64]:  # [count + 1]
    return np.append(0.0, np.log(np.arange(1, count + 1)).cumsum())
