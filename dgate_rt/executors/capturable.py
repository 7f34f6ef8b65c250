"""What a capture must not hold, found by running a stage once and looking at every operator that it calls.

CUDA refuses some of it with an error that names neither stage nor reason, and accepts the rest in silence: random
numbers would repeat with every replay, and batch statistics would read rows that hold stale data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgate_rt.errors import ExecutorError
from dgate_rt.staged import Boundary, StagedModel

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_CHANCES = ("dropout_p", "dropout")  # what operators that may draw random numbers call their probability


@contextmanager
def refuse_uncapturable(stage: nn.Module, name: str) -> Iterator[None]:
    """Inside, ``stage`` is run once, eagerly; ``name`` is what errors call it.

    Raises:
        ExecutorError: if it calls an operator that a capture forbids or would get wrong. Stage, submodule, operator and
            reason are named.
    """
    names = {module: path for path, module in stage.named_modules()}
    inside: list[str] = []

    def enter(module: nn.Module, args: object) -> None:
        if module in names:
            inside.append(names[module])

    def leave(module: nn.Module, args: object, result: object) -> None:
        if module in names:
            inside.pop()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func.namespace == "aten":
                with self:  # in inference mode composite operators come here whole
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            result = func(*args, **kwargs)
            reason = why_not(func, args, kwargs, result)
            if reason is not None:
                where = f"{name}, module {inside[-1]!r}," if inside and inside[-1] else name
                raise ExecutorError(f"executor: {where} {reason} ({func}), which cannot be captured")
            return result

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with Watch():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_uncapturable_stages(staged: StagedModel, sample_shape: Sequence[int], dtype: torch.dtype) -> None:
    """Run every stage on two samples of zeros, where the network lies.

    Raises:
        ExecutorError: as `refuse_uncapturable`.
    """
    device = next((p.device for p in staged.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        boundary: Boundary = torch.zeros((2, *sample_shape), dtype=dtype, device=device)
        for index, stage in enumerate(staged.stages):
            with refuse_uncapturable(stage, f"stage {index}"):
                boundary = staged.run_stage(index, boundary)


def why_not(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> str | None:
    """Why a call of an operator may not be in a capture, or None."""
    arguments = func._schema.arguments
    given = {a.name: a.default_value for a in arguments}
    given |= dict(zip(given, args, strict=False)) | kwargs
    if torch.Tag.data_dependent_output in func.tags:
        return "reads device data on the host"
    if torch.Tag.dynamic_output_shape in func.tags:
        return "has an output whose shape depends on data"
    if torch.Tag.nondeterministic_seeded in func.tags and _draws(given):
        return "draws random numbers"
    if "batch_norm" in func._schema.name and _uses_batch_statistics(func, given):
        return "normalises by the statistics of its batch, as in train mode"
    if func in _COPIES and len({t.device.type for t in tree_leaves((args, result)) if isinstance(t, Tensor)}) > 1:
        return "copies between host and device"
    return None


def _draws(given: dict[str, Any]) -> bool:
    """Whether random numbers are drawn: attention and recurrent layers name a dropout even where it is 0."""
    chance = next((given[name] for name in _CHANCES if name in given), None)
    return chance is None or (chance > 0 and given.get("train", True))


def _uses_batch_statistics(func: torch._ops.OpOverload, given: dict[str, Any]) -> bool:
    """Instance norm calls the same operator, with all samples as channels of one."""
    training = given.get("training", given.get("train", "with_update" in func._schema.name))
    return bool(training) and len(given["input"]) > 1
