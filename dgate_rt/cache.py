"""Where results that are worth keeping between processes lie."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_dir

VARIABLE = "DGATE_RT_CACHE"


def cache_dir() -> Path:
    """The folder, made if it is missing: what ``DGATE_RT_CACHE`` in the environment names, else the user's own."""
    folder = Path(os.environ.get(VARIABLE) or user_cache_dir("dgate_rt"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
