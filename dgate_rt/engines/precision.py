"""Which dtypes a machine multiplies in hardware."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dgate_rt.errors import ExecutorError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The dtype to run in; None leaves it as it is.

    Raises:
        ValueError: if it is none of `DTYPES`.
        ExecutorError: if ``device`` multiplies bfloat16 only by emulating it.
    """
    if dtype is None:
        return None
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype: expected None, {' or '.join(map(repr, DTYPES))}, got {dtype!r}")
    if found is torch.bfloat16 and not supports_bfloat16(device):
        raise ExecutorError(
            f"dtype: bfloat16 was asked for, but {device} here has no instructions for it; see dgate doctor"
        )
    return found


def supports_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 run in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(works for name, works in cpu_capabilities().items() if "bf16" in name)


def cpu_capabilities() -> dict[str, Any]:
    """Instruction sets as torch names them, else as Linux does."""
    probe: Callable[[], dict[str, Any]] | None = getattr(torch.cpu, "get_capabilities", None)
    if probe is not None:
        return probe()
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return {}
    return dict.fromkeys(flags.split(), True)
