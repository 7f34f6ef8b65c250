"""The oracle: every operator in plain PyTorch float32, slow and obvious.

Kernels are tested against this file, and where the extension is not built this file runs instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgate_rt.gate import Gate, confidence_and_label, leaves, margin_and_label, pool_features
from dgate_rt.staged import StagedModel, as_tuple


def gate_distances(
    features: Tensor,  # [N, C, H, W], [N, T, C] or [N, C]
    weight: Tensor,  # [K, C] float32
    bias: Tensor,  # [K] float32
    pool: str = "avg",
    count: Tensor | None = None,  # [] int32
    criterion: str = "margin",
) -> tuple[Tensor, Tensor, Tensor]:  # margin [N] float32, label [N] int64, distances [N, K] float32
    """``distances = pool(features) @ weight.T + bias``; margin (by ``criterion``) and label from them.

    Rows from ``count`` on are zero.
    """
    n = features.shape[0] if count is None else int(count)
    distances = features.new_zeros((features.shape[0], weight.shape[0]), dtype=torch.float32)
    margin = features.new_zeros(features.shape[0], dtype=torch.float32)
    label = features.new_zeros(features.shape[0], dtype=torch.int64)
    distances[:n] = pool_features(features[:n], pool) @ weight.float().T + bias.float()
    margin[:n], label[:n] = confidence_and_label(distances[:n], criterion)
    return margin, label, distances


def gate_score(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    pool: str = "avg",
    count: Tensor | None = None,
    criterion: str = "margin",
) -> tuple[Tensor, Tensor]:
    """`gate_distances` without the distances."""
    margin, label, _ = gate_distances(features, weight, bias, pool, count, criterion)
    return margin, label


def route_(
    src: Sequence[Tensor],  # each [N, ...]
    ids: Tensor,  # [N] int64
    margin: Tensor,  # [N] float32
    label: Tensor,  # [N] int64
    count: Tensor | None,  # [] int32
    thresholds: Tensor,  # [G] float32
    gate: int,
    dest: Sequence[Tensor],  # each [capacity, ...]
    dest_ids: Tensor,  # [capacity] int64
    dest_count: Tensor,  # [] int32
    out_labels: Tensor,  # [M] int64
    out_scores: Tensor,  # [M] float32
    out_exits: Tensor,  # [M] int64
    waiting: Tensor | None = None,  # [] int32
    buckets: Tensor | None = None,  # [B] int32, ascending
    bucket: Tensor | None = None,  # [] int32
) -> None:
    """Let go those whose margin reaches the threshold; pack the others, in order, into ``dest``; choose a bucket."""
    n = ids.shape[0] if count is None else int(count)
    start = 0 if waiting is None else int(waiting)
    leave = leaves(margin[:n], thresholds[gate])
    stay = ~leave
    survivors = int(stay.sum())
    capacity = dest_ids.shape[0]
    if start + survivors > capacity:
        raise ValueError(f"dest: {start} rows wait and {survivors} survive, more than its capacity of {capacity}")
    total = start + survivors
    if buckets is not None and total > int(buckets[-1]):
        raise ValueError(f"buckets: {total} rows go on, more than the largest bucket of {int(buckets[-1])} takes")
    gone = ids[:n][leave]
    out_labels[gone] = label[:n][leave]
    out_scores[gone] = margin[:n][leave]
    out_exits[gone] = gate
    for source, target in zip(src, dest, strict=True):
        target[start:total] = source[:n][stay]
    dest_ids[start:total] = ids[:n][stay]
    dest_count.fill_(total)
    if buckets is not None and bucket is not None:
        bucket.fill_(int((buckets < total).sum()) if total else len(buckets))


def predict(
    staged: StagedModel,
    gates: Sequence[Gate],
    thresholds: Sequence[float],
    x: Tensor,  # [N, ...]
) -> tuple[Tensor, Tensor, Tensor]:  # labels [N] int64, scores [N] float32, exits [N] int64
    """Dense execution with post-hoc gating: what every executor must answer.

    Every stage and every gate runs on every sample; each sample then takes its first exit.
    """
    exits = torch.full((len(x),), len(gates), device=x.device)
    scores, labels = torch.empty(len(x), device=x.device), torch.empty_like(exits)
    for g, boundary in enumerate(staged.boundaries(x)):  # scored one by one: the next stage may work in place
        if g < len(gates):
            margin, label = confidence_and_label(gates[g](staged.gate_features(g, boundary)), gates[g].criterion)
            here = leaves(margin, thresholds[g]) & (exits == len(gates))
            exits[here] = g
        else:
            margin, label = margin_and_label(as_tuple(boundary)[0].float())
            here = exits == len(gates)
        scores[here], labels[here] = margin[here], label[here]
    return labels, scores, exits
