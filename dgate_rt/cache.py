"""What is worth keeping between processes, such as times of this machine: small JSON files in the user's own folder."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

VARIABLE = "DGATE_RT_CACHE"


def cache_dir() -> Path:
    """The folder that ``DGATE_RT_CACHE`` in the environment names, else the user's own."""
    return Path(os.environ.get(VARIABLE) or user_cache_dir("dgate_rt"))


def recall(name: str) -> Any:
    """What was kept under a name; None if nothing was, or the file is damaged."""
    try:
        return json.loads((cache_dir() / name).read_text())
    except (OSError, ValueError):
        return None


def keep(name: str, value: Any) -> None:
    """Keep ``value``, whole or not at all; where the folder cannot be written, nothing is kept."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            json.dump(value, file)
        os.replace(file.name, folder / name)
    except OSError:
        return
