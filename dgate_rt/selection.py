"""Which few of many gates to keep: chosen one by one from what all of them said about validation samples.

A gate costs the samples that pass it, and gates that follow one another closely answer the same samples. So where there
is one after every block most are not worth keeping. Forward selection adds, time and again, the gate that makes the
best operating point of those kept so far better by most, and ends where none does. Nothing runs again: the scores of
some gates are part of those of all, and costs add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from dgate_rt.cost import Costs
from dgate_rt.errors import UnreachableTargetError
from dgate_rt.frontier import search_frontier
from dgate_rt.progress import track
from dgate_rt.trace import Trace

Subset = tuple[int, ...]
"""Some of all gates, by ascending index."""
Worth = tuple[float, ...]
"""How good a subset is; the larger the better, by the first number in which two differ."""


def forward_selection(count: int, worth: Callable[[Subset], Worth]) -> Iterator[tuple[int, Subset]]:
    """Each gate in turn that adds most to the gates so far, and those with it, until none adds anything.

    Args:
        count: of gates to choose from.
        worth: of some of them; asked for none, and then, at each step, for every choice of one gate more. Of equals
            the first gate is taken.
    """
    subset = Subset()
    reached = worth(subset)
    while len(subset) < count:
        tried = {gate: worth(tuple(sorted((*subset, gate)))) for gate in range(count) if gate not in subset}
        best = max(tried, key=lambda gate: tried[gate])
        if tried[best] <= reached:
            return
        subset, reached = tuple(sorted((*subset, best))), tried[best]
        yield best, subset


def select_gates(
    trace: Trace,
    costs: Costs,
    most: int,
    *,
    min_accuracy: float | None = None,
    max_cost: float | None = None,
    progress: bool = False,
) -> Subset:
    """At most ``most`` of the gates, chosen one by one for one target on the samples of ``trace``.

    Args:
        trace: of all gates.
        costs: of all stages and gates.
        most: at least 1.
        min_accuracy: the gates are to make this accuracy cheap.
        max_cost: the gates are to be accurate within this cost; in place of ``min_accuracy``.
        progress: show a bar.
    """
    assert (min_accuracy is None) != (max_cost is None)

    def worth(subset: Subset) -> Worth:
        part, prices = trace.keeping(subset), costs.keeping(subset)
        frontier = search_frontier(part, prices, min_accuracy=min_accuracy, max_cost=max_cost)
        try:
            if max_cost is not None:
                point = frontier.most_accurate(max_cost)
                return 1.0, point.accuracy, -_rounded(point.cost)
            assert min_accuracy is not None
            return 1.0, -_rounded(frontier.cheapest(min_accuracy).cost)
        except UnreachableTargetError:  # by these few; the nearer, the better
            return 0.0, frontier.points[-1].accuracy if max_cost is None else -_rounded(frontier.points[0].cost)

    steps = track(forward_selection(len(costs.gates), worth), "gates chosen one by one", most, progress)
    chosen = [subset for _, subset in islice(steps, most)]
    return chosen[-1] if chosen else ()


def _rounded(cost: float) -> float:
    """Without the float noise by which sums of the same times differ: a gate that is off must not win by it."""
    return float(f"{cost:.9g}")
