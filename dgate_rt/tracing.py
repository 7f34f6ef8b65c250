"""How a model becomes a graph whose every node knows which module it came from.

Symbolic tracing (`torch.fx`) with three additions: the module path of each node, what each module returned and when,
and modules that cannot be traced kept whole, as one node.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from dgate_rt.errors import SplitError

_LAYERS = (_ConvNd, _NormBase, nn.Linear, nn.LayerNorm, nn.GroupNorm)  # subclasses of these stay whole, too
_PAIRS = (nn.MultiheadAttention, nn.RNNBase)  # layers that return two values
_SHAPE_METHODS = {"size", "dim", "numel"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


@dataclass(frozen=True)
class Returned:
    """What a module gave back when it was last called."""

    node: fx.Node | None
    """Its output; the first one, of several; ``None`` where it returned nothing that depends on a tensor."""
    last: int
    """The place, in program order, of the last node executed before it returned."""


@dataclass(frozen=True)
class Traced:
    """A model as a graph. ``node.meta["path"]`` is the module in whose ``forward`` a node was executed."""

    model: nn.Module
    graph: fx.Graph
    order: dict[fx.Node, int]
    """Program order."""
    returned: dict[str, Returned]
    """By module path; only modules that were called."""
    dependent: frozenset[fx.Node]
    """The nodes that depend on the input; every other node may be repeated wherever it is used."""


def inside(path: str, parent: str) -> bool:
    """Whether ``path`` names something strictly inside module ``parent`` (the root is ``""``)."""
    return path != parent and (not parent or path.startswith(parent + "."))


def describe(node: fx.Node) -> str:
    """A node in the user's words: the module, or the operation and the module whose ``forward`` holds it."""
    if node.op == "call_module":
        return repr(node.target)
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    path = node.meta.get("path", "")
    return f"operation {target!r} in {path!r}" if path else f"operation {target!r} in the model's own forward"


def is_shape_node(node: fx.Node) -> bool:
    """Whether a node only reads what kind of tensor there is: its shape, dtype or device, or arithmetic on those."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    from_operator = getattr(node.target, "__module__", "") in ("_operator", "math")
    return from_operator and bool(node.all_input_nodes) and all(map(is_shape_node, node.all_input_nodes))


def trace(model: nn.Module, cuts: Collection[str] = ()) -> Traced:
    """Trace ``model`` so that every module that holds one of ``cuts`` is traced through.

    A module that cannot be traced and holds no cut becomes one node, and with it every module of its class that holds
    none (its own classes only, not torch's): the innermost first, then outwards.

    Raises:
        SplitError: if the model's own ``forward``, or a module that holds a cut, cannot be traced.
    """
    whole: set[str] = set()
    while True:
        tracer = _PathTracer(cuts, whole)
        try:
            graph = tracer.trace(model)
        except SplitError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            path = tracer.failed
            if not path:
                raise SplitError(f"model: the forward of {type(model).__name__} cannot be traced: {reason}") from error
            failed = type(model.get_submodule(path))
            held = next((cut for cut in cuts if inside(cut, path)), None)
            if held is not None:
                name = f"{path!r} ({failed.__name__})"
                raise SplitError(f"at: {name} holds the cut {held!r} and cannot be traced: {reason}") from error
            whole.add(path)
            if not failed.__module__.startswith("torch.nn"):  # the same class would fail the same way
                alike = [name for name, module in model.named_modules() if type(module) is failed]
                whole |= {name for name in alike if not any(inside(cut, name) for cut in cuts)}
        else:
            return _traced(model, graph, tracer.returned)


def _traced(model: nn.Module, graph: fx.Graph, returned: dict[str, Returned]) -> Traced:
    order = {node: place for place, node in enumerate(graph.nodes)}
    results = {entry.node for entry in returned.values()}
    graph.eliminate_dead_code(lambda node: node in results or not is_shape_node(node))  # unused parts of shapes
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
    return Traced(model, graph, order, returned, frozenset(dependent))


class _PathTracer(fx.Tracer):
    """A tracer of one-input models that records paths, returns, and the innermost module that failed."""

    proxy_buffer_attributes = True  # a buffer is read when the stage runs, not when it is traced

    def __init__(self, cuts: Collection[str], whole: Collection[str]) -> None:
        super().__init__()
        self.cuts = cuts
        self.whole = whole
        self.path = ""
        self.failed: str | None = None
        self.returned: dict[str, Returned] = {}

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder, for the first argument of ``forward``; the others keep their defaults."""
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        needed = [
            p.name for p in parameters[1:] if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if not parameters or needed:
            names = [p.name for p in parameters]
            raise SplitError(f"model: expected a forward that takes one tensor, got arguments {names}")

        def forward(root: nn.Module, x: fx.Proxy) -> Any:
            return root_fn(root, x)

        return forward, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["path"] = self.path
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if any(inside(cut, module_qualified_name) for cut in self.cuts):
            return False
        return (
            module_qualified_name in self.whole
            or isinstance(m, _LAYERS)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        outer, self.path = self.path, path
        leaf = self.is_leaf_module(m, path)
        try:
            result = super().call_module(m, forward, args, kwargs)
            if leaf and isinstance(m, _PAIRS):
                result = (result[0], result[1])
        except Exception:
            if not leaf and self.failed is None:
                self.failed = path
            raise
        finally:
            self.path = outer
        self.returned[path] = Returned(_first_node(result), len(self.graph.nodes) - 1)
        return result


def _first_node(result: Any) -> fx.Node | None:
    if isinstance(result, dict):
        result = tuple(result.values())
    if isinstance(result, (tuple, list)):
        return next((node for node in map(_first_node, result) if node is not None), None)
    return result.node if isinstance(result, fx.Proxy) else None


class Recorder(fx.Interpreter):
    """Runs a traced graph and keeps the values of some of its nodes."""

    def __init__(self, traced: Traced, wanted: Collection[fx.Node]) -> None:
        super().__init__(traced.model, graph=traced.graph)
        self.wanted = wanted
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


def record(traced: Traced, wanted: Collection[fx.Node], batches: Sequence[Tensor]) -> dict[fx.Node, tuple[Any, ...]]:
    """The values that nodes take on each of ``batches``."""
    runs = []
    for batch in batches:
        recorder = Recorder(traced, wanted)
        recorder.run(batch.clone())  # a model may work in place on its input
        runs.append(recorder.values)
    return {node: tuple(run[node] for run in runs) for node in wanted}


def is_element(node: fx.Node) -> bool:
    """Whether a node takes one element, by a fixed index, of what another returned."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return False
    return isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int)
