"""What was expensive to come by, kept in a folder under what decides it: found again, or made.

Each thing is one file, ``KIND-HASH.safetensors`` or ``.json``, that holds its key in full. It gets its name when all of
it is written, so an interruption at any moment leaves whole files only; a ``.partial`` of a process that was killed is
written over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dgate_rt.writing import replacing, whole_file

Key = Mapping[str, Any]
"""Everything that decides a thing, as JSON has it."""


def digest(key: Key) -> str:
    """A short name for a key; equal keys have equal names, whatever the order of their entries."""
    return hashlib.blake2b(_text(key).encode(), digest_size=8).hexdigest()


class Store:
    """A folder of things by kind and key.

    Args:
        folder: made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, kind: str, key: Key, suffix: str) -> Path:
        """Where a thing is, or will be."""
        return self.folder / f"{kind}-{digest(key)}{suffix}"

    def tensors(self, kind: str, key: Key, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that were kept under a key; where there are none, ``make()`` gives them, and they are kept.

        Raises:
            ValueError: if the file is damaged or holds another key.
        """
        path = self.path(kind, key, ".safetensors")
        if not path.exists():
            made = {name: tensor.detach().cpu().contiguous() for name, tensor in make().items()}
            with replacing(path) as partial:
                save_file(made, partial, {"key": _text(key)})
            return made
        try:
            with safe_open(path, "pt") as file:
                _check(path, (file.metadata() or {}).get("key"), key)
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"store: {path} is not a whole safetensors file ({error}); delete it") from error

    def value(self, kind: str, key: Key, make: Callable[[], Any]) -> Any:
        """The same for what JSON can hold; what was made comes back as JSON has it too.

        Raises:
            ValueError: if the file is damaged or holds another key.
        """
        path = self.path(kind, key, ".json")
        if not path.exists():
            text = json.dumps({"key": key, "value": make()}, indent=1)
            with whole_file(path) as file:
                file.write(text)
            return json.loads(text)["value"]
        try:
            found = json.loads(path.read_text())
            kept, value = found["key"], found["value"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"store: {path} is damaged ({error!r}); delete it") from error
        _check(path, _text(kept), key)
        return value


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)


def _check(path: Path, found: str | None, key: Key) -> None:
    if found != _text(key):
        raise ValueError(f"store: expected {_text(key)} in {path}, got {found}; delete it")
