"""Stage times are measured at rising sizes, within a budget, and kept until something about them changes."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from captured_checks import program_of_several_tensors
from torch import nn

from dgate_rt import StagedModel, stage_times
from dgate_rt.cache import cache_dir as users_cache
from dgate_rt.chunks import StageTimes, plan_chunks
from dgate_rt.engines import prepare

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DGATE_RT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def staged_of(*widths):
    torch.manual_seed(0)
    return StagedModel([nn.Linear(a, b) for a, b in pairwise(widths)]).eval()


def measured(staged, shape=(4,), dtype=torch.float32, batch_size=8, **options):
    sizes = stage_times.sizes_up_to(batch_size)
    return stage_times.stage_times(staged, shape, dtype, CPU, False, sizes, **options)


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(1, (1,)), (2, (1, 2)), (7, (1, 2, 4, 7)), (64, (1, 2, 4, 8, 16, 32, 64))]
)
def test_sizes_are_powers_of_two_and_the_batch_size(batch_size, sizes):
    assert stage_times.sizes_up_to(batch_size) == sizes


class Opaque:
    """An engine that keeps nothing of the stages that it is given, as those outside of torch."""

    packages: tuple[str, ...] = ()

    def __init__(self):
        self.calls = 0

    def __call__(self, stage, example, sizes):
        def run(*tensors):
            self.calls += 1
            return stage(*tensors)

        return run


def on_engine(staged, engine):
    """Whether times were measured, not known, for a network on an engine."""
    ready = prepare(staged, engine, sizes=[1, 8], sample_shape=(4,))
    before = engine.calls
    stage_times.stage_times(ready, (4,), torch.float32, CPU, False, (1, 8), engine_id=ready.engine_id)
    return engine.calls > before


@pytest.mark.usefixtures("cache")
def test_networks_of_one_shape_are_told_apart_on_every_engine():
    first, second = staged_of(4, 4, 4), StagedModel([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())]).eval()
    engine = Opaque()
    assert [on_engine(staged, engine) for staged in (first, first, second, second)] == [True, False, True, False]


@pytest.mark.usefixtures("cache")
def test_times_of_an_engine_that_does_not_tell_its_packages_are_not_kept():
    engine = Opaque()
    engine.packages = None
    assert [on_engine(staged_of(4, 4), engine) for _ in range(2)] == [True, True]


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_stage_and_every_cut_is_timed(tiny_staged, channels_last):
    times = stage_times.measure_stage_times(tiny_staged, (3, 16, 16), torch.float32, CPU, channels_last, (1, 2, 4, 5))
    assert times.sizes == (1, 2, 4, 5)
    assert len(times.ms) == 4
    assert all(1 <= len(ms) <= 4 and min(ms) > 0 for ms in times.ms)
    assert len(times.regroup) == 3
    assert min(times.regroup) > 0


def test_stages_see_what_they_will_see():
    """Their layout, however many rows; and no stage that works in place spoils the input of the next round."""
    seen = []

    class Doubles(nn.Module):
        def forward(self, x):
            seen.append((len(x), x.is_contiguous(memory_format=torch.channels_last), float(x.abs().sum() / len(x))))
            return x.mul_(2)

    staged = StagedModel([nn.Conv2d(3, 5, 3), Doubles()]).eval().to(memory_format=torch.channels_last)
    stage_times.measure_stage_times(staged, (3, 8, 8), torch.float32, CPU, True, (1, 4, 8))
    assert {count for count, *_ in seen} == {1, 4, 8}
    assert all(channels_last for _, channels_last, _ in seen)
    assert len({round(total, 2) for count, _, total in seen if count == 8}) == 1


def test_several_tensors_and_whole_numbers_are_timed():
    program, _ = program_of_several_tensors()
    assert len(measured(program.staged).regroup) == 1
    tokens = StagedModel([nn.Sequential(nn.Embedding(1, 4), nn.Flatten()), nn.Linear(12, 3)]).eval()
    assert len(measured(tokens, (3,), torch.int64).ms) == 2


def test_a_stage_is_not_tried_at_larger_sizes_once_two_have_not_made_a_sample_cheaper(monkeypatch):
    sizes, tried = (1, 2, 4, 8, 16, 32), []
    a_sample = {1: 3.0, 2: 2.0, 4: 2.3, 8: 1.9, 16: 2.3, 32: 2.5}

    def fake(job):
        job()
        size = tried[-1] if tried else 1
        return a_sample[size] * size

    class Notes(nn.Module):
        def forward(self, x):
            tried.append(len(x))
            return x

    monkeypatch.setattr(stage_times, "_milliseconds", fake)
    times = stage_times.measure_stage_times(StagedModel([Notes()]).eval(), (2,), torch.float32, CPU, False, sizes)
    assert times.ms == (tuple(size * a_sample[size] for size in sizes),)
    a_sample[8] = 2.0
    times = stage_times.measure_stage_times(StagedModel([Notes()]).eval(), (2,), torch.float32, CPU, False, sizes)
    assert len(times.ms[0]) == 4
    assert times.sizes == sizes


def test_the_budget_bounds_sizes_and_rounds(monkeypatch):
    tried = []

    class Notes(nn.Module):
        def forward(self, x):
            tried.append(len(x))
            return x

    staged = StagedModel([Notes(), Notes()]).eval()
    monkeypatch.setattr(stage_times, "_grown_too_large", lambda least: False)
    times = stage_times.measure_stage_times(staged, (2,), torch.float32, CPU, False, (1, 2, 8), budget_s=0.0)
    assert set(tried) == {1, 4}  # 4: to make the inputs
    assert all(ms == pytest.approx((ms[0], 2 * ms[0], 8 * ms[0])) for ms in times.ms)  # guessed
    assert not times.complete
    tried.clear()
    times = stage_times.measure_stage_times(staged, (2,), torch.float32, CPU, False, (1, 2, 8))
    assert tried.count(2) == tried.count(8) == 2 * stage_times.ROUNDS
    assert [len(ms) for ms in times.ms] == [3, 3]
    assert times.complete


def test_sizes_that_memory_may_not_hold_are_not_tried(monkeypatch):
    tried = {"wide": [], "narrow": []}

    class Notes(nn.Module):
        def __init__(self, name: str, width: int) -> None:
            super().__init__()
            self.name, self.width = name, width

        def forward(self, x):
            tried[self.name].append(len(x))
            return x[:, :1].expand(-1, self.width).clone()

    monkeypatch.setattr(stage_times, "_LARGE", 16 * 4 * 8)  # bytes of 8 rows of 16
    monkeypatch.setattr(stage_times, "_grown_too_large", lambda least: False)
    staged = StagedModel([Notes("wide", 16), Notes("narrow", 2), Notes("narrow", 2)]).eval()
    times = stage_times.measure_stage_times(staged, (2,), torch.float32, CPU, False, (1, 8, 32))
    assert [len(ms) for ms in times.ms] == [2, 2, 3]  # the second takes what the first returns
    assert max(tried["wide"]) == 8
    assert times.complete
    assert [len(ms) for ms in times.at_all_sizes().ms] == [3, 3, 3]
    one = stage_times.measure_stage_times(staged, (2,), torch.float32, CPU, False, (32,))
    assert [len(ms) for ms in one.ms] == [1, 1, 1]  # an engine of one size runs at no other


def test_times_are_kept_and_read_again(cache, monkeypatch):
    staged = staged_of(4, 5, 3)
    first = measured(staged)
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["key"]["engine"] == "eager"
    monkeypatch.setattr(stage_times, "measure_stage_times", lambda *_: pytest.fail("measured again"))
    assert measured(staged) == first


def test_what_changes_the_times_is_measured_anew(cache, monkeypatch, threads):
    calls = []
    monkeypatch.setattr(
        stage_times, "measure_stage_times", lambda *a: calls.append(a) or StageTimes((1,), ((1.0,),), ())
    )
    staged = staged_of(4, 3)
    measured(staged)
    measured(staged)
    assert len(calls) == 1
    measured(staged_of(4, 4))
    measured(staged, batch_size=9)
    measured(staged, dtype=torch.bfloat16)
    measured(staged, shape=(2, 4))
    measured(staged, engine_id="another")
    stage_times.stage_times(staged, (4,), torch.float32, CPU, True, stage_times.sizes_up_to(8))
    threads(torch.get_num_threads() + 1)
    measured(staged)
    assert len(calls) == len(list(cache.iterdir())) == 8
    measured(staged, remeasure=True)
    assert len(calls) == 9


def test_what_was_guessed_is_not_kept_and_leads_to_large_chunks(cache, monkeypatch):
    staged = staged_of(4, 5, 3)
    monkeypatch.setattr(stage_times.time, "perf_counter", iter(range(0, 10**9, 100)).__next__)
    times = measured(staged)
    assert not times.complete
    assert not cache.exists()
    assert plan_chunks(times, [1.0, 0.5], [True], times.sizes[-1]).chunks == (times.sizes[-1],) * 2


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"key": 1, "times": {}}'])
def test_a_damaged_file_is_measured_again(cache, damage):
    staged = staged_of(4, 3)
    measured(staged)
    (file,) = cache.iterdir()
    found = json.loads(file.read_text())
    file.write_text(damage)
    measured(staged)
    assert json.loads(file.read_text())["key"] == found["key"]
    found["times"]["ms"] = "long"
    file.write_text(json.dumps(found))
    assert len(measured(staged).ms) == 1
    assert list(cache.iterdir()) == [file]


def test_where_nothing_can_be_written_it_is_measured_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DGATE_RT_CACHE", str(tmp_path / "file" / "cache"))
    assert len(measured(staged_of(4, 3)).ms) == 1


def test_the_users_own_directory_is_the_default(monkeypatch):
    monkeypatch.delenv("DGATE_RT_CACHE")
    assert "dgate_rt" in str(users_cache())
