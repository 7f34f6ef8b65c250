"""From validation data to thresholds: the cheapest operating point of a wanted accuracy, or the reverse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from dgate_rt.batches import check_staged, frozen
from dgate_rt.cost import CostKind, measure_costs
from dgate_rt.engines import StageEngine, check_engine
from dgate_rt.engines.precision import check_dtype
from dgate_rt.errors import UnreachableTargetError
from dgate_rt.example import distinct_rows
from dgate_rt.frontier import search_frontier
from dgate_rt.gate import Gate
from dgate_rt.independence import check_stages
from dgate_rt.program import GateProgram, check_targets
from dgate_rt.risk import Guarantee, certify, check_bound, halves, samples_needed
from dgate_rt.selection import Subset, select_gates
from dgate_rt.staged import StagedModel
from dgate_rt.trace import Trace, collect_trace


def calibrate(
    staged: StagedModel,
    gates: Iterable[nn.Module],
    loader: Iterable[tuple[Any, Any]],
    *,
    max_accuracy_drop: float | None = None,
    min_accuracy: float | None = None,
    max_cost: float | None = None,
    confidence: float | None = None,
    max_gates: int | None = None,
    cost: CostKind = "flops",
    engine: str | StageEngine = "eager",
    dtype: str | torch.dtype | None = None,
    remeasure: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> GateProgram:
    """Choose every gate's threshold on validation data.

    Margins are collected once. Thresholds are then selected gate after gate as in the paper (section 3.1, training
    setup), and improved by a joint search over all exact candidates, so the result is never dearer than the paper's.
    The cost of the gates themselves counts. The program carries the whole accuracy/cost frontier,
    and the scores of the validation samples, which a monitor compares with (`Runtime.monitor`).

    Args:
        staged: the network, cut.
        gates: of `Gate`, one a cut.
        loader: batches ``(x, y)`` of validation data, ``x`` [N, ...], ``y`` [N] integers.
        max_accuracy_drop: how much accuracy may be lost against the whole network on this data, as a share of the
            samples (0.01 is one point); 0 if no target is given.
        min_accuracy: the accuracy to keep, in [0, 1].
        max_cost: the mean cost a sample to stay within, FLOPs or milliseconds as ``cost`` says.
        confidence: the probability, in (0, 1), with which ``max_accuracy_drop`` is to hold on new data from the
            distribution of ``loader``, and not on this data alone, which new data often exceeds. A
            guarantee for any number of samples, if they are independent: fixed-sequence testing on half of them, see
            `dgate_rt.risk`. The program carries it, as ``guarantee``. These samples must not have chosen the gates
            before, in another call with ``max_gates``.
        max_gates: keep at most so many of the gates, chosen one by one as they make the target cheapest (or, with
            ``max_cost``, most accurate), by the samples that choose the thresholds (`dgate_rt.selection`). The network
            of the program is cut at these alone. None keeps all. For networks that are cut after every block.
        cost: ``"flops"`` counts, ``"time"`` measures stages and gates here, at the batch size that suits each best,
            up to the loader's; of stages that ``max_gates`` joins the times are added up. On the CPU it has this
            process keep the memory that it frees, as `compile` does.
        engine: what `compile` will run the stages on: the engine whose times count. Scores come from ``staged`` as it
            is, in any case.
        dtype: that `compile` will run in, likewise.
        remeasure: measure times again that were measured before.
        device: where ``staged`` and ``gates`` are.
        progress: show a progress bar.

    Raises:
        TypeError: if ``gates`` holds anything but gates.
        ValueError: on more than one target, a confidence without ``max_accuracy_drop`` or outside (0, 1), another
            number of gates than cuts, ``max_gates`` below 1, no data, labels outside ``[0, K)``, or an engine, dtype
            or ``remeasure`` with costs that are not times.
        ExecutorError: if the engine or dtype is not to be had here, or the engine cannot run a stage.
        SplitError: if ``staged`` was not checked by `split` and a stage mixes the samples of a batch.
        UnreachableTargetError: when no thresholds reach the target; the message says what is reachable.
    """
    targets = {"max_accuracy_drop": max_accuracy_drop, "min_accuracy": min_accuracy, "max_cost": max_cost}
    check_targets("calibrate", targets)
    if confidence is not None:
        if max_accuracy_drop is None:
            raise ValueError("confidence: expected max_accuracy_drop with it, the bound that is to hold, got none")
        check_bound(max_accuracy_drop, confidence)
    if cost != "time" and (engine, dtype, remeasure) != ("eager", None, False):
        raise ValueError(f"engine, dtype and remeasure: expected cost='time' with them, got {cost!r}")
    if max_gates is not None and (not isinstance(max_gates, int) or max_gates < 1):
        raise ValueError(f"max_gates: expected a whole number of at least 1, or None for all, got {max_gates!r}")
    if confidence is not None and staged.split_at != staged.cuts:
        message = "unless by other samples than those of the loader, the guarantee does not hold"
        warnings.warn(f"confidence: these gates were chosen among others; {message}", stacklevel=2)
    device = check_staged(staged, device)
    check_engine(engine, device)  # before what takes long
    check_dtype(dtype, device)
    checked = _check_gates(staged, gates)
    with frozen(staged):
        trace, example = collect_trace(staged, checked, loader, device=device, progress=progress)
        if not staged.checked:  # made by hand, or split without an example
            check_stages(staged.stages, distinct_rows(example, 3))
        costs = measure_costs(staged, checked, example, cost, engine, dtype, remeasure)

    def wanted(seen: Trace) -> float:
        return seen.network_accuracy - (max_accuracy_drop or 0.0) if min_accuracy is None else min_accuracy

    if max_gates is not None:
        seen = trace if confidence is None else halves(trace)[0]  # those that test the thresholds have no say in them
        kept: Subset = ()
        if len(seen.targets):
            target = {"min_accuracy": wanted(seen)} if max_cost is None else {"max_cost": max_cost}
            kept = select_gates(seen, costs, max_gates, **target, progress=progress)
        staged, checked = staged.keeping([staged.cuts[gate] for gate in kept]), tuple(checked[gate] for gate in kept)
        trace, costs = trace.keeping(kept), costs.keeping(kept)
    guarantee = None
    try:
        if max_cost is not None:
            frontier = search_frontier(trace, costs, max_cost=max_cost)
            point = frontier.most_accurate(max_cost)
        else:
            frontier = search_frontier(trace, costs, min_accuracy=wanted(trace))
            point = frontier.cheapest(wanted(trace))
    except UnreachableTargetError as error:
        if max_gates is None:
            raise
        raise UnreachableTargetError(f"{error}, with at most {max_gates} gates") from error
    if max_gates is not None and not staged.gate_count:
        warnings.warn("max_gates: no gate helps towards this target; the program is the network alone", stacklevel=2)
    if max_accuracy_drop is not None and confidence is not None:
        point, guarantee = certify(trace, costs, max_accuracy_drop, confidence)
        if point.shares[-1] == 1 and staged.gate_count:
            warnings.warn(_nothing_certified(guarantee, len(trace.targets)), stacklevel=2)
    assert trace.network_scores is not None
    return GateProgram(
        staged=staged,
        gates=checked,
        thresholds=point.thresholds,
        point=point,
        frontier=frontier,
        costs=costs,
        network_accuracy=trace.network_accuracy,
        input_shape=tuple(example.shape[1:]),
        input_dtype=example.dtype,
        scores=torch.from_numpy(np.concatenate([trace.margins, trace.network_scores[None]])),
        guarantee=guarantee,
    )


def _nothing_certified(guarantee: Guarantee, samples: int) -> str:
    """Why all gates are off, and what would help."""
    least = samples_needed(guarantee.max_accuracy_drop, guarantee.confidence)
    why = f"{samples} samples do not tell a drop within {100 * guarantee.max_accuracy_drop:g} % from a larger one"
    if samples < least < math.inf:
        why = f"loader: expected at least {least} samples, got {samples}"
    return f"{why} with {100 * guarantee.confidence:g} % confidence at any cheaper thresholds; all gates are off"


def _check_gates(staged: StagedModel, gates: Iterable[nn.Module]) -> tuple[Gate, ...]:
    checked: list[Gate] = []
    for gate in gates:
        if not isinstance(gate, Gate):
            raise TypeError(f"gates: expected Gate modules, got {type(gate).__name__}")
        checked.append(gate)
    if len(checked) != staged.gate_count:
        raise ValueError(f"gates: expected {staged.gate_count}, one a cut, got {len(checked)}")
    return tuple(checked)
