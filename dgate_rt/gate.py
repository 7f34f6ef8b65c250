"""When a sample may leave: the margin of a decision gate.

A gate is one linear layer over pooled features (Shafiee et al. 2019, section 2.2). Its outputs are signed distances
to the one-vs-all hyperplanes; the largest is the margin. Pooling, margin, label, the other criteria and the exit rule
are each written once, here; every kernel is held to them through `reference.py`.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor, nn


class Pool(str, Enum):
    """How a gate turns a stage's features into one vector a sample."""

    AVG = "avg"
    """Mean over space ``[N, C, H, W]`` or tokens ``[N, T, C]``; width C."""
    CLS = "cls"
    """The first token of ``[N, T, C]``; width C."""
    FLAT = "flat"
    """Every value, in ``flatten(1)`` order; width the product of the sample's shape."""
    GRID2 = "grid2"
    """Mean over each cell of a 2x2 grid of ``[N, C, H, W]``, channel after channel; width 4 C. Of tokens, which have no
    rows and columns, and of maps of one element what ``avg`` takes; ``[N, C]`` as it is."""
    GRID4 = "grid4"
    """The same of a 4x4 grid; width 16 C."""


GRIDS = {"grid2": 2, "grid4": 4}
"""Cells a side of the pools that are grids. Where a map has fewer rows or columns, cells share them."""
DEFAULT_POOL = Pool.GRID2
"""What `fit` takes if nothing else is said: early maps still tell where things are, and one mean forgets it."""


def ranks_of(pool: Pool) -> tuple[int, ...]:
    """Ranks of the features that a pool takes."""
    return (3,) if pool is Pool.CLS else (2, 3, 4)


def pool_features(
    features: Tensor,  # [N, C, H, W], [N, T, C] or [N, C]
    pool: Pool | str = Pool.AVG,
) -> Tensor:  # [N, width] float32
    """Pool each sample's features to one float32 vector; the mean is taken in float32 whatever the dtype.

    Raises:
        ValueError: if ``features`` has a rank that ``pool`` does not take.
    """
    pool = Pool(pool)
    ranks = ranks_of(pool)
    if features.ndim not in ranks:
        wanted, got = " or ".join(map(str, ranks)), tuple(features.shape)
        raise ValueError(f"features: pool={pool.value!r} expects rank {wanted}, got shape {got}")
    if pool is Pool.FLAT or features.ndim == 2:
        return features.flatten(1).float()
    if pool.value in GRIDS and features.ndim == 4 and features.shape[2] * features.shape[3] != 1:
        return nn.functional.adaptive_avg_pool2d(features.float(), GRIDS[pool.value]).flatten(1)
    if pool is Pool.CLS:
        return features[:, 0].float()
    dims = (2, 3) if features.ndim == 4 else (1,)
    return features.float().mean(dims)


def pooled_width(sample_shape: tuple[int, ...], pool: Pool | str) -> int:
    """The width of `pool_features` for features of shape ``[N, *sample_shape]``."""
    return pool_features(torch.empty((1, *sample_shape), device="meta"), pool).shape[1]


def margin_and_label(
    distances: Tensor,  # [N, K] float32
) -> tuple[Tensor, Tensor]:  # margin [N] float32, label [N] int64
    """``margin = max_k distances``, ``label`` its argmax.

    Ties go to the lowest class. A row with a NaN has a NaN margin, and the lowest class that is NaN for its label.
    """
    margin = distances.amax(1)  # propagates NaN
    attains = (distances == margin[:, None]) | distances.isnan()
    return margin, attains.to(torch.uint8).argmax(1)


class Criterion(str, Enum):
    """What a gate makes of its K distances to say how sure it is; larger is surer, whatever the criterion.

    The paper's is the margin. The others are for heads trained with cross-entropy, as in BranchyNet (Teerapittayanon
    et al. 2016, section III), whose distances are logits.
    """

    MARGIN = "margin"
    """The largest distance, ``max_k d_k``."""
    SOFTMAX = "softmax"
    """The largest softmax probability, ``max_k softmax(d)_k``; from 1/K to 1.

    Float32 has few numbers close below 1: of samples that are nearly certain many are alike. Entropy tells them apart.
    """
    ENTROPY = "entropy"
    """The entropy of the softmax in nats, negated, ``sum_k p_k log p_k``; from ``-log K`` to 0."""


