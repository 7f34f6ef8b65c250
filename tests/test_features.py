"""Collecting pooled features: what a loader may give, and caches that survive interruption."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dgate_rt.features import SKIP, DiskCache, FeatureCache, batch_hash, collect, frozen
from dgate_rt.gate import pool_features
from dgate_rt.progress import length_of, track
from dgate_rt.staged import StagedModel

CLASSES = 3


class Counting(nn.Module):
    """Counts the samples that pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.samples = 0

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return self.inner(x)


def make_staged(classes: int = CLASSES) -> StagedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        block = nn.Sequential(
            nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        )
        head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 9, classes))
        return StagedModel(stages=[Counting(stem), block, head]).eval()


def make_batches(sizes: tuple[int, ...] = (8, 8, 8, 3), seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 2, 8, 8, generator=generator), torch.randint(CLASSES, (n,), generator=generator)) for n in sizes
    ]


def make_cache(path: Path | None, staged: StagedModel, pool: str = "avg", limit_gb: float = 1.0) -> FeatureCache:
    if path is None:
        return FeatureCache(limit_gb)
    return DiskCache(path, limit_gb, {"fingerprint": staged.fingerprint(), "cuts": list(staged.cuts), "pool": pool})


def gather(staged: StagedModel, loader, path: Path | None = None, pool: str = "avg", limit_gb: float = 1.0):  # type: ignore[no-untyped-def]
    cache = make_cache(path, staged, pool, limit_gb)
    try:
        return collect(staged, loader, cache, pool=pool)
    finally:
        cache.close()


