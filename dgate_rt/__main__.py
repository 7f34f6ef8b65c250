"""``python -m dgate_rt`` is ``dgate``."""

from dgate_rt.cli import app

app(prog_name="dgate")
