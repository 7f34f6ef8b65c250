"""Which versions are installed of what results depend on."""

from __future__ import annotations

from functools import cache
from importlib import metadata


def package_version(name: str) -> str | None:
    """The version of a package by the name that it is imported by; None if it is not installed.

    The same package may be installed under several names: ``onnxruntime`` as onnxruntime-gpu, say.
    """
    found = {known: metadata.version(known) for known in _distributions().get(name, [])}
    return ", ".join(v if known == name else f"{known} {v}" for known, v in sorted(found.items())) or None


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())
