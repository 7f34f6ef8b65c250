"""Data sets: the same bits for a seed, no digit in two splits, and errors that say what is missing."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from dgate_rt import clutter, data


@pytest.fixture(scope="module")
def cluttered() -> data.DataBundle:
    return data.load("cluttered-mnist", renderings=1)


@pytest.fixture(scope="module")
def digits28() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (40, 28, 28), np.uint8)


def _pixels(bundle: data.DataBundle, split: str) -> torch.Tensor:
    return bundle.dataset(split).images


# Cluttered MNIST ------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_bits_everywhere(digits28):
    """The digest was written down once: no machine, thread count or later version may change the images."""
    rendering = clutter.render(digits28, np.arange(40) % 10, 3, 7)
    assert hashlib.sha256(rendering.images.tobytes()).hexdigest() == (
        "700562e6497fabb8b7bc1e962bec7425caa2ffbb13b2c233a3f3887b2d6d285a"
    )
    again = clutter.render(digits28, np.arange(40) % 10, 3, 7)
    assert np.array_equal(rendering.images, again.images)
    assert np.array_equal(rendering.difficulty, again.difficulty)
    assert not np.array_equal(rendering.images, clutter.render(digits28, np.arange(40) % 10, 3, 8).images)


def test_no_source_digit_is_in_two_splits(cluttered):
    sources = {split: set(cluttered.sources[split].tolist()) for split in data.SPLITS}
    assert [len(sources[split]) for split in data.SPLITS] == [3000, 750, 1250]
    assert len(set.union(*sources.values())) == 5000


@pytest.mark.parametrize("split", data.SPLITS)
def test_splits_are_stratified(cluttered, split):
    counts = torch.bincount(cluttered.dataset(split).labels)
    assert len(counts) == 10
    assert counts.min() == counts.max()


def test_evaluation_images_do_not_depend_on_the_number_of_training_renderings(cluttered):
    more = data.load("cluttered-mnist", renderings=2)
    assert len(more.train) == 2 * len(cluttered.train) == 6000
    assert torch.equal(_pixels(more, "test"), _pixels(cluttered, "test"))


def test_the_seed_moves_digits_between_splits(cluttered):
    other = data.load("cluttered-mnist", renderings=1, seed=1)
    assert set(other.sources["test"].tolist()) != set(cluttered.sources["test"].tolist())


def test_cluttered_images_are_normalised_float32(cluttered):
    x, y = next(iter(cluttered.loader("test", 5000)))
    assert x.shape == (5000, 1, 32, 32) == (5000, *cluttered.image_shape)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert abs(x.mean()) < 0.1
    assert abs(x.std() - 1) < 0.1


def test_harder_images_are_further_from_the_clean_digit(cluttered):
    """Sorted by difficulty, each fifth of the images holds more noise and clutter than the fifth before."""
    difficulty, images = cluttered.difficulty["test"], _pixels(cluttered, "test")[:, 0].float()
    assert 0 <= difficulty.min() <= difficulty.max() <= 1
    border = images[:, :3].mean((1, 2)) + images[:, -3:].mean((1, 2))  # where a clean digit has no ink
    fifths = [part.mean().item() for part in border[difficulty.argsort()].chunk(5)]
    assert fifths == sorted(fifths)
    assert fifths[-1] > 5 * max(fifths[0], 1)


def test_an_easy_image_is_nearly_the_digit():
    """With no difficulty, only a small turn, zoom and shift remain: the mean brightness is kept."""
    square = np.zeros((1, 28, 28), np.uint8)
    square[0, 8:20, 8:20] = 255
    image = clutter._render_chunk(np.random.default_rng(0), square, np.zeros(64, np.int64), np.zeros(64))
    assert image.max() == 255
    assert np.allclose(image.sum((1, 2)), square.sum(), rtol=0.15)
    assert not image[:, :4].any()


@pytest.mark.parametrize(
    ("digits", "labels", "renderings", "names"),
    [
        pytest.param(np.zeros((2, 28, 28)), np.zeros(2, int), 1, "digits", id="float"),
        pytest.param(np.zeros((2, 27, 28), np.uint8), np.zeros(2, int), 1, "digits", id="shape"),
        pytest.param(np.zeros((0, 28, 28), np.uint8), np.zeros(0, int), 1, "digits", id="empty"),
        pytest.param(np.zeros((2, 28, 28), np.uint8), np.zeros(3, int), 1, "labels", id="labels"),
        pytest.param(np.zeros((2, 28, 28), np.uint8), np.zeros(2, int), 0, "renderings", id="no-renderings"),
    ],
)
def test_render_names_the_bad_argument(digits, labels, renderings, names):
    with pytest.raises(ValueError, match=rf"^{names}: expected"):
        clutter.render(digits, labels, renderings, 0)


# Loaders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "shape", "counts"),
    [
        pytest.param("digits", None, (1, 8, 8), 1797, id="digits"),
        pytest.param("digits", 32, (1, 32, 32), 1797, id="digits-32"),
        pytest.param("mnist", None, (1, 28, 28), 5000, id="mnist"),
        pytest.param("mnist", 32, (1, 32, 32), 5000, id="mnist-32"),
    ],
)
def test_small_sets(name, size, shape, counts):
    bundle = data.load(name, image_size=size)
    assert bundle.image_shape == shape
    assert bundle.classes == tuple("0123456789")
    assert sum(len(bundle.dataset(split)) for split in data.SPLITS) == counts
    x, _ = next(iter(bundle.loader("train", 10_000)))
    assert x.shape[1:] == shape
    assert abs(x.mean()) < 0.1
    assert 0.8 < x.std() < 1.2


def test_images_are_normalised_as_asked(cifar_root, tmp_path):
    """One mean and deviation serve all channels; for bytes in memory and for files alike."""
    _write_images(tmp_path / "photos" / "train", ("cat", "dog"), 10)
    _write_images(tmp_path / "photos" / "val", ("cat", "dog"), 2)
    half = ((0.5,), (0.5,))
    for arguments in (
        {"name": "digits"},
        {"name": "cifar10", "root": cifar_root},
        {"name": "folder", "root": tmp_path / "photos"},
    ):
        own, asked = data.load(**arguments), data.load(**arguments, stats=half)
        channels = own.image_shape[0]
        mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in own.stats)
        white = own.test[0][0] * deviation + mean
        torch.testing.assert_close(asked.test[0][0], (white - 0.5) / 0.5)
        assert asked.stats == ((0.5,) * channels, (0.5,) * channels)


def test_loader_yields_every_sample_once():
    bundle = data.load("digits")
    expected = bundle.train.labels.sort().values
    for shuffle in (False, True):
        batches = list(bundle.loader("train", 100, shuffle=shuffle))
        assert [len(y) for _, y in batches] == [100] * 10 + [len(bundle.train) - 1000]
        assert torch.equal(torch.cat([y for _, y in batches]).sort().values, expected)


def test_one_row_is_the_same_as_a_batch_of_it():
    dataset = data.load("digits").test
    x, y = dataset[5]
    xs, ys = dataset[[4, 5]]
    assert torch.equal(x, xs[1])
    assert y == ys[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_seed_fixes_the_order(workers):
    bundle = data.load("digits")
    first, second = (torch.cat([y for _, y in bundle.loader("train", 64, True, workers, seed=3)]) for _ in range(2))
    other = torch.cat([y for _, y in bundle.loader("train", 64, True, workers, seed=4)])
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_augmentation_moves_each_image_and_never_mirrors_a_digit():
    """One bright pixel in the upper left corner stays within 4 pixels of it: shifted, or out of the picture."""
    images = torch.zeros(200, 1, 16, 16, dtype=torch.uint8)
    images[:, :, 3, 5] = 255
    dataset = data.ArrayDataset(images, torch.zeros(200, dtype=torch.long), ((0.0,), (1.0,)), crop=True)
    x, _ = dataset[list(range(200))]
    where = x.nonzero()[:, 2:] - torch.tensor([3, 5])
    assert where.abs().max() == 4
    assert len(where.unique(dim=0)) > 30
    flipped, _ = data.ArrayDataset(images, dataset.labels, ((0.0,), (1.0,)), flip=True)[list(range(200))]
    assert set(flipped.nonzero()[:, 3].tolist()) == {5, 10}


def test_augmented_loader_differs_from_plain(cluttered):
    plain, augmented = (next(iter(cluttered.loader("train", 32, augment=a)))[0] for a in (False, True))
    assert plain.shape == augmented.shape
    assert not torch.equal(plain, augmented)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("tests", 8), "split: expected one of train, val, test, got 'tests'", id="split"),
        pytest.param(("train", 0), "batch_size: expected at least 1, got 0", id="batch"),
        pytest.param(("val", 8, False, 0, True), "augment: only split 'train'", id="augment"),
    ],
)
def test_loader_names_the_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load("digits").loader(*arguments)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """CIFAR-10 and CIFAR-100 in their own file format, 100 random images a file."""
    rng = np.random.default_rng(0)

    def write(path, key, classes, count=100):
        path.parent.mkdir(exist_ok=True)
        rows = {"data": rng.integers(0, 256, (count, 3072), np.uint8), key: [i % classes for i in range(count)]}
        path.write_bytes(pickle.dumps(rows))

    ten, hundred = tmp_path / "cifar-10-batches-py", tmp_path / "cifar-100-python"
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        write(ten / name, "labels", 10)
    (ten / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"kind{i}" for i in range(10)]}))
    write(hundred / "train", "fine_labels", 100, 1000)
    write(hundred / "test", "fine_labels", 100)
    (hundred / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"kind{i}" for i in range(100)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *_: True)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "classes", "sizes"),
    [pytest.param("cifar10", 10, (450, 50, 100), id="10"), pytest.param("cifar100", 100, (900, 100, 100), id="100")],
)
def test_cifar(cifar_root, name, classes, sizes):
    bundle = data.load(name, root=cifar_root)
    assert tuple(len(bundle.dataset(split)) for split in data.SPLITS) == sizes
    assert bundle.classes == tuple(f"kind{i}" for i in range(classes))
    assert bundle.image_shape == (3, 32, 32)
    x, y = next(iter(bundle.loader("train", 32, shuffle=True, augment=True)))
    assert x.shape == (32, 3, 32, 32)
    assert y.max() < classes
    kept, held = ({image.numpy().tobytes() for image in s.images} for s in (bundle.train, bundle.val))
    assert not kept & held
    assert torch.equal(_pixels(bundle, "val"), _pixels(data.load(name, root=cifar_root), "val"))


def _write_images(folder, classes, count, size=(40, 30)):
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name / f"{index}.png")


@pytest.mark.parametrize(
    ("splits", "sizes"),
    [
        pytest.param({"train": 20, "val": 3}, (36, 4, 6), id="train-val"),
        pytest.param({"train": 20, "val": 3, "test": 5}, (40, 6, 10), id="train-val-test"),
    ],
)
def test_folder(tmp_path, splits, sizes):
    for split, count in splits.items():
        _write_images(tmp_path / split, ("cat", "dog"), count)
    bundle = data.load("folder", root=tmp_path, image_size=16)
    assert bundle.classes == ("cat", "dog")
    assert tuple(len(bundle.dataset(split)) for split in data.SPLITS) == sizes
    for split in data.SPLITS:
        x, y = next(iter(bundle.loader(split, 4)))
        assert (x.shape, x.dtype, y.dtype) == ((4, 3, 16, 16), torch.float32, torch.int64)
    assert torch.equal(bundle.train[0][0], bundle.train[0][0])
    assert len(bundle.augmented) == len(bundle.train)
    assert not torch.equal(bundle.augmented[0][0], bundle.augmented[0][0])


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"name": "cifar"}, "no data set 'cifar'; near names: cifar10", id="unknown"),
        pytest.param({"name": "???"}, "near names: digits, mnist, cluttered-mnist", id="hopeless"),
        pytest.param({"name": "digits", "image_size": 0}, "image_size: expected at least 1, got 0", id="size"),
        pytest.param({"name": "cluttered-mnist", "renderings": 0}, "renderings: expected at least 1", id="renderings"),
        pytest.param(
            {"name": "digits", "stats": ((0.5,) * 3, (0.5,) * 3)}, "stats: expected .* each of 1 channels", id="stats"
        ),
        pytest.param({"name": "cifar10"}, "root: 'cifar10' needs the folder that holds", id="no-root"),
        pytest.param({"name": "folder"}, "root: 'folder' needs the folder that holds train and val", id="no-folder"),
    ],
)
def test_load_names_the_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)


def test_a_missing_folder_is_named_beside_what_exists(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"no folder 'cifar-10-batches-py': .* holds photos; download=True fetches it"):
        data.load("cifar10", root=tmp_path)
    with pytest.raises(ValueError, match=r"no folder 'train': .* holds photos"):
        data.load("folder", root=tmp_path)
    with pytest.raises(ValueError, match=r"no folder 'train': .*nowhere is not a folder"):
        data.load("folder", root=tmp_path / "nowhere")


def test_an_incomplete_cifar_names_the_file(cifar_root):
    (cifar_root / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(ValueError, match=r"root: no file 'data_batch_3': .*cifar-10-batches-py holds batches.meta"):
        data.load("cifar10", root=cifar_root)


def test_a_damaged_cifar_is_refused(cifar_root, monkeypatch):
    monkeypatch.undo()  # checksums are looked at again
    with pytest.raises(ValueError, match=r"cannot read cifar10 from .*not found or corrupted.*holds batches.meta"):
        data.load("cifar10", root=cifar_root)


def test_folders_must_agree_on_the_classes(tmp_path):
    _write_images(tmp_path / "train", ("cat", "dog"), 2)
    _write_images(tmp_path / "val", ("cat",), 2)
    with pytest.raises(ValueError, match=r"has the classes \['cat'\], train has \['cat', 'dog'\]"):
        data.load("folder", root=tmp_path)


def test_an_empty_class_is_refused(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cannot read images from .*cat"):
        data.load("folder", root=tmp_path)