def assert_same(found, expected) -> None:  # type: ignore[no-untyped-def]
    assert torch.equal(found.labels, expected.labels)
    for one, other in zip(found.gates, expected.gates, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(params=["memory", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "cache" if request.param == "disk" else None


@pytest.mark.parametrize("pool", ["avg", "flat"])
def test_features_are_the_pooled_boundaries_in_order(place: Path | None, pool: str) -> None:
    staged, batches = make_staged(), make_batches()
    found = gather(staged, batches, place, pool)
    expected: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for x, _ in batches:
            for index, boundary in enumerate(staged.boundaries(x.clone())):
                if index < 2:
                    expected[index].append(pool_features(boundary, pool).clone())
    for rows, parts in zip(found.gates, expected, strict=True):
        assert torch.equal(rows, torch.cat(parts))
    assert torch.equal(found.labels, torch.cat([y for _, y in batches]))
    assert found.classes == CLASSES


def test_inputs_are_not_written_to() -> None:
    staged = StagedModel(stages=[nn.ReLU(inplace=True), nn.ReLU(inplace=True), nn.Linear(5, 2)])
    x = torch.randn(4, 5)
    before = x.clone()
    gather(staged, [(x, torch.zeros(4, dtype=torch.long))])
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", ["generator", "dataloader", "numpy", "int32 labels", "listed labels", "empty batches"])
def test_any_iterable_of_pairs(kind: str) -> None:
    staged, batches = make_staged(), make_batches()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loader = {
        "generator": lambda: (pair for pair in batches),
        "dataloader": lambda: DataLoader(TensorDataset(x, y), batch_size=8),
        "numpy": lambda: [(a.numpy(), b.numpy()) for a, b in batches],
        "int32 labels": lambda: [(a, b.int()) for a, b in batches],
        "listed labels": lambda: [[a, b.tolist()] for a, b in batches],
        "empty batches": lambda: [(x[:0], y[:0]), *batches, (x[:0], y[:0])],
    }[kind]()
    assert_same(gather(staged, loader), gather(staged, batches))


def pair(x: object = None, y: object = None) -> tuple[object, object]:
    good_x, good_y = make_batches((4,))[0]
    return good_x if x is None else x, good_y if y is None else y


@pytest.mark.parametrize(
    ("item", "error", "words"),
    [
        pytest.param(pair(y=torch.rand(4)), TypeError, ["batch 1", "integer", "float32"], id="float y"),
        pytest.param(pair(y=torch.ones(4, dtype=torch.bool)), TypeError, ["integer", "bool"], id="bool y"),
        pytest.param(pair(y=["a", "b", "c", "d"]), TypeError, ["x and y", "numbers"], id="words as y"),
        pytest.param(pair(y=torch.zeros(4, 1, dtype=torch.long)), ValueError, ["y [N]", "(4, 1)"], id="y of rank 2"),
        pytest.param(pair(y=torch.zeros(5, dtype=torch.long)), ValueError, ["(5,)", "(4, 2, 8, 8)"], id="y too long"),
        pytest.param(
            pair(y=torch.tensor([0, 1, 2, 3])), ValueError, ["0..2", "3 classes", "0..3"], id="label too high"
        ),
        pytest.param(pair(y=torch.tensor([0, -1, 2, 2])), ValueError, ["0..2", "-1..2"], id="label negative"),
        pytest.param(
            pair(x=torch.rand(4, 8)), ValueError, ["stage 0", "(4, 8)", "Expected 3D (unbatched) or 4D"], id="x rank"
        ),
        pytest.param(pair(x=torch.rand(4, 5, 8, 8)), ValueError, ["stage 0", "2 channels"], id="x channels"),
        pytest.param(pair(x=torch.rand(4, 2, 8, 8).double()), ValueError, ["stage 0", "float64"], id="x dtype"),
        pytest.param((torch.rand(4, 2, 8, 8),), TypeError, ["pair (x, y)", "of 1"], id="no y"),
        pytest.param({"x": 1}, TypeError, ["pair (x, y)", "dict"], id="a dict"),
    ],
)
def test_bad_batches_are_named(item: object, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        gather(make_staged(), [make_batches()[0], item])
    for word in ["loader", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("loader", [[], iter(()), [(torch.empty(0, 2, 8, 8), torch.empty(0).long())]])
def test_a_loader_that_gives_nothing_is_refused(loader: object) -> None:
    with pytest.raises(ValueError, match="loader: expected batches"):
        gather(make_staged(), loader)


def test_a_used_up_generator_is_refused() -> None:
    staged, used = make_staged(), iter(make_batches())
    gather(staged, used)
    with pytest.raises(ValueError, match="only once"):
        gather(staged, used)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits .* one class or more .* got shape \(1, 0\)"):
        gather(StagedModel(stages=[nn.ReLU(), nn.Linear(5, 0)]), [(torch.rand(2, 5), [0, 0])])


def test_samples_that_are_not_finite_are_marked(place: Path | None) -> None:
    staged, batches = make_staged(), make_batches()
    expected = gather(staged, batches)
    batches[1][0][2, 0, 3, 3] = float("nan")
    batches[2][0][5, 1, 0, 0] = float("inf")
    found = gather(staged, batches, place)
    marked = found.labels == SKIP
    assert marked.nonzero()[:, 0].tolist() == [8 + 2, 16 + 5]
    assert torch.equal(found.labels[~marked], expected.labels[~marked])
    assert torch.equal(found.gates[1][~marked], expected.gates[1][~marked])


@pytest.mark.parametrize("sized", [True, False], ids=["length known", "length unknown"])
def test_a_cache_keeps_its_bound(place: Path | None, sized: bool) -> None:
    staged, batches = make_staged(), make_batches((8,) * 10)
    limit_gb = 30 * ((4 + 6) * 4 + 8) / 1e9  # 30 samples
    with pytest.raises(ValueError, match=r"cache_gb: \d+ samples of 48 bytes need .* GB or more, got cache_gb=.*raise"):
        gather(staged, batches if sized else iter(batches), place, limit_gb=limit_gb)
    computed = staged.stages[0].samples - 1  # one to count the classes
    assert computed == (8 if sized else 32)
    staged.stages[0].samples = 0
    gather(staged, batches[:3], place, limit_gb=limit_gb)


def fresh(staged: StagedModel, loader, path: Path):  # type: ignore[no-untyped-def]
    """Collect, and say how many samples the backbone saw."""
    staged.stages[0].samples = 0
    found = gather(staged, loader, path)
    return found, staged.stages[0].samples


def test_a_second_pass_computes_nothing(tmp_path: Path) -> None:
    staged, batches = make_staged(), make_batches()
    expected, first = fresh(staged, batches, tmp_path)
    found, second = fresh(staged, batches, tmp_path)
    assert (first, second) == (27 + 1, 0)
    assert_same(found, expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pass_is_resumed(tmp_path: Path, error: type[BaseException]) -> None:
    staged, batches = make_staged(), make_batches()

    def breaks() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches[:2]
        raise error

    with pytest.raises(error):
        gather(staged, breaks(), tmp_path)
    found, computed = fresh(staged, batches, tmp_path)
    assert computed == 8 + 3
    assert_same(found, gather(staged, batches))


@pytest.mark.parametrize("file", ["gate0.f32", "gate1.f32", "labels.i64", "batches.jsonl"])
@pytest.mark.parametrize("written", [0.0, 0.5], ids=["nothing", "half"])
def test_an_interruption_between_any_two_writes_is_resumed(tmp_path: Path, file: str, written: float) -> None:
    """The state after the first two batches, and the files of the third up to and with a part of ``file``."""
    staged, batches = make_staged(), make_batches()
    order = ["gate0.f32", "gate1.f32", "labels.i64", "batches.jsonl"]
    two, three = tmp_path / "two", tmp_path / "three"
    gather(staged, batches[:2], two)
    gather(staged, batches[:3], three)
    for name in order[: order.index(file)]:
        shutil.copy(three / name, two / name)
    before, after = (two / file).read_bytes(), (three / file).read_bytes()
    (two / file).write_bytes(after[: len(before) + int(written * (len(after) - len(before)))])
    found, computed = fresh(staged, batches, two)
    assert computed == 8 + 3
    assert_same(found, gather(staged, batches))
    assert_same(fresh(staged, batches, two)[0], found)


@pytest.mark.parametrize("file", ["gate0.f32", "gate1.f32", "labels.i64", "batches.jsonl"])
@pytest.mark.parametrize("kept", [0.0, 0.4, 0.99], ids=["emptied", "cut", "nicked"])
def test_a_truncated_file_costs_only_its_batches(tmp_path: Path, file: str, kept: float) -> None:
    staged, batches = make_staged(), make_batches((8, 8, 8, 8))
    expected = gather(staged, batches, tmp_path)
    expected = type(expected)([rows.clone() for rows in expected.gates], expected.labels.clone(), expected.classes)
    os.truncate(tmp_path / file, int(kept * (tmp_path / file).stat().st_size))
    found, computed = fresh(staged, batches, tmp_path)
    assert computed == {0.0: 32, 0.4: 24, 0.99: 8}[kept]
    assert_same(found, expected)


def test_a_missing_data_file_is_computed_again(tmp_path: Path) -> None:
    staged, batches = make_staged(), make_batches()
    gather(staged, batches, tmp_path)
    (tmp_path / "gate1.f32").unlink()
    found, computed = fresh(staged, batches, tmp_path)
    assert computed == 27
    assert_same(found, gather(staged, batches))


@pytest.mark.parametrize("change", ["x", "y", "shape"])
def test_a_batch_that_differs_is_computed_again_with_all_after_it(tmp_path: Path, change: str) -> None:
    staged, batches = make_staged(), make_batches()
    gather(staged, batches, tmp_path)
    x, y = batches[1]
    batches[1] = {"x": (x + 1, y), "y": (x, (y + 1) % CLASSES), "shape": (x[:5], y[:5])}[change]
    found, computed = fresh(staged, batches, tmp_path)
    assert computed == sum(len(y) for _, y in batches[1:])
    assert_same(found, gather(staged, batches))


def test_a_shorter_loader_uses_a_part_and_keeps_the_rest(tmp_path: Path) -> None:
    staged, batches = make_staged(), make_batches()
    gather(staged, batches, tmp_path)
    found, computed = fresh(staged, batches[:2], tmp_path)
    assert (len(found.labels), computed) == (16, 0)
    assert fresh(staged, batches, tmp_path)[1] == 0


@pytest.mark.parametrize("change", ["backbone", "pool", "cuts", "schema", "format", "widths"])
def test_a_foreign_cache_is_refused_and_kept(tmp_path: Path, change: str) -> None:
    staged, batches = make_staged(), make_batches()
    gather(staged, batches, tmp_path)
    header = json.loads((tmp_path / "header.json").read_text())
    pool = "flat" if change == "pool" else "avg"
    if change == "backbone":
        staged.stages[0].inner[0].weight.data[0, 0, 0, 0] += 1
    elif change == "cuts":
        staged.cuts = ("one", "two")
    elif change == "widths":
        (tmp_path / "header.json").write_text(json.dumps({**header, "widths": [4, 7]}))
    elif change != "pool":
        (tmp_path / "header.json").write_text(json.dumps({**header, change: "another"}))
    word = "fingerprint" if change == "backbone" else change
    content = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"cache: .*expected {word} .*, got .*delete it or give another directory"):
        gather(staged, make_batches(seed=1), tmp_path, pool)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == content


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"format": "dgate_rt pooled features"}', "\xff"])
def test_a_damaged_header_is_refused(tmp_path: Path, text: str) -> None:
    staged = make_staged()
    gather(staged, make_batches(), tmp_path)
    (tmp_path / "header.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"cache: .*header\.json is damaged|expected schema"):
        make_cache(tmp_path, staged)


def test_a_lost_header_and_a_file_for_a_directory_are_refused(tmp_path: Path) -> None:
    staged = make_staged()
    gather(staged, make_batches(), tmp_path / "cache")
    (tmp_path / "cache" / "header.json").unlink()
    with pytest.raises(ValueError, match=r"no header\.json"):
        make_cache(tmp_path / "cache", staged)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a directory"):
        make_cache(tmp_path / "file", staged)


def test_the_hash_sees_dtype_shape_bytes_and_labels() -> None:
    x, y = torch.arange(12.0).reshape(3, 4), torch.tensor([0, 1, 2])
    variants = [(x, y), (x.reshape(3, 2, 2), y), (x.int(), y), (x + 1, y), (x, y + 1), (x.bfloat16(), y)]
    assert len({batch_hash(*variant) for variant in variants}) == len(variants)
    assert batch_hash(x.T.contiguous().T, y) == batch_hash(x, y)


def test_frozen_restores_every_flag_when_interrupted() -> None:
    staged = make_staged()
    staged.train()
    staged.stages[1].eval()
    next(staged.parameters()).requires_grad_(False)

    def flags() -> list[bool]:
        return [part.training for part in staged.modules()] + [p.requires_grad for p in staged.parameters()]

    def interrupted() -> None:
        with frozen(staged):
            assert not any(part.training for part in staged.modules())
            staged.requires_grad_(True)
            raise KeyboardInterrupt

    before = flags()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert flags() == before


def test_track_is_transparent_and_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(5), "five")) == list(track(iter(range(5)), "five", enabled=False)) == list(range(5))
    assert capsys.readouterr() == ("", "")
    assert (length_of([1, 2]), length_of(iter([1]))) == (2, None)


def test_track_shows_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(track(iter(range(3)), "three things", total=3)) == [0, 1, 2]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "three things" in printed.err
    assert "3/3" in printed.err


def test_memory_maps_hold_what_was_written(tmp_path: Path) -> None:
    staged, batches = make_staged(), make_batches()
    found = gather(staged, batches, tmp_path)
    stored = np.fromfile(tmp_path / "gate0.f32", np.float32).reshape(27, 4)
    assert np.array_equal(found.gates[0].numpy(), stored)
    found.gates[0].zero_()
    assert np.array_equal(np.fromfile(tmp_path / "gate0.f32", np.float32).reshape(27, 4), stored)
