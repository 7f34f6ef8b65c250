"""The schedule loses nobody, never overfills an arena, keeps the order, and comes to an end."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dgate_rt.executors.scheduler import Schedule


class Simulation:
    """Samples that are numbers, arenas that are lists, and exits that a table decides."""

    def __init__(self, schedule, leaves):
        self.schedule, self.leaves = schedule, leaves
        self.arenas = [[] for _ in schedule.chunks]
        self.left, self.turns = {}, []

    def due(self, before):
        """How many of the samples below a number have not left."""
        return sum(sample < before for arena in self.arenas for sample in arena)

    def run(self, before=0):
        """Until no full chunk waits, and every sample below a number has left."""
        while (turn := self.schedule.next(list(map(len, self.arenas)), self.due(before))) is not None:
            step, count = turn
            self.turns.append((*turn, list(map(len, self.arenas))))
            assert 1 <= count <= len(self.arenas[step])
            taken, self.arenas[step] = self.arenas[step][:count], self.arenas[step][count:]
            for sample in taken:
                if step + 1 == len(self.arenas) or self.leaves(sample, step):
                    assert sample not in self.left
                    self.left[sample] = step
                else:
                    self.arenas[step + 1].append(sample)
            for arena, capacity in zip(self.arenas[1:], self.schedule.capacities[1:], strict=True):
                assert len(arena) <= capacity
            waiting = [sample for arena in reversed(self.arenas) for sample in arena]
            assert waiting == sorted(waiting)  # the oldest first and deepest, and none overtakes another


def schedules():
    def cuts(chunk):
        whole = st.none()
        drawn = st.tuples(*(st.integers(1, max(1, n)) for n in range(chunk)))
        return whole | drawn

    chunks = st.lists(st.integers(1, 12), min_size=1, max_size=6).map(tuple)
    return chunks.flatmap(lambda c: st.builds(Schedule, st.just(c), st.tuples(*map(cuts, c))))


@settings(max_examples=300)
@given(
    schedules(),
    st.lists(st.integers(0, 30), max_size=12),
    st.integers(0, 100),
    st.integers(0, 2**31),
    st.none() | st.integers(0, 5),
)
def test_every_sample_leaves_once_at_its_step_and_in_time_and_no_arena_overflows(
    schedule, arrivals, percent, seed, max_wait
):
    def leaves(sample, step):
        return hash((sample, step, seed)) % 100 < percent

    simulation = Simulation(schedule, leaves)
    count, begins = 0, []  # samples so far, and of each batch the first
    for arriving in arrivals:
        begins.append(count)
        while arriving:  # as much as the first arena takes
            taken = min(arriving, schedule.capacities[0] - len(simulation.arenas[0]))
            simulation.arenas[0] += range(count, count + taken)
            count, arriving = count + taken, arriving - taken
            simulation.run()
            assert all(len(a) < c for a, c in zip(simulation.arenas, schedule.chunks, strict=True))
        if max_wait is not None:
            due = [*begins, count][max(0, len(begins) - max_wait)]
            simulation.run(due)
            assert set(simulation.left) >= set(range(due))
    assert max_wait is not None or all(rows == schedule.chunks[step] for step, rows, _ in simulation.turns)
    simulation.run(count)
    assert not any(simulation.arenas)
    last = len(schedule.chunks) - 1
    expected = {s: next((step for step in range(last) if leaves(s, step)), last) for s in range(count)}
    assert simulation.left == expected


@given(schedules(), st.data())
def test_the_deepest_full_chunk_goes_first_then_what_is_due_from_the_front(schedule, data):
    waiting = [data.draw(st.integers(0, 2 * chunk)) for chunk in schedule.chunks]
    full = [step for step, chunk in enumerate(schedule.chunks) if waiting[step] >= chunk]
    oldest_first = [step for step in reversed(range(len(waiting))) for _ in range(waiting[step])]
    for due in range(len(oldest_first) + 2):
        turn = schedule.next(waiting, due)
        if full:
            assert turn == (full[-1], schedule.chunks[full[-1]])
        elif due == 0 or not any(waiting):
            assert turn is None
        else:
            step = min(oldest_first[:due])
            cut = schedule.cuts[step]
            assert turn == (step, waiting[step] if cut is None else cut[waiting[step]])


def test_an_arena_holds_what_is_short_of_a_chunk_and_a_chunk_of_the_step_before():
    assert Schedule((4, 16, 2), (None,) * 3).capacities == (4, 19, 17)


def test_a_chunk_goes_all_the_way_before_the_next_is_taken_in():
    schedule = Schedule((4, 4, 8), (None,) * 3)
    simulation = Simulation(schedule, lambda sample, step: False)
    simulation.arenas[0] += range(10)
    simulation.run()
    assert [turn[:2] for turn in simulation.turns] == [(0, 4), (1, 4), (0, 4), (1, 4), (2, 8)]
    simulation.run(10)
    assert [turn[:2] for turn in simulation.turns[5:]] == [(0, 2), (1, 2), (2, 2)]


def test_what_is_due_goes_all_the_way_with_what_waits_beside_it_and_the_rest_stays():
    schedule = Schedule((4, 4, 8, 8), (None,) * 4)
    simulation = Simulation(schedule, lambda sample, step: False)
    simulation.arenas = [[7, 8], [4, 5, 6], [1, 2, 3], [0]]
    simulation.run(2)  # samples 0 and 1
    assert [turn[:2] for turn in simulation.turns] == [(2, 3), (3, 4)]
    assert simulation.arenas == [[7, 8], [4, 5, 6], [], []]
