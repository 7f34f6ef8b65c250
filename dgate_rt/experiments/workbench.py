"""What experiments share: one network on one set of images, features of its cuts, gates on them, and what they say.

Whatever takes long is kept in a folder and found again: the network, its checkpoint while it trains, pooled features
batch by batch, and every gate. Traces follow from features and gates by one matrix product and are made anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dgate_rt import backbones, data, pretrain
from dgate_rt.backbones import BackboneMeta
from dgate_rt.corruptions import corrupt_test
from dgate_rt.cost import Costs, measure_costs
from dgate_rt.data import DataBundle
from dgate_rt.experiments.resampling import bootstrap, split_anew
from dgate_rt.experiments.scores import Scores, scores_of
from dgate_rt.experiments.store import Store, digest
from dgate_rt.experiments.training import Training
from dgate_rt.features import SKIP, DiskCache, Features, collect
from dgate_rt.files import Network, open_data, open_network
from dgate_rt.frontier import Frontier, OperatingPoint
from dgate_rt.gate import DEFAULT_POOL, Gate, Pool
from dgate_rt.program import GateProgram
from dgate_rt.progress import note, track
from dgate_rt.staged import StagedModel, split
from dgate_rt.train import fit_gate
from dgate_rt.writing import whole_file

T = TypeVar("T")
LOGITS = "logits"
"""The last cut of every feature pass: what the network itself answers."""
_FEATURE_BATCH = 128  # part of what decides the features' last bits


@dataclass(frozen=True)
class GateSpec:
    """What decides a gate, beside network and data."""

    cut: str
    loss: str = "hinge"
    pool: str = DEFAULT_POOL.value
    l2: float = 1e-3
    resample: int | None = None  # train on a bootstrap of this seed; None takes every sample once


class Workbench:
    """One network and one set of images, and a folder for all that is made of them.

    Args:
        folder: made where it is missing; it serves one network on one set of images.
        data: see `data.load`; None takes what ``network`` was trained on.
        backbone: its name; None takes that of ``network``.
        width: factor on its channel counts.
        network: a file of ``dgate train``; without it a network is trained here.
        training: how; with ``network`` neither this nor the next two, which it decides.
        image_size: pixels a side; by default the images keep their size.
        data_seed: of the split of the data, 0 by default.
        root: where the data is.
        download: fetch CIFAR into the root where it is missing.
        device: where the network runs.
        workers: processes that load data.
        cache_gb: the most that the features of one split may take.
        progress: show bars with the time left.

    Raises:
        ValueError: if data are missing, do not fit the network, the network is not the backbone that is named, or the
            folder serves other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        data: str | None = None,
        backbone: str | None = None,
        width: float | None = None,
        network: Path | None = None,
        training: Training | None = None,
        image_size: int | None = None,
        data_seed: int | None = None,
        root: Path | None = None,
        download: bool = False,
        device: torch.device | str = "cpu",
        workers: int = 0,
        cache_gb: float = 32.0,
        progress: bool = True,
    ) -> None:
        self.folder, self.device, self.workers = Path(folder), torch.device(device), workers
        self.cache_gb, self.progress = cache_gb, progress
        self.training = None if network else training or Training()
        self._given = None
        if network is not None:
            if any(given is not None for given in (training, image_size, data_seed)):
                raise ValueError("training, image_size, data_seed: expected none beside network, which decides them")
            self._given = _open(network, backbone, width, self.device)
            self.bundle = open_data(self._given, data, root, download)
            self.meta = self._given.meta
        else:
            data_seed = data_seed or 0
            self.bundle = _load(data, root, image_size, data_seed, download)
            if backbone is None:
                raise ValueError("backbone: expected a name, or a network that is trained already, got neither")
            self.meta = BackboneMeta.of(backbone, 1.0 if width is None else width, self.bundle, data_seed)
        self.cuts = backbones.default_cuts(self.meta.name)
        self._staged: dict[tuple[str, ...], StagedModel] = {}
        self.settings = self._settings()
        self.store = Store(self.folder / "kept")
        _claim(self.folder / "settings.json", self.settings)

    def _settings(self) -> dict[str, Any]:
        bundle, meta = self.bundle, self.meta
        settings = {
            "data": bundle.name,
            "samples": {part: len(bundle.dataset(part)) for part in data.SPLITS},  # type: ignore[arg-type]  # Dataset has no len
            "classes": len(bundle.classes),
            "image_size": bundle.image_shape[1],
            "data_seed": meta.data_seed,
            "backbone": meta.name,
            "width": meta.width,
            "training": self.training and asdict(self.training),
            "network": self.fingerprint if self._given else None,
        }
        return json.loads(json.dumps(settings))

    @cached_property
    def model(self) -> nn.Module:
        """The network, in eval mode; trained now if it is in no file yet."""
        model = self._given.model if self._given else self._trained()
        return model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it

    def _trained(self) -> nn.Module:
        path, checkpoint = self.folder / "network.safetensors", self.folder / "training.safetensors"
        if path.exists():
            model, found = backbones.load_backbone(path)
            if replace(found, accuracy=None) != self.meta:
                raise ValueError(f"folder: expected {self.meta} in {path}, got {found}; move it away")
            return model
        assert self.training is not None
        model = self.training.train(
            self.meta.build, self.bundle, checkpoint, device=self.device, workers=self.workers, progress=self.progress
        )
        test = self.bundle.loader("test", _FEATURE_BATCH, workers=self.workers)
        accuracy = pretrain.evaluate(model, test, device=self.device)
        backbones.save_backbone(path, model, replace(self.meta, accuracy=accuracy))
        checkpoint.unlink(missing_ok=True)
        return model

    @property
    def origin(self) -> str:
        """The command that made the network, where it was given and its file says so."""
        return self._given.meta.origin if self._given else ""

    @property
    def example(self) -> Tensor:  # [1, C, H, W]
        """One image of the validation split."""
        return self.bundle.val[0][0][None].to(self.device)

    def staged(self, cuts: Sequence[str]) -> StagedModel:
        """The network, cut."""
        cuts = tuple(cuts)
        if cuts not in self._staged:
            self._staged[cuts] = split(self.model, at=list(cuts), example=self.example)
        return self._staged[cuts]

    @cached_property
    def fingerprint(self) -> str:
        """Of the network, cut where the paper cuts it."""
        return self.staged(self.cuts).fingerprint()

    def features(
        self,
        part: str,
        pool: str = DEFAULT_POOL.value,
        cuts: Sequence[str] | None = None,
        corruption: tuple[str, int] | None = None,  # kind and severity, of the test split
    ) -> Features:
        """Pooled features of a split at every cut, in the order of the split, and behind them the network's logits.

        Raises:
            TypeError, ValueError: as `corrupt_test` does.
            ValueError: if a sample outside of the training split has a feature that is not finite, or another split
                than that of the tests is to be corrupted.
        """
        if corruption and part != "test":
            raise ValueError(f"corruption: only split 'test' is corrupted, got {part!r}")
        cuts = tuple(cuts or self.cuts)
        key = {"fingerprint": self.fingerprint, "cuts": cuts, "pool": pool, "split": part, "batch": _FEATURE_BATCH}
        key |= {name: self.settings[name] for name in ("data", "samples", "image_size", "data_seed")}
        key |= {"corruption": corruption} if corruption else {}  # clean features have the keys they always had
        identity: dict[str, object] = {"fingerprint": self.fingerprint, "cuts": [*cuts, LOGITS], "pool": pool}
        folder = self.folder / "features" / f"{part}-{digest(key)}"

        def complete() -> int:
            """Run the network; as many samples as there are, and all of them in the cache."""
            cut = self.staged(cuts)
            answering = StagedModel([*cut.stages, nn.Identity()], [*cut.cuts, LOGITS], [*cut.nhwc, False])
            bundle = corrupt_test(self.bundle, *corruption) if corruption else self.bundle
            loader = bundle.loader(part, _FEATURE_BATCH, workers=self.workers)
            cache = DiskCache(folder, self.cache_gb, identity)
            try:
                found = collect(
                    answering, loader, cache, pool=pool, device=self.device, name=part, progress=self.progress
                )
            finally:
                cache.close()
            return len(found.labels)

        self.store.value("features", key, complete)
        found = DiskCache(folder, self.cache_gb, identity).stored()
        skipped = int((found.labels == SKIP).sum())
        if skipped and part != "train":
            raise ValueError(f"{part}: expected finite features of every sample, got {skipped} samples without")
        return found

    def gates(self, specs: Sequence[GateSpec], cuts: Sequence[str] | None = None) -> list[Gate]:
        """The gates of these specifications, trained on the training split where they are not there yet."""
        return [self._gate(spec, tuple(cuts or self.cuts)) for spec in specs]

    def _gate(self, spec: GateSpec, cuts: tuple[str, ...]) -> Gate:
        features = self.features("train", spec.pool, cuts)
        rows = features.gates[cuts.index(spec.cut)]

        def train() -> dict[str, Tensor]:
            gate, objective = fit_gate(
                rows,
                features.labels,
                features.classes,
                rows=self.training_rows(features.labels, spec.resample),
                loss=spec.loss,
                pool=spec.pool,
                l2=spec.l2,
                device=self.device,
            )
            return {"weight": gate.weight, "bias": gate.bias, "objective": torch.tensor(objective)}

        key = {"fingerprint": self.fingerprint, "data": self.settings, "cuts": cuts, **asdict(spec)}
        kept = self.store.tensors("gate", key, train)
        gate = Gate(rows.shape[1], features.classes, Pool(spec.pool))
        gate.weight.data, gate.bias.data = kept["weight"], kept["bias"]
        return gate

    def training_rows(
        self,
        labels: Tensor,  # [N] int64, of the training features
        seed: int | None,
    ) -> Tensor:  # [M] int64
        """The samples to train gates on: all that have finite features, or a bootstrap of them by their sources."""
        usable = labels != SKIP
        if seed is None:
            return usable.nonzero()[:, 0]
        rows = torch.from_numpy(bootstrap(self._sources("train"), seed))
        return rows[usable[rows]]

    def held_out(self, seed: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of `scores` to choose thresholds on, and rows to test them on: as the data are split, or split anew."""
        val, test = self._sources("val"), self._sources("test")
        if seed is not None:
            return split_anew(val, test, seed)
        every = np.arange(len(val) + len(test))
        return every[: len(val)], every[len(val) :]

    def _sources(self, part: str) -> NDArray[np.int64]:
        """What each sample was made of: each of itself, where nothing is said."""
        known = self.bundle.sources.get(part)
        return np.arange(self.settings["samples"][part]) if known is None else known.numpy()

    def scores(self, specs: Sequence[GateSpec], cuts: Sequence[str] | None = None) -> Scores:
        """What every gate and the network say about the validation samples and, behind them, the test samples."""
        return Scores.joined([self.scores_on(part, specs, cuts) for part in ("val", "test")])

    def scores_on(
        self,
        part: str,
        specs: Sequence[GateSpec],
        cuts: Sequence[str] | None = None,
        corruption: tuple[str, int] | None = None,  # see `features`
    ) -> Scores:
        """What every gate and the network say about the samples of one split."""
        cuts = tuple(cuts or self.cuts)
        found = [self.features(part, spec.pool, cuts, corruption) for spec in specs]
        pooled = [f.gates[cuts.index(spec.cut)] for f, spec in zip(found, specs, strict=True)]
        return scores_of(self.gates(specs, cuts), pooled, found[0].gates[-1], found[0].labels)

    def costs(self, specs: Sequence[GateSpec], cuts: Sequence[str] | None = None) -> Costs:
        """FLOPs of every stage and gate."""
        return measure_costs(self.staged([spec.cut for spec in specs]), self.gates(specs, cuts), self.example)

    def program(
        self,
        specs: Sequence[GateSpec],
        point: OperatingPoint,
        costs: Costs,
        network_accuracy: float,
        cuts: Sequence[str] | None = None,
    ) -> GateProgram:
        """Network and gates at an operating point, to be compiled."""
        return GateProgram(
            staged=self.staged([spec.cut for spec in specs]),
            gates=tuple(gate.to(self.device) for gate in self.gates(specs, cuts)),
            thresholds=point.thresholds,
            point=point,
            frontier=Frontier((point,)),
            costs=costs,
            network_accuracy=network_accuracy,
            input_shape=self.bundle.image_shape,
            input_dtype=torch.float32,
        )

    def first_cuts(self, count: int) -> tuple[str, ...]:
        """The first so many places where the paper puts gates.

        Raises:
            ValueError: if there are not so many.
        """
        if not 1 <= count <= len(self.cuts):
            raise ValueError(f"gates: expected 1 to {len(self.cuts)} for {self.meta.name}, got {count}")
        return self.cuts[:count]

    def track(self, items: Iterable[T], description: str) -> Iterator[T]:
        """Go through ``items`` under a bar with the time left."""
        return track(items, description, enabled=self.progress)

    def note(self, message: str) -> None:
        """A line on standard error, where a bar would be."""
        note(message, self.progress)


def _open(path: Path, backbone: str | None, width: float | None, device: torch.device) -> Network:
    network = open_network(path, device)
    for name, expected, got in (("backbone", backbone, network.meta.name), ("width", width, network.meta.width)):
        if expected is not None and expected != got:
            raise ValueError(f"network: expected {name} {expected!r}, got {got!r} in {path}")
    return network


def _load(name: str | None, root: Path | None, image_size: int | None, seed: int, download: bool) -> DataBundle:
    if name is None:
        raise ValueError("data: expected a name, or a network that was trained on some, got neither")
    return data.load(name, root=root, image_size=image_size, seed=seed, download=download)


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings to a new folder; refuse one that serves others."""
    if not path.exists():
        with whole_file(path) as file:
            json.dump(settings, file, indent=1)
        return
    try:
        found = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"folder: {path} is damaged ({error}); delete it or take another folder") from error
    differ = {key: (value, found.get(key)) for key, value in settings.items() if found.get(key) != value}
    if differ:
        raise ValueError(
            f"folder: {path.parent} has results of other settings; (expected, got): {differ}; take another folder"
        )
