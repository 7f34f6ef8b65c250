"""The command line, ``dgate``."""

# The help page lists commands in the order in which they are defined.
# isort: off
from dgate_rt.cli.app import app
from dgate_rt.cli import demo, pipeline, use, measure, experiment

__all__ = ["app", "demo", "experiment", "measure", "pipeline", "use"]
