"""What an experiment is: one file with options, a function from workbench to numbers, and how these are shown.

To add one, write a module with an ``EXPERIMENT`` and put its name into `NAMES`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dgate_rt.experiments.workbench import Workbench

NAMES = ("losses", "surfaces", "points", "classes", "joint", "guarantee", "drift", "depths", "pools", "static")
"""The modules of this package that hold an experiment: the paper's in its order, then those beyond it."""
BEYOND = "beyond the paper"
"""The source of an experiment that the paper has not."""
Result = dict[str, Any]
"""What a run found, as JSON has it; under ``claims`` a list of `claim`."""


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first column is a name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Experiment:
    """One experiment, of the paper or beyond it."""

    name: str
    title: str
    source: str  # where the paper has it, or `BEYOND`
    about: str  # what is done, for the pages
    options: Any  # a frozen dataclass of defaults
    quick: Any  # the same, to see that it works
    run: Callable[[Workbench, Any], Result]
    tables: Callable[[Result], list[Table]]
    figures: Callable[[Result], Mapping[str, str]]  # by name: an SVG element, or a PNG as data URI
    reported: Sequence[Table] = ()  # what others reported, to hold it against
    unfit: Callable[[Workbench], str] = lambda bench: ""  # why it cannot be run there; nothing where it can

    def configured(self, quick: bool, pairs: Sequence[str] = ()) -> Any:
        """The options, with those of ``name=value`` in ``pairs`` changed; tuples have commas between their numbers.

        Raises:
            ValueError: if there is no such option (near names are listed), or the value does not fit.
        """
        options = self.quick if quick else self.options
        for pair in pairs:
            name, equals, text = pair.partition("=")
            known = [field.name for field in fields(options)]
            if not equals or name not in known:
                near = difflib.get_close_matches(name, known, n=3) or known
                raise ValueError(f"set: {self.name} has no option {pair!r}; near names: {', '.join(near)}")
            options = replace(options, **{name: _parsed(name, text, getattr(options, name))})
        return options

    def described(self) -> str:
        """Its options and their defaults, in a line."""
        return ", ".join(f"{name}={_written(value)}" for name, value in asdict(self.options).items())


def find(name: str) -> Experiment:
    """The experiment of a name.

    Raises:
        ValueError: if there is none; near names are listed.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=3) or NAMES
        raise ValueError(f"name: no experiment {name!r}; near names: {', '.join(near)}")
    return importlib.import_module(f"dgate_rt.experiments.{name}").EXPERIMENT


def claim(text: str, holds: bool, seen: str) -> dict[str, Any]:
    """One thing that the paper says, or that we do, whether it was seen here, and the numbers."""
    return {"claim": text, "holds": bool(holds), "seen": seen}


def points(share: float) -> str:
    """A difference of accuracies in points of a hundred, with its sign."""
    return f"{100 * share:+.2f} points"


def spread(differences: ArrayLike) -> str:
    """Their mean in points, the least and the most; one for each seed."""
    values = np.asarray(differences)
    return f"{points(values.mean())} ({100 * values.min():+.2f} to {100 * values.max():+.2f} over {len(values)} seeds)"


def _parsed(name: str, text: str, default: Any) -> Any:
    try:
        if isinstance(default, tuple):
            return tuple(float(part) for part in text.split(","))
        return type(default)(text)
    except ValueError:
        known = [member.value for member in type(default)] if isinstance(default, Enum) else []
        wanted = f"one of {', '.join(known)} for {name}" if known else f"{name} like {_written(default)}"
        raise ValueError(f"set: expected {wanted}, got {text!r}") from None


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{item:g}" for item in value)
    return str(value.value if isinstance(value, Enum) else value)
