"""The definitions: pooling, margin, ties, NaN, and the exit rule."""

from __future__ import annotations

import pytest
import torch

from dgate_rt import Gate, Pool
from dgate_rt.gate import leaves, margin_and_label, pool_features, pooled_width

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("shape", "pool", "width"),
    [
        ((2, 6, 3, 5), "avg", 6),
        ((2, 7, 6), "avg", 6),
        ((2, 6), "avg", 6),
        ((2, 7, 6), "cls", 6),
        ((2, 6, 3, 5), "flat", 90),
        ((2, 7, 6), "flat", 42),
        ((2, 6, 3, 5), "grid2", 24),
        ((0, 6, 3, 5), "grid4", 96),
        ((2, 6), "grid4", 6),
    ],
)
def test_pooled_width(shape, pool, width):
    assert pool_features(torch.randn(shape), pool).shape == (shape[0], width)
    assert pooled_width(shape[1:], pool) == width


def test_the_mean_is_taken_in_float32():
    features = torch.full((1, 1, 64, 64), 3.0, dtype=torch.float16)  # the sum, 12288, is beyond float16's integers
    features[0, 0, 0, 0] = 7.0
    assert pool_features(features).item() == pytest.approx(3 + 4 / 4096, rel=1e-6)


def test_a_grid_has_the_mean_of_each_cell_channel_after_channel():
    features = torch.arange(32.0).view(1, 2, 4, 4)
    assert pool_features(features, "grid2").tolist() == [[2.5, 4.5, 10.5, 12.5, 18.5, 20.5, 26.5, 28.5]]
    assert torch.equal(pool_features(features, "grid4"), features.flatten(1))
    assert pool_features(features[:, :, :1, :2], "grid2").tolist() == [[0.0, 1.0] * 2 + [16.0, 17.0] * 2]  # cells share


def test_cells_are_means_in_float32():
    features = torch.full((1, 1, 128, 128), 3.0, dtype=torch.float16)
    features[0, 0, 0, 0] = 7.0
    assert pool_features(features, "grid2")[0, 0].item() == pytest.approx(3 + 4 / 4096, rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 1, 1), (2, 3)], ids=str)
def test_tokens_and_single_elements_have_no_grid(shape):
    features = torch.randn(shape)
    assert torch.equal(pool_features(features, "grid2"), pool_features(features, "avg"))


def test_cls_of_an_image_is_refused():
    with pytest.raises(ValueError, match=r"pool='cls' expects rank 3, got shape \(2, 3, 4, 4\)"):
        pool_features(torch.zeros(2, 3, 4, 4), Pool.CLS)


def test_ties_go_to_the_lowest_class():
    margin, label = margin_and_label(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]))
    assert margin.tolist() == [2.0, 0.0, -1.0]
    assert label.tolist() == [1, 0, 0]


def test_a_nan_distance_makes_the_margin_nan():
    margin, label = margin_and_label(torch.tensor([[1.0, NAN, NAN], [INF, 0.0, NAN]]))
    assert margin.isnan().all()
    assert label.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("margin", "threshold", "exits"),
    [(1.0, 1.0, True), (0.999, 1.0, False), (NAN, -INF, False), (INF, 1.0, False), (INF, INF, False), (-5, -INF, True)],
)
def test_exit_rule(margin, threshold, exits):
    assert leaves(torch.tensor([float(margin)]), threshold).item() is exits


def test_margin_of_an_empty_batch():
    margin, label = margin_and_label(torch.empty(0, 4))
    assert margin.shape == label.shape == (0,)


def test_gate_is_a_linear_layer_over_pooled_features():
    gate = Gate(6, 4)
    torch.nn.init.normal_(gate.weight)
    torch.nn.init.normal_(gate.bias)
    features = torch.randn(3, 6, 2, 2)
    expected = torch.nn.functional.linear(features.mean((2, 3)), gate.weight, gate.bias)
    torch.testing.assert_close(gate(features), expected)
    margin, label = gate.score(features)
    torch.testing.assert_close(margin, expected.max(1).values)
    assert torch.equal(label, expected.argmax(1))
    gate(features).sum().backward()
    assert gate.weight.grad is not None


@pytest.mark.parametrize(("width", "classes"), [(0, 3), (3, 0)])
def test_a_gate_without_classes_or_width_is_refused(width, classes):
    with pytest.raises(ValueError, match="at least 1"):
        Gate(width, classes)


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match="expected pooled width 6, got 5"):
        Gate(6, 4)(torch.zeros(2, 5, 1, 1))