def confidence_and_label(
    distances: Tensor,  # [N, K] float32
    criterion: Criterion | str = Criterion.MARGIN,
) -> tuple[Tensor, Tensor]:  # confidence [N] float32, label [N] int64
    """What an exit compares with its threshold, and the label, which is that of `margin_and_label` for every criterion.

    A row with a NaN or ``+inf`` has no softmax: its confidence is NaN for those two criteria. A distance of ``-inf``
    has probability 0.
    """
    criterion = Criterion(criterion)
    margin, label = margin_and_label(distances)
    if criterion is Criterion.MARGIN:
        return margin, label
    shifted = distances - margin[:, None]
    weights = shifted.exp()
    total = weights.sum(1)
    if criterion is Criterion.SOFTMAX:
        return 1 / total, label
    weighted = torch.where(weights == 0, weights, weights * shifted).sum(1)  # 0 log 0 = 0
    return weighted / total - total.log(), label


def leaves(
    margin: Tensor,  # [N] float32
    threshold: Tensor | float,  # scalar
) -> Tensor:  # [N] bool
    """The exit rule (Algorithm 1, line 4): ``margin >= threshold`` and the margin is finite.

    A NaN or infinite margin never exits: it comes from a broken sample, which the whole network shall see.
    ``threshold = +inf`` therefore switches a gate off.
    """
    return (margin >= threshold) & margin.isfinite()


class Gate(nn.Module):
    """A decision gate: ``distances = weight @ pool(features) + bias`` in float32.

    The paper writes ``w^T x - b``; here the bias has the opposite sign, as in `torch.nn.Linear`.

    Args:
        width: length of the pooled feature vector, C.
        classes: number of classes, K; at least one.
        pool: see `Pool`.
        criterion: what the threshold is compared with, see `Criterion`.
    """

    weight: nn.Parameter  # [K, C] float32
    bias: nn.Parameter  # [K] float32

    def __init__(
        self, width: int, classes: int, pool: Pool | str = Pool.AVG, criterion: Criterion | str = Criterion.MARGIN
    ) -> None:
        super().__init__()
        if width < 1 or classes < 1:
            raise ValueError(f"width and classes must be at least 1, got width={width}, classes={classes}")
        self.pool = Pool(pool)
        self.criterion = Criterion(criterion)
        self.weight = nn.Parameter(torch.zeros(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes))

    @property
    def classes(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def forward(self, features: Tensor) -> Tensor:  # [N, K] float32
        """Signed distances to the one-vs-all hyperplanes; differentiable in weight and bias."""
        pooled = pool_features(features, self.pool)
        if pooled.shape[1] != self.width:
            got = f"{pooled.shape[1]} from shape {tuple(features.shape)}"
            raise ValueError(f"features: expected pooled width {self.width}, got {got}")
        return nn.functional.linear(pooled, self.weight.float(), self.bias.float())

    def score(
        self,
        features: Tensor,
        count: Tensor | None = None,  # [] int32, rows that are live
    ) -> tuple[Tensor, Tensor]:  # margin [N] float32, label [N] int64
        """Margin (by `criterion`) and label of every sample, through the fused operator (`ops.gate_score`)."""
        from dgate_rt import ops

        return ops.gate_score(features, self.weight.detach(), self.bias.detach(), self.pool, count, self.criterion)

    def distances(
        self, features: Tensor, count: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:  # margin [N] float32, label [N] int64, distances [N, K] float32
        """`score`, with the distances to all classes (`ops.gate_distances`)."""
        from dgate_rt import ops

        return ops.gate_distances(features, self.weight.detach(), self.bias.detach(), self.pool, count, self.criterion)

    def extra_repr(self) -> str:
        text = f"width={self.width}, classes={self.classes}, pool={self.pool.value!r}"
        return text if self.criterion is Criterion.MARGIN else f"{text}, criterion={self.criterion.value!r}"
