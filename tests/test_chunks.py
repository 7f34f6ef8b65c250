"""Chunks and cuts are the best there are, and samples wait for each other only where that pays."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgate_rt.chunks import StageTimes, cut_up, plan_chunks, worthwhile_chunks
from dgate_rt.plan import binomial_arrivals

RESNET101 = StageTimes(  # ms of a whole batch, eager float32 on two cores, by stage
    (1, 4, 8, 16, 32, 64),
    tuple(
        tuple(round(size * ms, 2) for size, ms in zip((1, 4, 8, 16, 32, 64), stage, strict=True))
        for stage in (
            (3.19, 2.34, 2.78, 2.93, 4.51, 6.26),
            (4.79, 2.98, 2.78, 2.77, 3.11, 4.54),
            (28.5, 17.0, 13.9, 12.6, 12.4, 12.6),
            (10.6, 4.78, 3.93, 3.12, 2.74, 2.57),
        )
    ),
    (0.3, 0.15, 0.08),
)


def partitions(n, largest=None):
    """All ways to write n as a sum, whatever the order."""
    if n == 0:
        yield ()
    for first in range(min(n, largest or n), 0, -1):
        for rest in partitions(n - first, first):
            yield (first, *rest)


def milliseconds(low=0.0):
    return st.floats(low, 100, allow_subnormal=False)


@given(st.lists(milliseconds(), min_size=1, max_size=9))
def test_no_other_way_to_cut_up_a_remainder_is_cheaper(drawn):
    times = np.array([0.0, *drawn])
    cuts, left = cut_up(times)
    for n in range(len(times)):
        assert left[n] == pytest.approx(min(sum(times[list(pieces)]) for pieces in partitions(n)), abs=1e-9)
        rest, spent = n, 0.0
        while rest:
            assert 1 <= cuts[rest] <= rest
            spent, rest = spent + times[cuts[rest]], rest - cuts[rest]
        assert spent == pytest.approx(left[n], abs=1e-9)


def test_of_ways_that_cost_the_same_the_one_with_the_largest_piece_is_taken():
    cuts, _ = cut_up(np.arange(6.0))
    assert cuts.tolist() == [0, 1, 2, 3, 4, 5]


def test_times_between_the_measured_sizes():
    times = StageTimes((1, 2, 4), ((3.0, 4.0, 8.0), (1.0, 1.0)), (0.0,))
    assert times.table([0]).tolist() == [0, 3, 4, 6, 8]
    assert times.table([0], padded=True).tolist() == [0, 3, 4, 8, 8]
    assert times.table([0, 1]).tolist() == [0, 4, 5]  # as far as both were measured


def cost(times, reach, gated, batch_size, chunks, padded):
    """The expected time of a sample, straight from the formula."""
    total = 0.0
    for stage, chunk in enumerate(chunks):
        table = times.table([stage], padded)
        left = [min(sum(table[list(pieces)]) for pieces in partitions(n)) for n in range(chunk)]
        for n, probability in enumerate(binomial_arrivals(batch_size, reach[stage])):
            total += probability * (n // chunk * table[chunk] + left[n % chunk]) / batch_size / 2
        total += reach[stage] * table[chunk] / chunk / 2
        if stage and not gated[stage - 1] and chunks[stage - 1] % chunk:
            total += reach[stage] * times.regroup[stage - 1]
    return total


@st.composite
def measured(draw):
    stages = draw(st.integers(1, 3))
    sizes = sorted(draw(st.sets(st.integers(2, 9), max_size=3)) | {1})
    ms = [draw(st.lists(milliseconds(), min_size=1, max_size=len(sizes))) for _ in range(stages)]
    regroup = draw(st.lists(milliseconds(), min_size=stages - 1, max_size=stages - 1))
    return StageTimes(tuple(sizes), tuple(map(tuple, ms)), tuple(regroup))


@settings(max_examples=60)
@given(measured(), st.data(), st.booleans(), st.integers(1, 12))
def test_no_other_chunks_are_cheaper(times, data, padded, batch_size):
    stages = len(times.ms)
    shares = data.draw(st.lists(st.floats(0, 1), min_size=stages - 1, max_size=stages - 1))
    reach = [1.0, *np.cumprod(shares)]
    gated = data.draw(st.lists(st.booleans(), min_size=stages - 1, max_size=stages - 1))
    plan = plan_chunks(times, reach, gated, batch_size, padded)
    assert sum(plan.expected) == pytest.approx(cost(times, reach, gated, batch_size, plan.chunks, padded), abs=1e-9)
    candidates = itertools.product(*(times.sizes[: len(ms)] for ms in times.ms))
    least = min(cost(times, reach, gated, batch_size, chunks, padded) for chunks in candidates)
    assert sum(plan.expected) == pytest.approx(least, abs=1e-9)


def test_each_stage_of_the_measured_network_gets_its_own_size():
    assert plan_chunks(RESNET101, [1.0, 0.8, 0.5, 0.25], [True] * 3, 64).chunks == (4, 16, 64, 64)
    # with no gate to pack them, to copy the maps behind the first stage costs more than its neighbour would gain
    assert plan_chunks(RESNET101, [1.0] * 4, [False] * 3, 64).chunks == (4, 4, 32, 64)


def test_where_regrouping_does_not_pay_there_is_one_chunk():
    dear = StageTimes(RESNET101.sizes, RESNET101.ms, (100.0,) * 3)
    chunks = plan_chunks(dear, [1.0] * 4, [False] * 3, 64).chunks
    assert all(before % chunk == 0 for before, chunk in itertools.pairwise(chunks))
    gated = plan_chunks(dear, [1.0, 0.8, 0.5, 0.25], [True] * 3, 64).chunks  # survivors are packed anyway
    assert gated == plan_chunks(RESNET101, [1.0, 0.8, 0.5, 0.25], [True] * 3, 64).chunks


def test_chunks_are_left_alone_where_they_save_little():
    reach, gated = [1.0, 0.8, 0.5, 0.25], [True] * 3
    whole = RESNET101.at_all_sizes()
    assert worthwhile_chunks(whole, reach, gated, 64) == plan_chunks(whole, reach, gated, 64)  # saves a quarter
    guessed = replace(whole, complete=False)
    assert worthwhile_chunks(guessed, reach, gated, 64).chunks == (64,) * len(reach)
    flat = StageTimes((1, 8, 64), ((2.0, 8.0, 64.0), (2.0, 8.0, 66.0), (9.0, 20.0, 64.0)), (0.0, 0.0))
    plan = worthwhile_chunks(flat, [1.0, 0.5, 0.5], [True] * 2, 64)
    assert plan.chunks == (64, 64, 64)
    assert sum(plan.expected) < 1.05 * sum(plan_chunks(flat, [1.0, 0.5, 0.5], [True] * 2, 64).expected)


def test_batches_that_are_not_small_are_cut_up_where_that_costs_next_to_nothing():
    """Or the memory of a batch would grow with it."""
    sizes = (1, 16, 64, 256, 1024)
    level = StageTimes(sizes, ((5.0, *(float(n) for n in sizes[1:])),) * 3, (0.1, 0.1))
    for batch_size, chunk in ((1, 1), (16, 16), (64, 64), (256, 64), (1024, 64)):
        count = sizes.index(batch_size) + 1
        measured = StageTimes(sizes[:count], tuple(ms[:count] for ms in level.ms), (0.1, 0.1))
        assert worthwhile_chunks(measured, [1.0] * 3, [False] * 2, batch_size).chunks == (chunk,) * 3
    falling = StageTimes(sizes, ((5.0, 16.0, 60.0, 220.0, 870.0),) * 3, (0.1, 0.1))  # 256 is within 2 % of 1024
    assert worthwhile_chunks(falling, [1.0] * 3, [False] * 2, 1024).chunks == (256,) * 3


def test_sizes_that_were_not_tried_cost_a_sample_what_the_last_did():
    times = StageTimes((1, 2, 4), ((3.0, 4.0, 8.0), (1.0, 1.0), (5.0,)), (0.0, 0.0)).at_all_sizes()
    assert times.ms == ((3.0, 4.0, 8.0), (1.0, 1.0, 2.0), (5.0, 10.0, 20.0))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="reach and gated: expected 4 shares and 3 gates, got 3 and 3"):
        plan_chunks(RESNET101, [1.0] * 3, [True] * 3, 64)
