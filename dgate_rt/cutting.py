"""How a traced graph is cut into stages: what crosses each cut, and what is computed again behind it.

Tensors cross; the first of a boundary is what the named module returned. Values that do not depend on the input are
repeated in the stage that uses them. A size that crosses is either constant, and becomes a literal, or a multiple of
the batch size, and is then read anew from the boundary, because a batch shrinks between stages.
"""

from __future__ import annotations

import difflib
import operator
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from dgate_rt.errors import SplitError
from dgate_rt.tracing import Traced, describe, is_element, is_shape_node, record

_CONSTANTS = (int, float, str, torch.dtype, type(None))


@dataclass(frozen=True)
class Cut:
    """A place in the graph: behind the last node executed in a named module."""

    name: str
    output: fx.Node
    """What the module returned; the first tensor that crosses."""
    last: int


@dataclass(frozen=True)
class Plan:
    """Which stage computes a node, and which nodes cross each cut."""

    traced: Traced
    cuts: Sequence[Cut]
    stage: dict[fx.Node, int]
    crossing: Sequence[Sequence[fx.Node]]

    def candidates(self) -> dict[fx.Node, Cut]:
        """Every node that crosses, with the first cut that it crosses."""
        found: dict[fx.Node, Cut] = {}
        for cut, nodes in zip(self.cuts, self.crossing, strict=True):
            for node in nodes:
                found.setdefault(node, cut)
        return found


