"""The ``dgate`` application; the commands of the other modules put themselves into it.

Nothing here or at the top of those modules imports torch: ``dgate --help`` and shell completion are to be quick.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from dgate_rt.allocator import keep_freed_memory
from dgate_rt.cli.console import DEBUG_VARIABLE, Group, out


def examples(*lines: str) -> str:
    """The end of a help page."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"[cyan]$ {escape(line)}[/cyan]" for line in lines)])


app = typer.Typer(
    name="dgate",
    cls=Group,
    help="Decision gates for trained classifiers: train them, calibrate them, run them, and see what they save.",
    epilog=examples(
        "dgate demo",
        "dgate train --data digits --backbone resnet26 --width 0.25 -o net.safetensors",
        "dgate fit net.safetensors -o gates.safetensors",
        "dgate calibrate gates.safetensors net.safetensors --max-drop 0.01 -o program.safetensors",
        "dgate run program.safetensors net.safetensors photos/ > answers.csv",
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from dgate_rt import __version__

        out.print(f"dgate {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG_VARIABLE, help="Show the traceback of an error.")
    ] = False,
) -> None:
    keep_freed_memory()  # the process is ours
