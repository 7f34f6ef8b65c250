"""Where gates go when the user names no modules: at the ends of the main blocks (paper, Figure 3), or of every block.

The trunk is the module whose children divide most of the work into the most resolutions. Children of equal resolution
are one main block; a gate goes behind the last child of each but the last, at most three in all. A network of one
resolution, such as a ViT, is cut at the quarters of its cost.

A block is a module of at least two layers behind which one tensor crosses, and which is not for the most part made up
of such modules itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise
from typing import Any

from torch import Tensor, fx

from dgate_rt.cutting import channels_come_last
from dgate_rt.errors import SplitError
from dgate_rt.flops import count_flops
from dgate_rt.tracing import Traced, inside

_MOST_GATES = 3
_NEARLY = 0.8  # as good as the best
_LEAST_STAGE = 0.05  # of the work; where there is less on one side, a gate saves nothing, or sees nothing
_TRUNK_SHARE = 0.5  # of the work; a trunk has at least this much of it


@dataclass(frozen=True)
class _Child:
    """A module that may be the end of a block."""

    path: str
    resolution: tuple[int, ...]  # (H, W) of a map, (T,) of tokens, () of a vector
    weights: int  # layers with a weight matrix
    cost: int  # FLOPs up to its end
    single: bool  # whether its output alone crosses


def propose(traced: Traced, batch: Tensor) -> list[str]:
    """Names of the modules to cut after, in program order.

    Raises:
        SplitError: if there is no place that a single tensor crosses.
    """
    profile = _Profile(traced, batch)
    best: tuple[tuple[int, int], list[str]] = ((-1, 0), [])
    for path, _ in traced.model.named_modules():
        if profile.share(path) < _TRUNK_SHARE:
            continue
        children = profile.children(path)
        ends = _block_ends(children)
        candidates = [child for child in children if child.single and profile.worth(child)]
        score = (len(ends), len(candidates))
        if (ends or candidates) and score >= best[0]:  # of equals the innermost
            chosen = _spread(ends, profile.total) if ends else _quarters(candidates, profile, path)
            best = (score, [child.path for child in chosen])
    if not best[1]:
        raise SplitError("at: 'auto' found no place with work on both sides that one tensor crosses; name the modules")
    return best[1]


def every_block(traced: Traced, batch: Tensor) -> list[str]:
    """Names of all blocks but the last, in program order.

    Raises:
        SplitError: if there are not two.
    """
    blocks = _blocks(_Profile(traced, batch), "")
    if len(blocks) < 2:
        raise SplitError(
            "at: 'blocks' found no blocks of several layers with one tensor between them; name the modules"
        )
    return [block.path for block in blocks[:-1]]


def _blocks(profile: _Profile, path: str) -> list[_Child]:
    found = []
    for child in profile.children(path):
        parts = [part for part in profile.children(child.path) if part.weights >= 2]
        divided = sum(profile.share(part.path) for part in parts) >= _TRUNK_SHARE * profile.share(child.path)
        nested = _blocks(profile, child.path) if parts and divided else []
        found += [child] if len(nested) < 2 and child.single and child.weights >= 2 else nested
    return found


def _block_ends(children: Sequence[_Child]) -> list[_Child]:
    """The last single-tensor child of each main block but the last; a stem of one layer is no main block."""
    maps = any(len(child.resolution) for child in children)
    blocks = []
    for resolution, group in groupby(children, key=lambda child: child.resolution):
        members = list(group)
        if sum(child.weights for child in members) >= 2 and (resolution or not maps):
            blocks.append([child for child in members if child.single])
    return [members[-1] for members in blocks[:-1] if members]


def _spread(ends: Sequence[_Child], total: int) -> list[_Child]:
    """At most three of them: of those choices whose least stage is nearly as large as can be, the deepest."""

    def least_stage(chosen: Sequence[_Child]) -> int:
        bounds = [0, *(child.cost for child in chosen), total]
        return min(after - before for before, after in pairwise(bounds))

    choices = [list(chosen) for chosen in combinations(ends, min(_MOST_GATES, len(ends)))]
    enough = _NEARLY * max(map(least_stage, choices))
    return max((c for c in choices if least_stage(c) >= enough), key=lambda c: [child.cost for child in c])


def _quarters(candidates: Sequence[_Child], profile: _Profile, path: str) -> list[_Child]:
    start, end = profile.span(path)
    chosen: list[_Child] = []
    for quarter in (1, 2, 3):
        target = start + (end - start) * quarter / 4
        nearest = min(reversed(candidates), key=lambda child: abs(child.cost - target))
        if nearest not in chosen:
            chosen.append(nearest)
    return chosen


class _Profile(fx.Interpreter):
    """One run of the whole graph: output shapes, and FLOPs up to each node."""

    def __init__(self, traced: Traced, batch: Tensor) -> None:
        super().__init__(traced.model, graph=traced.graph)
        self.traced = traced
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}  # of tensors, and of the first of several
        self.flops: dict[fx.Node, int] = {}  # of the node itself
        with count_flops() as self.counter:
            self.run(batch.clone())
        self.total = self.counter.get_total_flops()
        self.work = {n: f for n, f in self.flops.items() if len(self.shapes.get(n, ())) > 2} or self.flops  # no head
        self.live = self._live()

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        self.flops[n] = self.counter.get_total_flops() - before
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if isinstance(first, Tensor) and n in self.traced.dependent:
            self.shapes[n] = tuple(first.shape)
        return value

    def share(self, path: str) -> float:
        """The part of the work on maps and tokens that is done inside a module."""
        done = sum(flops for node, flops in self.work.items() if _within(node, path))
        return done / max(sum(self.work.values()), 1)

    def span(self, path: str) -> tuple[int, int]:
        """FLOPs before the first, and up to the last, node of a module."""
        places = [self.traced.order[node] for node in self.flops if _within(node, path)]
        return self.cost(min(places) - 1), self.cost(max(places))

    def worth(self, child: _Child) -> bool:
        """Whether there is work on both sides of a cut after ``child``."""
        return _LEAST_STAGE * self.total < child.cost < (1 - _LEAST_STAGE) * self.total

    def cost(self, last: int) -> int:
        return sum(flops for node, flops in self.flops.items() if self.traced.order[node] <= last)

    def children(self, path: str) -> list[_Child]:
        """The submodules of a container that were called and returned a tensor, in program order."""
        found = []
        for name, module in self.traced.model.get_submodule(path).named_children():
            child = f"{path}.{name}" if path else name
            returned = self.traced.returned.get(child)
            if returned is None or returned.node not in self.shapes:
                continue
            shape = self.shapes[returned.node]
            resolution = shape[1:-1] if len(shape) != 4 or channels_come_last(module, shape) else shape[2:]
            weights = sum(parameter.ndim >= 2 for parameter in module.parameters())
            single = self.live[returned.last] == {returned.node}
            found.append((returned.last, _Child(child, resolution, weights, self.cost(returned.last), single)))
        return [child for _, child in sorted(found, key=lambda item: item[0])]

    def _live(self) -> dict[int, set[fx.Node]]:
        """The tensors that cross behind each place where a module returned."""
        order = self.traced.order
        last_use = {node: max((order[user] for user in node.users), default=0) for node in self.shapes}
        ends = {returned.last for returned in self.traced.returned.values()}
        return {end: {node for node, last in last_use.items() if order[node] <= end < last} for end in ends}


def _within(node: fx.Node, path: str) -> bool:
    where = node.meta.get("path", "")
    return where == path or inside(where, path)
