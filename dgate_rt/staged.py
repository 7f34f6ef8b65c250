"""A network in stages: what the runtime runs, and `split`, which makes it from any classifier."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Union

import torch
from torch import Tensor, fx, nn

from dgate_rt import cutting, tracing
from dgate_rt.autocut import every_block, propose
from dgate_rt.errors import SplitError
from dgate_rt.example import distinct_rows, guesses
from dgate_rt.independence import check_stages, refuse_training

Boundary = Union[Tensor, tuple[Tensor, ...]]  # noqa: UP007 - evaluated when imported
"""What crosses from stage to stage: one tensor or several, batch first. The gate reads the first."""

_ROWS = 3  # the batch on which `split` tries a model, and a smaller one
_FEWER_ROWS = 2
_PROPOSALS = {"auto": propose, "blocks": every_block}


def as_tuple(boundary: Boundary) -> tuple[Tensor, ...]:
    """A boundary as the tuple of its tensors."""
    return (boundary,) if isinstance(boundary, Tensor) else tuple(boundary)


class StagedModel(nn.Module):
    """A classifier as a chain of stages; a gate may read what crosses between two of them.

    Args:
        stages: at least one module; each takes the boundary that the one before returned, a tuple as several
            arguments; the last returns the logits ``[N, K]``.
        cuts: a name for the end of each stage but the last.
        nhwc: for each cut, whether its first tensor is ``[N, H, W, C]`` by design; none is, if left out.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        cuts: Sequence[str] | None = None,
        nhwc: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        if not stages:
            raise ValueError("stages: expected at least one module, got none")
        wrong = next((stage for stage in stages if not isinstance(stage, nn.Module)), None)
        if wrong is not None:
            raise TypeError(f"stages: expected modules, got {type(wrong).__name__}")
        gates = len(stages) - 1
        for name, given in (("cuts", cuts), ("nhwc", nhwc)):
            if given is not None and len(given) != gates:
                raise ValueError(f"{name}: expected {gates} for {len(stages)} stages, got {len(given)}")
        self.stages = nn.ModuleList(stages)
        self.cuts = tuple(cuts) if cuts is not None else tuple(f"stage{index}" for index in range(gates))
        self.nhwc = tuple(nhwc) if nhwc is not None else (False,) * gates
        self.split_at = self.cuts
        """Where it was cut before `keeping` left some of the cuts out."""
        self.example_shape: tuple[int, ...] | None = None
        """Shape of one sample, where the user gave an example."""
        self.example_dtype: torch.dtype | None = None
        self.checked = False
        """Whether `split` ran the stages on an example and found them right, and samples independent."""
        self.training = self.stages.training = any(stage.training for stage in stages)

    @property
    def gate_count(self) -> int:
        return len(self.stages) - 1

    def forward(self, x: Tensor) -> Tensor:  # [N, K]
        boundary: Boundary = x
        for index in range(len(self.stages)):
            boundary = self.run_stage(index, boundary)
        return as_tuple(boundary)[0]

    def run_stage(self, index: int, boundary: Boundary) -> Boundary:
        """Run one stage; like the model itself it may work in place on what it is given."""
        result = self.stages[index](*as_tuple(boundary))
        return tuple(result) if isinstance(result, list) else result

    def boundaries(self, x: Tensor) -> Iterator[Boundary]:
        """The output of each stage in turn, the logits last; use each before taking the next."""
        boundary: Boundary = x
        for index in range(len(self.stages)):
            boundary = self.run_stage(index, boundary)
            yield boundary

    def gate_features(self, index: int, boundary: Boundary) -> Tensor:
        """What the gate after stage ``index`` reads: the first tensor, viewed as ``[N, C, H, W]`` if it is a map."""
        features = as_tuple(boundary)[0]
        return features.permute(0, 3, 1, 2) if self.nhwc[index] else features

    def features(self, x: Tensor) -> Iterator[Tensor]:
        """What each gate reads, in turn; use each before taking the next."""
        for index, boundary in zip(range(self.gate_count), self.boundaries(x), strict=False):
            yield self.gate_features(index, boundary)

    def keeping(self, cuts: Sequence[str]) -> StagedModel:
        """The same network with some of its cuts: the stages up to each of them are run as one.

        Modules, parameters and buffers are shared with this network.

        Args:
            cuts: some of ``self.cuts``, in their order; none of them makes one stage of the whole network.

        Raises:
            ValueError: if one is no cut of this network, comes twice, or is not in order.
        """
        places = {name: place for place, name in enumerate(self.cuts)}
        if [name for name in self.cuts if name in cuts] != list(cuts):
            raise ValueError(f"cuts: expected some of {list(self.cuts)}, in this order, got {list(cuts)}")
        kept = [places[name] for name in cuts]
        ends = [*(place + 1 for place in kept), len(self.stages)]
        parts = [list(self.stages)[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        staged = StagedModel([_one_stage(part) for part in parts], cuts, [self.nhwc[place] for place in kept])
        staged.split_at, staged.checked = self.split_at, self.checked
        staged.example_shape, staged.example_dtype = self.example_shape, self.example_dtype
        return staged

    def fingerprint(self) -> str:
        """SHA-256 over the structure and, byte for byte, every parameter and buffer, in stage order.

        The structure is the class and the declared constants (a convolution's stride, say) of each module, and the
        operations between them where a stage was traced.
        """
        digest = hashlib.sha256()
        for index, stage in enumerate(self.stages):
            for line in _structure(stage):
                digest.update(f"{index}.{line}\n".encode())
            for name, tensor in itertools.chain(stage.named_parameters(), stage.named_buffers()):
                update_digest(digest, f"{index}.{name}", tensor)
        return f"sha256:{digest.hexdigest()}"

    def extra_repr(self) -> str:
        return f"cuts={list(self.cuts)}"


class _Joined(nn.Module):
    """Stages that run one after another as one."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.training = self.parts.training = any(part.training for part in parts)

    def forward(self, *tensors: Tensor) -> Boundary:
        boundary: Boundary = tensors
        for part in self.parts:
            boundary = part(*as_tuple(boundary))
        return boundary


def _one_stage(parts: Sequence[nn.Module]) -> nn.Module:
    """One module of some stages in order, the same whether they were joined before in part or not."""
    flat = [stage for part in parts for stage in (part.parts if isinstance(part, _Joined) else [part])]
    return flat[0] if len(flat) == 1 else _Joined(flat)


def update_digest(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Add a tensor: name, dtype, shape, and its values byte for byte."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    raw = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
    digest.update(raw.numpy().data)


def _structure(stage: nn.Module) -> Iterator[str]:
    for name, module in stage.named_modules():
        traced = isinstance(module, fx.GraphModule)
        constants = [(c, getattr(module, c, None)) for c in sorted(getattr(type(module), "__constants__", ()))]
        plain = [(c, value) for c, value in constants if isinstance(value, (bool, int, float, str, tuple))]
        yield f"{name} {'' if traced else type(module).__name__} {plain}"
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
                yield f"{name} {node.op} {target}"


def split(
    model: nn.Module,
    at: Sequence[str] | str,
    example: Tensor | None = None,  # [N, ...]
) -> StagedModel:
    """Cut a classifier after named submodules.

    The stages share the model's parameters and buffers, and together compute what the model computes. "After" a module
    is behind the last node executed in it, in program order, the last time that it is called. What crosses a cut is
    what the module returned, always first, and whatever else later stages need.

    Args:
        model: takes one tensor, returns logits ``[N, K]``; in eval mode. Flags, gradients and buffers stay as they are.
        at: names of submodules in the order in which they run; ``"auto"`` for the ends of the main blocks, three at
            most; or ``"blocks"`` for the end of every block, of which `calibrate` keeps few (``max_gates``).
        example: a batch, if only of one sample, to try the stages on. Without one its shape is guessed from the first
            layer; if the model does not run on that, the result is not `StagedModel.checked`.

    Raises:
        SplitError: if a name is unknown, a module cannot be traced, or a stage does not treat samples independently.
        TypeError: if ``model`` is no module, or ``example`` no tensor.
    """
    names = _check_arguments(model, at, example)
    refuse_training(model)
    attributes = set(vars(model))
    try:
        with torch.no_grad(), torch.random.fork_rng(_cuda_devices(model)):
            return _split(model, names, example)
    finally:
        for name in set(vars(model)) - attributes:  # constants that tracing leaves on the model
            delattr(model, name)


def _check_arguments(model: nn.Module, at: Sequence[str] | str, example: Tensor | None) -> list[str] | str:
    """The names to cut after, or a way to find them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if example is not None and not isinstance(example, Tensor):
        raise TypeError(f"example: expected a tensor, got {type(example).__name__}")
    if example is not None and (example.ndim < 2 or len(example) == 0):
        raise SplitError(f"example: expected a batch of at least one sample, got shape {tuple(example.shape)}")
    if isinstance(at, str):
        if at not in _PROPOSALS:
            raise SplitError(f"at: expected a list of names, 'auto' or 'blocks', got {at!r}; pass a list: at=[{at!r}]")
        return at
    names = list(at)
    if not names or not all(isinstance(name, str) for name in names):
        raise SplitError(f"at: expected a list of names of submodules, got {names!r}")
    return names


def _split(model: nn.Module, at: list[str] | str, example: Tensor | None) -> StagedModel:
    paths = [] if isinstance(at, str) else cutting.check_names(model, at)
    batch, expected = _try(model, example)
    traced = tracing.trace(model, paths)
    if isinstance(at, str):
        if batch is None:
            raise SplitError(f"at: {at!r} has to run the model, and no shape could be guessed; give an example=")
        names = paths = _PROPOSALS[at](traced, batch[:1])
    else:
        names = at
    plan = cutting.plan(traced, cutting.locate(traced, names, paths))

    def other_shapes() -> list[Tensor]:
        return [] if example is not None or batch is None else _other_shapes(model, batch)

    batches = [] if batch is None else [batch, batch[:_FEWER_ROWS]]
    stages, nhwc = cutting.build(plan, batches, other_shapes)
    if batch is not None and expected is not None:
        check_stages(stages, batch, expected)
    staged = StagedModel(stages, names, nhwc)
    staged.checked = batch is not None
    if example is not None:
        staged.example_shape, staged.example_dtype = tuple(example.shape[1:]), example.dtype
    return staged


def _try(model: nn.Module, example: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A batch that the model runs on, and its logits; neither, if no guess fits."""
    for candidate in guesses(model) if example is None else (example,):
        batch = distinct_rows(candidate, _ROWS)
        try:
            logits = model(batch.clone())
        except Exception as error:
            if example is None:
                continue
            shape = tuple(example.shape)
            raise SplitError(f"example: the model does not run on shape {shape}, {example.dtype}: {error}") from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != _ROWS:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise SplitError(f"model: expected logits [N, K] for a batch of N={_ROWS}, got {got}")
        return batch, logits
    return None, None


def _other_shapes(model: nn.Module, batch: Tensor) -> list[Tensor]:
    """A batch of another shape that the model also runs on, if there is one."""
    for guess in guesses(model):
        if guess.shape[1:] != batch.shape[1:]:
            other = distinct_rows(guess, len(batch))
            try:
                model(other.clone())
            except Exception:
                continue
            return [other]
    return []


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return list({parameter.device for parameter in model.parameters() if parameter.is_cuda})
