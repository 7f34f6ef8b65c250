"""Cases for the route kernel, and what the reference makes of them, down to the bytes that nothing may touch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from simt_harness import Harness
from torch import Tensor

from dgate_rt import reference
from dgate_rt.gate import leaves

BAD_COUNT, BAD_WAITING, OVERFLOW, NO_BUCKET, BAD_ID = 1, 2, 4, 8, 16  # RouteError in csrc/cuda/route_arguments.h
VECTORS = ("ids", "margin", "label", "dest_ids", "out_labels", "out_scores", "out_exits", "buckets")
SCALARS = ("count", "threshold", "dest_count", "waiting", "bucket", "handle", "status")
LARGEST = float(np.finfo(np.float32).max)
SPECIAL = (float("nan"), float("inf"), float("-inf"), LARGEST, -LARGEST, 0.0)


@dataclass
class Buffer:
    """Device memory that starts ``offset`` bytes behind a multiple of 16; a 1-D tensor lies in it at a stride."""

    data: np.ndarray  # [bytes] uint8
    offset: int = 0
    dtype: torch.dtype = torch.uint8
    length: int = 0
    stride: int = 1

    def tensor(self) -> Tensor:  # [length]
        # Viewed in numpy, since torch views no empty memory as another type.
        elements = torch.from_numpy(self.data.view(str(self.dtype).removeprefix("torch.")))
        return elements.as_strided((self.length,), (self.stride,))

    def copy(self) -> Buffer:
        return Buffer(self.data.copy(), self.offset, self.dtype, self.length, self.stride)

    def packed(self) -> bytes:
        return struct.pack("<2q", len(self.data), self.offset) + self.data.tobytes()


@dataclass
class Rows:
    """One tensor that crosses the cut; sizes in bytes."""

    bytes: int
    src: Buffer  # its stride is from row to row, as the length is their number
    dest: Buffer

    def tensors(self) -> tuple[Tensor, Tensor]:  # [rows, bytes] and [capacity, bytes] uint8
        source, target = (
            torch.from_numpy(side.data).as_strided((side.length, self.bytes), (side.stride, 1))
            for side in (self.src, self.dest)
        )
        return source, target


@dataclass
class Case:
    """The arguments of a launch. A buffer that is not there is null."""

    gate: int
    samples: int
    buffers: dict[str, Buffer] = field(repr=False)
    carried: list[Rows] = field(repr=False)
    threads: int = 64
    blocks: int = 1
    order: int = 0
    seed: int = 0

    @property
    def rows(self) -> int:
        return self.buffers["ids"].length

    @property
    def capacity(self) -> int:
        return self.buffers["dest_ids"].length

    def integer(self, name: str, otherwise: int) -> int:
        return int(self.buffers[name].tensor()) if name in self.buffers else otherwise

    def named_buffers(self) -> list[tuple[str, Buffer]]:
        """All that are there, in the order in which the program reads and writes them."""
        named = [(name, self.buffers[name]) for name in (*VECTORS, *SCALARS) if name in self.buffers]
        for i, rows in enumerate(self.carried):
            named += [(f"src[{i}]", rows.src), (f"dest[{i}]", rows.dest)]
        return named

    def copy(self) -> Case:
        buffers = {name: buffer.copy() for name, buffer in self.buffers.items()}
        carried = [Rows(rows.bytes, rows.src.copy(), rows.dest.copy()) for rows in self.carried]
        return Case(self.gate, self.samples, buffers, carried, self.threads, self.blocks, self.order, self.seed)

    def packed(self) -> bytes:
        null = struct.pack("<2q", -1, 0)
        sizes = self.threads, self.blocks, self.order, self.seed, self.rows, self.gate, self.capacity, self.samples
        buckets = self.buffers["buckets"].length if "buckets" in self.buffers else 0
        parts = [struct.pack("<10q", *sizes, buckets, len(self.carried))]
        for name in VECTORS:
            there = self.buffers.get(name)
            parts += [struct.pack("<q", there.stride), there.packed()] if there else [struct.pack("<q", 1), null]
        parts += [self.buffers[name].packed() if name in self.buffers else null for name in SCALARS]
        for rows in self.carried:
            parts += [struct.pack("<3q", rows.bytes, rows.src.stride, rows.dest.stride)]
            parts += [rows.src.packed(), rows.dest.packed()]
        return b"".join(parts)


def expect(case: Case) -> tuple[Case, tuple[int, int] | None]:
    """The case as it should be after the launch, and what the switch is told: its handle and the bucket."""
    after = case.copy()
    rows, live, waiting = case.rows, case.integer("count", case.rows), case.integer("waiting", 0)
    sizes = case.buffers["buckets"].tensor().tolist() if "buckets" in case.buffers else []
    margin, threshold = case.buffers["margin"].tensor(), case.buffers["threshold"].tensor()
    error = BAD_COUNT * (not 0 <= live <= rows) | BAD_WAITING * (not 0 <= waiting <= case.capacity)
    total = 0
    if not error:
        leave = leaves(margin[:live], threshold[0])
        total = waiting + int((~leave).sum())
        error = OVERFLOW * (total > case.capacity) | NO_BUCKET * (bool(sizes) and total > sizes[-1])
    if error:
        add_status(after, error)
        return after, None

    ids = case.buffers["ids"].tensor()[:live]
    bad = (ids < 0) | (ids >= case.samples)
    add_status(after, BAD_ID * bool(bad.any()))
    # The reference has no word for a bad id: such answers go to one place more, which nobody looks at.
    outputs = [after.buffers[name].tensor() for name in ("out_labels", "out_scores", "out_exits")]
    longer = [torch.cat([output, output.new_zeros(1)]) for output in outputs]
    bucket = run_reference(after, torch.where(bad & leave, case.samples, ids), longer, waiting)
    for output, answers in zip(outputs, longer, strict=True):
        output.copy_(answers[:-1])
    if not sizes:
        return after, None
    if "bucket" in after.buffers:
        after.buffers["bucket"].tensor().fill_(bucket)
    handle = case.integer("handle", 0)
    return after, (handle, bucket) if handle else None


def add_status(case: Case, error: int) -> None:
    if "status" in case.buffers:
        case.buffers["status"].tensor().bitwise_or_(error)


def run_reference(case: Case, ids: Tensor, outputs: Sequence[Tensor], waiting: int) -> int:
    """Runs `reference.route_` in the memory of the case, on its live rows; returns the bucket, if there are any."""
    live = len(ids)
    margin, label = (case.buffers[name].tensor()[:live] for name in ("margin", "label"))
    sides = [rows.tensors() for rows in case.carried]
    bucket = torch.tensor(-1, dtype=torch.int32)
    reference.route_(
        [source[:live] for source, _ in sides],
        ids,
        margin,
        label,
        None,
        case.buffers["threshold"].tensor().expand(case.gate + 1),
        case.gate,
        [target for _, target in sides],
        case.buffers["dest_ids"].tensor(),
        case.buffers["dest_count"].tensor()[0],
        *outputs,
        waiting=torch.tensor(waiting, dtype=torch.int32),
        buckets=case.buffers["buckets"].tensor() if "buckets" in case.buffers else None,
        bucket=bucket,
    )
    return int(bucket)


def check(harness: Harness, case: Case, expected: tuple[Case, tuple[int, int] | None] | None = None) -> None:
    """Asserts that the kernel does to the case what the reference does, and nothing else."""
    after, switch = expected or expect(case)
    named = after.named_buffers()
    answer = harness.ask(case.packed(), 24 + sum(len(buffer.data) for _, buffer in named))
    calls, handle, value = struct.unpack("<3q", answer[:24])
    told = (handle, value) if calls else None
    assert told == switch, f"switch: expected {switch}, got {told}; {case}"
    start = 24
    for name, buffer in named:
        got = np.frombuffer(answer, np.uint8, len(buffer.data), start)
        start += len(buffer.data)
        differ = np.flatnonzero(got != buffer.data)
        if len(differ):
            size = buffer.tensor().element_size()
            first = int(differ[0]) // size * size
            wanted, found = (part[first : first + size].tobytes().hex() for part in (buffer.data, got))
            raise AssertionError(
                f"{name}, byte {first} of {len(got)}: expected {wanted}, got {found}, in hexadecimal; {case}"
            )


@dataclass(frozen=True)
class Sizes:
    """What a case is drawn from."""

    rows: tuple[int, ...]
    row_bytes: tuple[int, ...]
    blocks: tuple[int, ...]
    threads: tuple[int, ...]
    most_bytes: int = 1 << 20  # of a tensor


def draw_case(random: Random, sizes: Sizes) -> Case:
    """A case of any kind, with a fault in one of four."""
    numbers = np.random.default_rng(random.getrandbits(32))
    rows = random.choice(sizes.rows)
    live = random.choice([None, 0, rows, random.randint(0, rows), random.randint(0, rows)])
    n = rows if live is None else live
    margin, threshold = draw_margins(random, numbers, rows)
    survivors = int((~leaves(torch.from_numpy(margin[:n]), torch.tensor(threshold))).sum())
    waiting = random.choice([None, None, 0, 1, random.randint(0, 40)])
    total = survivors + (waiting or 0)
    capacity = total + random.choice([0, 0, 1, random.randint(0, 40)])
    samples = rows + random.choice([0, 0, 1, 50])
    ids = numbers.permutation(samples)[:rows]
    buckets = draw_buckets(random, total, capacity)

    fault = random.choice([""] * 12 + ["count", "waiting", "overflow", "id"])
    if fault == "count":
        live = random.choice([-1, rows + 1, -(2**31), 2**31 - 1])
    elif fault == "waiting":
        waiting = random.choice([-1, capacity + 1, -(2**31), 2**31 - 1])
    elif fault == "overflow":
        capacity = max(total - 1, 0)
    elif fault == "id" and rows:
        ids[numbers.integers(rows, size=2)] = random.choice([-1, samples, -(2**63), 2**63 - 1, 2**32])

    def vector(values: np.ndarray) -> Buffer:
        return lay_out(random, numbers, values, random.choice([1, 1, 2, 3]))

    def scalar(value: float, dtype: type = np.int32) -> Buffer:
        return lay_out(random, numbers, np.array([value], dtype), 1)

    def poison(size: int, dtype: type) -> np.ndarray:
        return np.frombuffer(numbers.bytes(size * np.dtype(dtype).itemsize), dtype)

    buffers = {
        "ids": vector(ids),
        "margin": vector(margin),
        "label": vector(numbers.integers(-(2**62), 2**62, rows)),
        "dest_ids": vector(poison(capacity, np.int64)),
        "out_labels": vector(poison(samples, np.int64)),
        "out_scores": vector(poison(samples, np.float32)),
        "out_exits": vector(poison(samples, np.int64)),
        "threshold": scalar(threshold, np.float32),
        "dest_count": scalar(random.getrandbits(31)),
    }
    if live is not None:
        buffers["count"] = scalar(live)
    if waiting is not None:
        buffers["waiting"] = scalar(waiting)
    if buckets:
        buffers["buckets"] = vector(np.array(buckets, np.int32))
    if buckets or random.random() < 0.2:
        if random.random() < 0.8:
            buffers["bucket"] = scalar(random.getrandbits(31))
        if random.random() < 0.8:
            buffers["handle"] = scalar(random.choice([0, 1, random.getrandbits(63)]), np.int64)
    if random.random() < 0.8:
        buffers["status"] = scalar(random.choice([0, 0, 32, 1 << 30, 31]))
    tensors = [draw_rows(random, numbers, rows, capacity, sizes) for _ in range(random.choice([0, 1, 1, 1, 2, 3]))]
    order, seed = random.randrange(3), random.getrandbits(32)
    gate = random.choice([0, 1, 7])
    return Case(gate, samples, buffers, tensors, random.choice(sizes.threads), random.choice(sizes.blocks), order, seed)


def draw_margins(random: Random, numbers: np.random.Generator, rows: int) -> tuple[np.ndarray, float]:
    """Margins on a coarse grid, so that some equal the threshold; in one of three, some not finite."""
    margin = numbers.integers(-4, 5, rows).astype(np.float32) / 2
    threshold = random.choice([0.0, 0.0, 0.5, 1.5, -1.5, -LARGEST, float("inf"), float("-inf"), 3.0, float("nan")])
    if random.random() < 0.3:
        chosen = numbers.random(rows) < 0.3
        margin[chosen] = numbers.choice(np.array(SPECIAL, np.float32), int(chosen.sum()))
        threshold = random.choice([threshold, *SPECIAL])
    return margin, threshold


def draw_buckets(random: Random, total: int, capacity: int) -> list[int]:
    """Sizes around the total; the largest is too small in one of ten."""
    if random.random() < 0.4:
        return []
    largest = (
        total - 1 if random.random() < 0.1 and total > 1 else random.choice([max(total, 1), max(total, capacity, 1)])
    )
    around = [total - 1, total, total + 1, *(random.randint(1, 300) for _ in range(3))]
    return sorted({size for size in around if 1 <= size < largest} | {largest})


def draw_rows(random: Random, numbers: np.random.Generator, rows: int, capacity: int, sizes: Sizes) -> Rows:
    fitting = [size for size in sizes.row_bytes if size * max(rows, capacity) <= sizes.most_bytes]
    row_bytes = random.choice(fitting or [min(sizes.row_bytes)])
    whole = random.choice([True, True, False])  # as real tensors lie: contiguous and aligned

    def side(count: int) -> Buffer:
        stride = row_bytes + (0 if whole else random.choice([0, 1, 2, 4, 5, 8, 16, 30]))
        size = (count - 1) * stride + row_bytes if count else 0
        data = np.frombuffer(numbers.bytes(size), np.uint8).copy()
        return Buffer(data, 0 if whole else random.randrange(16), length=count, stride=stride)

    return Rows(row_bytes, side(rows), side(capacity))


def lay_out(random: Random, numbers: np.random.Generator, values: np.ndarray, stride: int) -> Buffer:
    """The values at this stride, at any alignment that their type allows; bytes at random between them."""
    size, length = values.dtype.itemsize, len(values)
    data = np.frombuffer(numbers.bytes(((length - 1) * stride + 1) * size if length else 0), np.uint8).copy()
    data.view(values.dtype)[::stride] = values
    offset = random.randrange(0, 16, size)
    return Buffer(data, offset, torch.from_numpy(values[:0].copy()).dtype, length, stride)


def buffer(values: list[float], dtype: torch.dtype) -> Buffer:
    data = torch.tensor(values, dtype=dtype).numpy().view(np.uint8)
    return Buffer(data, dtype=dtype, length=len(values))


def make_case(margin: list[float], threshold: float = 0.5, capacity: int | None = None, row_bytes: int = 5) -> Case:
    """Sample i in row i, a tensor to carry, every pointer there; two rows wait in dest."""
    rows, capacity = len(margin), len(margin) + 2 if capacity is None else capacity
    buffers = {
        "ids": buffer(list(range(rows)), torch.int64),
        "margin": buffer(margin, torch.float32),
        "label": buffer([10 + row for row in range(rows)], torch.int64),
        "dest_ids": buffer([-7] * capacity, torch.int64),
        "out_labels": buffer([-7] * rows, torch.int64),
        "out_scores": buffer([-7.0] * rows, torch.float32),
        "out_exits": buffer([-7] * rows, torch.int64),
        "buckets": buffer([2, 4, 8, 2000], torch.int32),
        "count": buffer([rows], torch.int32),
        "threshold": buffer([threshold], torch.float32),
        "dest_count": buffer([-7], torch.int32),
        "waiting": buffer([2], torch.int32),
        "bucket": buffer([-7], torch.int32),
        "handle": buffer([1234567890123], torch.int64),
        "status": buffer([0], torch.int32),
    }
    numbers = np.random.default_rng(0)
    sides = [
        Buffer(numbers.integers(256, size=count * row_bytes, dtype=np.uint8), length=count, stride=row_bytes)
        for count in (rows, capacity)
    ]
    return Case(3, rows, buffers, [Rows(row_bytes, *sides)], threads=64, blocks=2)
