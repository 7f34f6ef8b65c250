"""Files kept between processes: found again whole, written anew otherwise, within their limit."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from dgate_rt import cache
from dgate_rt.cache import kept_bytes, kept_files


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGATE_RT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kind"


def write(folder: Path) -> None:
    (folder / "graph").write_text("graph")
    (folder / "weights").write_bytes(bytes(1000))


def read(folder: Path) -> tuple[str, int]:
    return (folder / "graph").read_text(), len((folder / "weights").read_bytes())


def get(key: str = "key") -> bool:
    """Whether the files were found; they are right in any case."""
    result, found = kept_files("kind", key, write, read)
    assert result == ("graph", 1000)
    return found


def test_what_was_written_is_found_again(folder):
    assert (get(), get(), get("other"), get("other")) == (False, True, False, True)
    assert sorted(path.name for path in folder.iterdir()) == ["key", "other"]
    assert 2000 < kept_bytes() < 3000


def test_nothing_kept_takes_nothing():
    assert kept_bytes() == 0


DAMAGES = {
    "cut off": lambda folder: (folder / "weights").write_bytes(bytes(999)),
    "one bit": lambda folder: (folder / "weights").write_bytes(bytes(999) + b"\1"),
    "a file is gone": lambda folder: (folder / "graph").unlink(),
    "a file too many": lambda folder: (folder / "more").touch(),
    "checksums are gone": lambda folder: (folder / cache._CHECKSUMS).unlink(),
    "checksums are damaged": lambda folder: (folder / cache._CHECKSUMS).write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_written_anew(folder, damage):
    get()
    DAMAGES[damage](folder / "key")
    assert (get(), get()) == (False, True)


def test_kept_files_that_cannot_be_read_are_written_anew():
    get()
    failures = [RuntimeError("version 1 cannot be read")]

    def reluctant(folder: Path) -> tuple[str, int]:
        if failures:
            raise failures.pop()
        return read(folder)

    assert kept_files("kind", "key", write, reluctant) == (("graph", 1000), False)
    assert get()


@pytest.mark.parametrize("step", ["write", "read"])
def test_an_error_leaves_nothing_behind(folder, step):
    def fails(folder: Path) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kept_files("kind", "key", *((fails, read) if step == "write" else (write, fails)))
    assert list(folder.iterdir()) == []


def test_where_nothing_can_be_kept_the_files_are_temporary(folder):
    folder.parent.write_text("no folder")
    assert (get(), get()) == (False, False)


def test_a_disk_that_is_nearly_full_is_left_alone(folder, monkeypatch):
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(cache.limit_bytes() - 1))
    seen = []
    kept_files("kind", "key", lambda folder: (seen.append(folder), write(folder)), read)
    assert folder not in seen[0].parents
    assert not seen[0].exists()
    assert list(folder.iterdir()) == []


def test_the_least_recently_used_make_room(folder, monkeypatch):
    monkeypatch.setenv("DGATE_RT_CACHE_GIB", str(2800 / 2**30))  # room for two
    for age, key in ((300, "a"), (200, "b")):
        get(key)
        os.utime(folder / key, (os.stat(folder).st_mtime - age,) * 2)
    assert get("a")  # which is now the younger
    get("c")
    assert sorted(path.name for path in folder.iterdir()) == ["a", "c"]


def test_what_is_larger_than_the_limit_is_not_kept_and_none_is_a_limit_too(folder, monkeypatch):
    get("small")
    monkeypatch.setenv("DGATE_RT_CACHE_GIB", str(1300 / 2**30))
    write_more = lambda folder: (write(folder), (folder / "more").write_bytes(bytes(1000)))  # noqa: E731 - of one use
    assert [kept_files("kind", "large", write_more, read)[1] for _ in range(2)] == [False, False]
    assert [path.name for path in folder.iterdir()] == ["small"]
    monkeypatch.setenv("DGATE_RT_CACHE_GIB", "0")
    assert (get("small"), get("new"), get("new")) == (False, False, False)
    assert list(folder.iterdir()) == []


def test_a_limit_that_is_no_number_is_named(monkeypatch):
    for text in ("much", "inf", "nan", "-1"):
        monkeypatch.setenv("DGATE_RT_CACHE_GIB", text)
        with pytest.raises(ValueError, match=f"DGATE_RT_CACHE_GIB: expected a number of GiB, at least 0, got '{text}'"):
            get()


def test_what_another_process_is_writing_is_left_alone(folder, monkeypatch):
    monkeypatch.setenv("DGATE_RT_CACHE_GIB", str(1500 / 2**30))

    def slow(mine: Path) -> None:
        write(mine)
        for key in ("a", "b", "c"):
            kept_files("kind", key, write, read)

    assert kept_files("kind", "slow", slow, read) == (("graph", 1000), False)


def test_what_a_process_left_when_it_was_killed_goes_after_a_day(folder):
    get()
    for name, age_h in (("fresh", 1), ("old", 25)):
        (folder / name).mkdir()
        (folder / name / "weights").touch()
        os.utime(folder / name, (time.time() - 3600 * age_h,) * 2)
    get("other")
    assert sorted(path.name for path in folder.iterdir()) == ["fresh", "key", "other"]


def test_the_first_of_two_that_write_the_same_is_kept(folder):
    def slow(mine: Path) -> None:
        write(mine)
        get()
        os.utime(folder / "key", (1, 1))

    assert kept_files("kind", "key", slow, read) == (("graph", 1000), False)
    assert (folder / "key").stat().st_mtime == 1


def test_a_folder_of_somebody_else_is_read(folder, monkeypatch):
    get()

    def refuse(*_: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "utime", refuse)
    assert get()


def test_other_users_cannot_read_what_is_kept(folder):
    get()
    assert folder.stat().st_mode & 0o077 == 0


def test_many_at_once_all_get_them(folder):
    barrier, results = threading.Barrier(8), []

    def work() -> None:
        barrier.wait()
        results.append(get())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert get()
    assert [path.name for path in folder.iterdir()] == ["key"]
