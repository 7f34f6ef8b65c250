"""Which gates pay: the worked sums, and against trying out every choice of gates."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgate_rt.accounts import accounts, without_losses

INF = math.inf


def test_a_gate_costs_all_who_come_and_spares_the_stages_up_to_the_next_and_that_gate():
    first, second = accounts((0.2, 0.0, 0.5, 0.3), (True, False, True), (1.0, 2.0, 4.0, 8.0), (0.1, 0.1, 0.3))
    assert (first.gate, first.reached, first.left) == (0, 1.0, 0.2)
    assert first.costs_ms == pytest.approx(0.1)
    assert first.saves_ms == pytest.approx(0.2 * (2 + 4 + 0.3))  # gate 1 is off
    assert second.reached == pytest.approx(0.8)
    assert second.costs_ms == pytest.approx(0.8 * 0.3)
    assert second.saves_ms == pytest.approx(0.5 * 8)
    assert first.pays
    assert second.pays


def test_a_gate_that_loses_goes_off_and_who_left_there_leaves_at_the_next():
    thresholds, shares = without_losses((0.5, 0.6, 0.7), (0.001, 0.4, 0.3, 0.299), (1, 1, 1, 1), (0.1, 0.1, 0.1))
    assert thresholds == (INF, 0.6, 0.7)
    assert shares == pytest.approx((0.0, 0.401, 0.3, 0.299))


def test_nothing_pays_where_gates_cost_more_than_stages():
    thresholds, shares = without_losses((0.5, 0.6), (0.5, 0.4, 0.1), (1, 1, 1), (9, 9))
    assert thresholds == (INF, INF)
    assert shares == pytest.approx((0.0, 0.0, 1.0))


def test_all_stay_on_where_all_pay():
    assert without_losses((0.5, INF), (0.5, 0.0, 0.5), (1, 1, 1), (0.1, 9)) == ((0.5, INF), (0.5, 0.0, 0.5))


def expected_ms(shares, on, stages, gates):
    """What a sample takes on average with some gates on, where the others' leave at the next that is."""
    total, alive, carried = 0.0, 1.0, 0.0
    for g, stage in enumerate(stages):
        total += alive * stage
        if g < len(on):
            carried += shares[g]
            if on[g]:
                total += alive * gates[g]
                alive, carried = alive - carried, 0.0
    return total


share, ms = st.floats(0.0, 1.0), st.floats(0.01, 10.0)


@given(data=st.data(), gates=st.integers(1, 4))
def test_what_is_left_pays_and_is_no_slower_than_all_gates(data, gates):
    raw = [data.draw(share) + 1e-6 for _ in range(gates + 1)]
    shares = [s / sum(raw) for s in raw]
    stages, costs = [data.draw(ms) for _ in range(gates + 1)], [data.draw(ms) for _ in range(gates)]
    thresholds, left = without_losses((0.0,) * gates, shares, stages, costs)
    on = [t != INF for t in thresholds]
    assert sum(left) == pytest.approx(1)
    assert all(account.pays for account in accounts(left, on, stages, costs))
    before, after = (expected_ms(shares, gates_on, stages, costs) for gates_on in ([True] * gates, on))
    assert after <= before + 1e-9
    best = min(expected_ms(shares, choice, stages, costs) for choice in itertools.product((True, False), repeat=gates))
    assert after >= best - 1e-9
