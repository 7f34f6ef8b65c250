"""The pooled features that gates train on: computed once a sample, kept in memory or on disk.

A disk cache is a directory that only ever grows at its end::

    header.json     schema, backbone fingerprint, cuts, pool, classes, widths
    gate0.f32 ...   pooled features of each gate, [samples, width] float32, row after row
    labels.i64      [samples] int64; SKIP where a pooled feature is not finite
    batches.jsonl   a line for each finished batch: the hash of its input, its number of samples

A batch's line is written after its rows have left this process, so a fit that is killed at any moment leaves a cache
whose lines are true; rows without a line are cut off by the next fit. One fit may use a directory at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from dgate_rt.batches import as_pair, check_labels, count_classes, frozen, run_stage
from dgate_rt.gate import DEFAULT_POOL, Pool, pool_features
from dgate_rt.progress import length_of, track
from dgate_rt.staged import Boundary, StagedModel
from dgate_rt.writing import whole_file

SCHEMA = 1
SKIP = -1
"""The label of a sample that no gate shall train on, because one of its pooled features is not finite."""


@dataclass(frozen=True)
class Features:
    """What a loader gave, in its order."""

    gates: list[Tensor]  # for each gate [N, width] float32, on the CPU; maybe a memory map
    labels: Tensor  # [N] int64, SKIP for samples to leave out
    classes: int


class FeatureCache:
    """Pooled features in memory, and what every cache does.

    Args:
        limit_gb: the most it may hold, in units of 1e9 bytes.
    """

    advice = "raise cache_gb, give a directory as cache to keep them on disk, or use a pool that gives fewer features"

    def __init__(self, limit_gb: float) -> None:
        self.limit_gb = limit_gb
        self.classes: int | None = None
        self.widths: list[int] | None = None
        self.rows = 0
        self._chunks: list[list[Tensor]] = []
        self._labels: list[Tensor] = []

    def begin(self, widths: Sequence[int], classes: int, expected_rows: int | None) -> None:
        """Take the shape of the data from the first batch that is computed.

        Raises:
            ValueError: if ``expected_rows`` samples cannot fit.
        """
        self.widths, self.classes = list(widths), classes
        self._chunks = [[] for _ in widths]
        self._check_size(expected_rows or 0)

    def recall(
        self,
        x: Tensor,  # [N, ...] any dtype
        y: Tensor,  # [N] int64
    ) -> bool:
        """Whether this batch, the next in order, is stored already; if not, `append` must follow."""
        return False

    def append(
        self,
        pooled: Sequence[Tensor],  # for each gate [N, width] float32, on the CPU, contiguous, kept as it is
        labels: Tensor,  # [N] int64
    ) -> None:
        """Store the next batch.

        Raises:
            ValueError: if that would cross the limit.
        """
        finite = torch.stack([rows.isfinite().all(1) for rows in pooled]).all(0)
        self._check_size(self.rows + len(labels))
        self._write(pooled, torch.where(finite, labels, SKIP))
        self.rows += len(labels)

    def features(self) -> Features:
        """Everything recalled or appended, in order; the cache is done with afterwards."""
        assert self.classes is not None
        gates = []
        while self._chunks:
            gates.append(torch.cat(self._chunks.pop(0)))
        return Features(gates, torch.cat(self._labels), self.classes)

    def close(self) -> None:
        """Let go of files."""

    def _write(self, pooled: Sequence[Tensor], labels: Tensor) -> None:
        for chunks, rows in zip(self._chunks, pooled, strict=True):
            chunks.append(rows)
        self._labels.append(labels)

    def _check_size(self, rows: int) -> None:
        assert self.widths is not None
        row_bytes = 4 * sum(self.widths) + 8
        needed_gb = rows * row_bytes / 1e9
        if needed_gb > self.limit_gb:
            raise ValueError(
                f"cache_gb: {rows} samples of {row_bytes} bytes need {needed_gb:.3g} GB or more, got "
                f"cache_gb={self.limit_gb:g}; {self.advice}"
            )


class DiskCache(FeatureCache):
    """Pooled features in a directory; batches that an earlier fit stored, in the same order, are not computed again.

    Args:
        path: the directory; made where it does not exist.
        limit_gb: the most it may hold, in units of 1e9 bytes.
        identity: what the features depend on besides the data: ``fingerprint``, ``cuts``, ``pool``.

    Raises:
        ValueError: if ``path`` holds something else, or features of another backbone, of other cuts or pool.
    """

    advice = "raise cache_gb, or use a pool that gives fewer features"

    def __init__(self, path: str | os.PathLike[str], limit_gb: float, identity: dict[str, object]) -> None:
        super().__init__(limit_gb)
        self.path = Path(path)
        self._identity = {"format": "dgate_rt pooled features", "schema": SCHEMA, **identity}
        self._entries: list[tuple[str, int]] = []  # input hash and samples of each stored batch
        self._position = 0  # batches of this pass so far
        self._digest = ""
        self._files: list[BinaryIO] = []
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"cache: expected a directory, got the file {self.path}")
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / "header.json").exists():
            self._read()
        elif any(self.path.glob("*.jsonl")) or any(self.path.glob("*.f32")):
            raise ValueError(
                f"cache: {self.path} holds features but no header.json; delete it or give another directory"
            )

    def begin(self, widths: Sequence[int], classes: int, expected_rows: int | None) -> None:
        if self.widths is not None:  # from the header of an earlier fit
            self._expect({"widths": self.widths, "classes": self.classes}, {"widths": list(widths), "classes": classes})
        super().begin(widths, classes, expected_rows)
        header = self.path / "header.json"
        if not header.exists():
            with whole_file(header) as file:
                json.dump({**self._identity, "classes": classes, "widths": list(widths)}, file, indent=1)

    def recall(self, x: Tensor, y: Tensor) -> bool:
        self._digest = batch_hash(x, y)
        if self._position == len(self._entries) or self._entries[self._position][0] != self._digest:
            return False
        self.rows += self._entries[self._position][1]
        self._position += 1
        return True

    def features(self) -> Features:
        self.close()
        assert self.widths is not None
        assert self.classes is not None
        gates = [self._map(f"gate{i}.f32", np.float32, (self.rows, width)) for i, width in enumerate(self.widths)]
        return Features(gates, self._map("labels.i64", np.int64, (self.rows,)), self.classes)

    def stored(self) -> Features:
        """Everything that earlier fits stored, for who knows that their batches are all there and would come again.

        Raises:
            ValueError: if nothing is stored.
        """
        if not self._entries:
            raise ValueError(f"cache: expected features in {self.path}, got none")
        self.rows = sum(samples for _, samples in self._entries)
        return self.features()

    def close(self) -> None:
        while self._files:
            self._files.pop().close()

    def _read(self) -> None:
        try:
            header = dict(json.loads((self.path / "header.json").read_text()))
            self._expect(header, self._identity)
            self.widths, self.classes = [int(width) for width in header["widths"]], int(header["classes"])
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"cache: {self.path / 'header.json'} is damaged ({error!r}); delete {self.path}") from None
        stored = min(
            self._size(name) // row_bytes for name, row_bytes in zip(self._names(), self._row_bytes(), strict=True)
        )
        journal = self.path / "batches.jsonl"
        rows = 0
        for line in journal.read_bytes().splitlines(keepends=True) if journal.exists() else []:
            try:
                digest, samples = str(json.loads(line)["hash"]), int(json.loads(line)["samples"])
            except (ValueError, KeyError, TypeError):
                break  # cut short
            rows += samples
            if rows > stored or not line.endswith(b"\n"):
                break
            self._entries.append((digest, samples))

    def _expect(self, found: dict[str, object], expected: dict[str, object]) -> None:
        for key, value in expected.items():
            if found.get(key) != value:
                raise ValueError(
                    f"cache: {self.path} belongs to another run: expected {key} {value!r}, got {found.get(key)!r}; "
                    f"delete it or give another directory"
                )

    def _write(self, pooled: Sequence[Tensor], labels: Tensor) -> None:
        if not self._files:
            self._open()
        *data, journal = self._files
        for file, rows in zip(data, [*pooled, labels], strict=True):
            file.write(rows.numpy().tobytes())
            file.flush()
        journal.write(_line(self._digest, len(labels)))
        journal.flush()
        self._entries.append((self._digest, len(labels)))
        self._position += 1

    def _open(self) -> None:
        """Cut every file back to the batches of this pass, the journal first, and open it for appending."""
        del self._entries[self._position :]
        journal_bytes = sum(len(_line(*entry)) for entry in self._entries)
        sizes = [self.rows * row_bytes for row_bytes in self._row_bytes()]
        for name, size in [("batches.jsonl", journal_bytes), *zip(self._names(), sizes, strict=True)]:
            if self._size(name) > size:
                os.truncate(self.path / name, size)
        self._files = [open(self.path / name, "ab") for name in [*self._names(), "batches.jsonl"]]  # noqa: SIM115  (open until `close`)

    def _names(self) -> list[str]:
        assert self.widths is not None
        return [f"gate{i}.f32" for i in range(len(self.widths))] + ["labels.i64"]

    def _row_bytes(self) -> list[int]:
        assert self.widths is not None
        return [4 * width for width in self.widths] + [8]

    def _size(self, name: str) -> int:
        file = self.path / name
        return file.stat().st_size if file.exists() else 0

    def _map(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> Tensor:
        if 0 in shape:
            return torch.from_numpy(np.empty(shape, dtype))
        # mode "c": copy on write, so that torch accepts it without a warning; nothing writes to it
        return torch.from_numpy(np.memmap(self.path / name, dtype, mode="c", shape=shape))


def _line(digest: str, samples: int) -> bytes:
    return json.dumps({"hash": digest, "samples": samples}).encode() + b"\n"


def batch_hash(
    x: Tensor,  # [N, ...]
    y: Tensor,  # [N] int64
) -> str:
    """A hash of a batch: dtype, shape and bytes of its inputs, and its labels."""
    digest = hashlib.blake2b(f"{x.dtype} {tuple(x.shape)}".encode(), digest_size=16)
    for tensor in (x, y):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def collect(
    staged: StagedModel,
    loader: Iterable[Sequence[object]],
    cache: FeatureCache,
    *,
    pool: Pool | str = DEFAULT_POOL,
    device: torch.device | str = "cpu",
    name: str = "loader",
    progress: bool = True,
) -> Features:
    """Run the frozen backbone over ``loader``, up to the last gate, and keep the pooled features in ``cache``.

    Raises:
        ValueError, TypeError: for a loader that gives nothing, or data that do not fit; the message names ``name``.
    """
    batches = length_of(loader)
    begun = False
    with frozen(staged):
        for number, item in enumerate(track(loader, f"features of {name}", batches, progress)):
            x, y = as_pair(item, f"{name}: batch {number}")
            if not len(y):
                continue
            if cache.classes is None:
                cache.classes = count_classes(staged, x, device, name)
            check_labels(y, cache.classes, f"{name}: batch {number}")
            if cache.recall(x, y):
                continue
            pooled = _pooled(staged, x, pool, device, name)
            if not begun:
                expected_rows = None if batches is None else cache.rows + (batches - number - 1) * len(y) + 1
                cache.begin([rows.shape[1] for rows in pooled], cache.classes, expected_rows)
                begun = True
            cache.append(pooled, y)
    if not cache.rows:
        raise ValueError(f"{name}: expected batches (x, y), got none; a generator can be used only once")
    return cache.features()


@torch.no_grad()
def _pooled(staged: StagedModel, x: Tensor, pool: Pool | str, device: torch.device | str, name: str) -> list[Tensor]:
    """The pooled features of every gate, copied: a later stage may work in place."""
    boundary: Boundary = x.to(device, copy=True)
    pooled = []
    for index in range(staged.gate_count):
        boundary = run_stage(staged, index, boundary, f"{name}: x")
        rows = pool_features(staged.gate_features(index, boundary), pool)
        if len(rows) != len(x):
            raise ValueError(f"staged: stage {index} gave {len(rows)} rows for a batch of {len(x)}")
        pooled.append(rows.to("cpu", copy=True).contiguous())
    return pooled