def check_names(model: nn.Module, at: Sequence[str]) -> list[str]:
    """The canonical path of each named module (a shared module has several names).

    Raises:
        SplitError: if a name is unknown or comes twice.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    canonical = {id(module): path for path, module in model.named_modules()}
    for name in at:
        if not name or name not in modules:
            near = difflib.get_close_matches(name, [path for path in modules if path], n=5, cutoff=0.5)
            near = near or [path for path, _ in model.named_children()]
            raise SplitError(f"at: {type(model).__name__} has no module {name!r}; near names: {', '.join(near)}")
    twice = next((name for index, name in enumerate(at) if name in at[:index]), None)
    if twice is not None:
        raise SplitError(f"at: {twice!r} is named twice")
    return [canonical[id(modules[name])] for name in at]


def locate(traced: Traced, at: Sequence[str], paths: Sequence[str]) -> list[Cut]:
    """Find each named module in the graph.

    Raises:
        SplitError: if a module is never executed, or has nothing behind it, or the order is not the program's.
    """
    cuts = []
    for name, path in zip(at, paths, strict=True):
        returned = traced.returned.get(path)
        if returned is None:
            raise SplitError(f"at: {name!r} is never executed when {type(traced.model).__name__} runs in eval mode")
        if returned.node is None or returned.node not in traced.dependent:
            raise SplitError(f"at: {name!r} returns no tensor that depends on the input")
        cuts.append(Cut(name, returned.node, returned.last))
    in_order = sorted(cuts, key=lambda cut: cut.last)
    if in_order != cuts:
        raise SplitError(f"at: expected the order in which they run, {[cut.name for cut in in_order]}, got {list(at)}")
    for before, after in pairwise(cuts):
        if before.last == after.last:
            raise SplitError(f"at: {before.name!r} and {after.name!r} end at the same place; leave one out")
    result = _result(traced)
    if not any(traced.order[node] > cuts[-1].last for node in _needed_by(result) & traced.dependent):
        raise SplitError(f"at: nothing runs behind {cuts[-1].name!r}; the network's own classifier is the last exit")
    return cuts


def plan(traced: Traced, cuts: Sequence[Cut]) -> Plan:
    """Give each node its stage, and find what crosses."""
    lasts = [cut.last for cut in cuts]
    stage: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        if node in traced.dependent:
            stage[node] = bisect_left(lasts, traced.order[node])
            if is_element(node):
                stage[node] = stage[node.all_input_nodes[0]]  # tensors cross, tuples do not
    last_use = {node: max((stage[user] for user in node.users), default=stage[node]) for node in stage}
    for index, cut in enumerate(cuts):
        last_use[cut.output] = max(last_use[cut.output], index)
    crossing = []
    for index, cut in enumerate(cuts):
        others = [node for node in stage if stage[node] <= index < last_use[node] and node is not cut.output]
        crossing.append([cut.output, *others])
    return Plan(traced, cuts, stage, crossing)


def build(
    plan: Plan,
    batches: Sequence[Tensor],  # of different sizes; none where the model could not be run
    more: Callable[[], Sequence[Tensor]] = tuple,  # batches of other sample shapes, where the shape is a guess
) -> tuple[list[fx.GraphModule], list[bool]]:
    """One module a stage, over the model's own submodules, parameters and buffers; and where channels come last.

    Raises:
        SplitError: if something crosses that is neither a batch-first tensor nor a size that can be computed again.
    """
    candidates = plan.candidates()
    for node, cut in candidates.items():
        if not batches and is_shape_node(node):
            raise SplitError(f"at: the value of {describe(node)} crosses the cut {cut.name!r}; give an example=")
    values = record(plan.traced, candidates, batches)
    sizes = {node for node in candidates if batches and not isinstance(values[node][0], Tensor)}
    for node in sizes.intersection(cut.output for cut in plan.cuts):
        kind = type(values[node][0]).__name__
        raise SplitError(f"at: expected {candidates[node].name!r} to return a tensor, got {kind} from {describe(node)}")
    for node, cut in candidates.items():
        if batches and node not in sizes:
            _check_batch_first(node, cut, values[node], batches)
    if sizes:
        batches = (*batches, *more())
        values.update(record(plan.traced, sizes, batches))
    lengths = [len(batch) for batch in batches]
    rules = {node: _Again(node, candidates[node], values[node], lengths) for node in sizes}
    aliases = {node: _identity(values[node][0]) if batches else node for node in candidates if node not in sizes}
    stages = _stages(plan, rules, aliases)
    if not batches:
        return stages, [False] * len(plan.cuts)
    named = [plan.traced.model.get_submodule(cut.name) for cut in plan.cuts]
    shapes = [values[cut.output][0].shape for cut in plan.cuts]
    return stages, [channels_come_last(module, shape) for module, shape in zip(named, shapes, strict=True)]


def _stages(plan: Plan, rules: dict[fx.Node, _Again], aliases: dict[fx.Node, Any]) -> list[fx.GraphModule]:
    boundaries = []  # the nodes that cross each cut, one for each tensor
    for nodes in plan.crossing:
        distinct: dict[Any, fx.Node] = {}
        for node in nodes:
            if node not in rules:
                distinct.setdefault(aliases[node], node)
        boundaries.append(list(distinct.values()))
    entries = [[node for node in plan.stage if node.op == "placeholder"], *boundaries]
    exits = [*boundaries, [_result(plan.traced)]]
    model = plan.traced.model
    stages = []
    for index, (entry, leaving) in enumerate(zip(entries, exits, strict=True)):
        graph = _stage_graph(plan, index, entry, leaving, rules, aliases)
        module = fx.GraphModule(model, graph, class_name=f"Stage{index}")
        for container in module.modules():
            if type(container) is nn.Module:  # made by fx to hold the others
                container.training = model.training
        stages.append(module)
    return stages


def _stage_graph(
    plan: Plan,
    index: int,
    entry: Sequence[fx.Node],
    leaving: Sequence[fx.Node],
    rules: dict[fx.Node, _Again],
    aliases: dict[fx.Node, Any],
) -> fx.Graph:
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {node: graph.placeholder(node.name) for node in entry}
    head = env[entry[0]]
    if index:
        by_alias = {aliases[node]: env[node] for node in entry}
        env.update({node: by_alias[aliases[node]] for node in plan.crossing[index - 1] if node not in rules})

    def use(node: fx.Node) -> Any:
        if node not in env:
            env[node] = rules[node].express(graph, head) if node in rules else graph.node_copy(node, use)
        return env[node]

    for node, stage in plan.stage.items():
        if stage == index and node.op not in ("placeholder", "output"):
            env[node] = graph.node_copy(node, use)
    results = tuple(use(node) for node in leaving)
    graph.output(results if len(results) > 1 else results[0])
    return graph


@dataclass(frozen=True)
class _Again:
    """A size that crosses a cut, known by the values that it took on batches of several lengths."""

    node: fx.Node
    cut: Cut
    values: Sequence[Any]
    lengths: Sequence[int]

    def express(self, graph: fx.Graph, head: fx.Node) -> Any:
        """The expression for it behind the cut; ``head`` is the first tensor of the boundary."""
        return self._express(graph, head, self.values)

    def _express(self, graph: fx.Graph, head: fx.Node, values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, torch.device):
            return graph.call_function(getattr, (head, "device"))
        if isinstance(first, (tuple, list)) and all(len(value) == len(first) for value in values):
            return tuple(self._express(graph, head, column) for column in zip(*values, strict=True))
        if isinstance(first, _CONSTANTS) and all(value == first for value in values):
            return first
        if isinstance(first, int) and first % self.lengths[0] == 0:
            share = first // self.lengths[0]
            if all(value == share * length for value, length in zip(values, self.lengths, strict=True)):
                size = graph.call_method("size", (head, 0))
                return size if share == 1 else graph.call_function(operator.mul, (size, share))
        shown = ", ".join(str(v) if isinstance(v, _CONSTANTS) else type(v).__name__ for v in self.values)
        raise SplitError(
            f"at: the value of {describe(self.node)} crosses the cut {self.cut.name!r}, and is neither a tensor, nor "
            f"constant, nor a multiple of the batch size: {shown} for batches of "
            f"{', '.join(map(str, self.lengths))}; give an example= of the shape that is to run, or cut elsewhere"
        )


def channels_come_last(module: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a module's output of this shape is ``[N, H, W, C]`` by design, as in Swin.

    The rule: some LayerNorm or Linear inside (they work on the last dimension) is as wide as the last dimension, and no
    layer inside is as wide as the second.
    """
    last, second = set(), set()
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm):
            last.add(layer.normalized_shape[-1])
        elif isinstance(layer, nn.Linear):
            last.add(layer.out_features)
        second |= {getattr(layer, name, None) for name in ("out_channels", "num_features", "num_channels")}
    return len(shape) == 4 and shape[3] in last and shape[1] not in last | second


def _result(traced: Traced) -> fx.Node:
    output = next(node for node in traced.graph.nodes if node.op == "output")
    result = output.args[0]
    if not isinstance(result, fx.Node):
        raise SplitError(f"model: expected a forward that returns one tensor of logits, got {type(result).__name__}")
    return result


def _needed_by(node: fx.Node) -> set[fx.Node]:
    needed, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    return needed


def _check_batch_first(node: fx.Node, cut: Cut, values: Sequence[Any], batches: Sequence[Tensor]) -> None:
    shapes = [tuple(value.shape) for value in values]
    first = [shape[:1] for shape in shapes]
    if first != [(len(batch),) for batch in batches] or shapes[0][1:] != shapes[1][1:]:
        raise SplitError(
            f"at: what crosses the cut {cut.name!r} must be batch first; "
            f"{describe(node)} gives {shapes[0]} for a batch of {len(batches[0])} and {shapes[1]} for {len(batches[1])}"
        )


def _identity(value: Any) -> Any:
    """Equal for two values that are one tensor (an `Identity`, a `Dropout` in eval mode, work in place)."""
    return (value.data_ptr(), value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else id(value)
