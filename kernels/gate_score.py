"""The score of a decision gate on a GPU: pool, product, criterion; `dgate_rt.reference` says what it must answer.

All sums are float32, no launch depends on device data, and two runs give the same bits.
"""

import torch
from torch.library import wrap_triton

from dgate_rt.kernels.score_kernels import combine_kernel, fused_kernel, pool_kernel, product_kernel
from dgate_rt.kernels.score_plan import ScorePlan, lay_out, plan_score

DEFAULT_SMS = 132  # of an H100; for tensors that are on no GPU


def score(
    features: torch.Tensor,  # [N, C, H, W], [N, T, C] or [N, C]; float32, bfloat16 or float16
    weight: torch.Tensor,  # [K, width] float32
    bias: torch.Tensor,  # [K] float32
    pool: str,
    count: torch.Tensor | None,  # [] int32
    criterion: str,
    keep_distances: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # margin [N] float32, label [N] int64, distances [N or 0, K]
    """Score every row, without waiting for the device; arguments are checked by the caller.

    Rows from ``count`` on are not read and are zero in all outputs; a ``count`` outside [0, N] is clamped. Distances
    have no rows unless ``keep_distances``.
    """
    n, *sizes = (int(size) for size in features.shape)  # the plan depends on them: none stays symbolic
    classes = int(weight.shape[0])
    margin = features.new_empty(n, dtype=torch.float32)
    label = features.new_empty(n, dtype=torch.int64)
    distances = features.new_empty((n if keep_distances else 0, classes), dtype=torch.float32)
    if n == 0:
        return margin, label, distances
    layout = lay_out(sizes, features.stride(), pool)
    plan = plan_score(
        n,
        layout.channels,
        layout.positions,
        classes,
        features.element_size(),
        _multiprocessors(features.device),
        side=layout.side,
        elements=layout.elements,
        channels_adjacent=layout.channel_stride == 1,
        criterion=criterion,
        keep_distances=keep_distances,
    )
    partial, tile_labels = _scratch(plan, features)
    image = {
        "features": features,
        "stride_n": layout.sample_stride,
        "stride_c": layout.channel_stride // layout.channel_align,
        "stride_h": layout.row_stride,
        "stride_p": layout.position_stride,
        "C": plan.channels,
        "P": plan.positions,
        "WIDTH": layout.width,
        "SIDE": layout.side,
        "H": layout.image[0],
        "W": layout.image[1],
        "ALIGN_C": layout.channel_align,
        "BLOCK_C": plan.block_c,
        "BLOCK_P": plan.block_p,
        "num_warps": 4,
        "num_stages": 1,
    }
    weights = {
        "weight": weight,
        "weight_stride_k": weight.stride(0),
        "weight_stride_c": weight.stride(1),
        "BLOCKS": plan.blocks_per_split,
    }
    answer = {
        "bias": bias,
        "bias_stride": bias.stride(0),
        "partial": partial,
        "margin": margin,
        "labels": label,
        "distances": distances,
        "K": classes,
        "CRITERION": criterion,
        "KEEP": keep_distances,
        "SPLITS": plan.splits,
    }
    tiles = {"tile_labels": tile_labels, "TILES": plan.class_tiles, "TILE_K": plan.tile_k}
    live = {"count": count, "rows": n}
    if plan.variant == "fused":
        wrap_triton(fused_kernel)[plan.grid](TILE_K=plan.tile_k, **image, **weights, **answer, **live)
    else:
        vectors = features
        if plan.variant == "pooled":
            vectors = features.new_empty((n, plan.width), dtype=torch.float32)
            wrap_triton(pool_kernel)[plan.pool_grid](pooled=vectors, **image, **live)
            layout = lay_out([plan.width], vectors.stride(), "flat")
        wrap_triton(product_kernel)[plan.grid](
            vectors=vectors,
            stride_n=layout.sample_stride,
            stride_a=layout.flat_strides[0],
            stride_b=layout.flat_strides[1],
            stride_c=layout.channel_stride,
            C=plan.width,
            B_SIZE=layout.flat_shape[0],
            C_SIZE=layout.flat_shape[1],
            TILE_N=plan.tile_n,
            TILE_C=plan.tile_c,
            num_warps=plan.product_warps,
            num_stages=3,
            **weights,
            **answer,
            **tiles,
            **live,
        )
    if plan.combines:
        wrap_triton(combine_kernel)[(n,)](
            BLOCK_S=plan.combine_splits,
            BLOCK_K=plan.combine_width,
            num_warps=plan.combine_warps,
            num_stages=1,
            **answer,
            **tiles,
            **live,
        )
    return margin, label, distances


def _scratch(plan: ScorePlan, like: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What programs hand to the combine kernel: ``partial`` and ``tile_labels``."""
    if plan.splits > 1:
        return like.new_empty((plan.splits, plan.n, plan.classes), dtype=torch.float32), None
    if plan.class_tiles > 1:
        shape = (plan.n, plan.class_tiles)
        return like.new_empty((plan.statistics, *shape), dtype=torch.float32), like.new_empty(shape, dtype=torch.int8)
    return None, None


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return DEFAULT_SMS
