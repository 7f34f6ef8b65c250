"""Progress with an estimate of the time left; silent where nobody watches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


def length_of(iterable: Iterable[object]) -> int | None:
    """``len(iterable)``, or None where it has none (a generator, a DataLoader over an iterable dataset)."""
    try:
        return len(iterable)  # type: ignore[arg-type]  # TypeError is caught
    except TypeError:
        return None


def track(iterable: Iterable[T], description: str, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Yield from ``iterable`` under a progress bar on stderr: done, total, time spent, time left.

    Args:
        iterable: what to go through; it is consumed once.
        description: what the work is, in a few words.
        total: number of items; ``len(iterable)`` where not given, and without either the bar shows no time left.
        enabled: False for silence; a stderr that is not a terminal is silent anyway.
    """
    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield from iterable
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield from progress.track(
            iterable, total=length_of(iterable) if total is None else total, description=description
        )


def note(message: str, enabled: bool = True) -> None:
    """Print one line on stderr where `track` would show a bar."""
    console = Console(stderr=True)
    if enabled and console.is_terminal:
        console.print(message, markup=False, highlight=False)
