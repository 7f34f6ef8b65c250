"""What nvcc makes of the route kernel, for every architecture that is built: registers, spills, width of the copies."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100, 120)
MOST_REGISTERS = 80
"""Two blocks of 384 threads a multiprocessor, whose 65,536 registers are handed out in steps of 8 a thread."""
MOST_SHARED_BYTES = 16_896  # 16 KiB of verdicts, 128 bytes of totals, and what the compiler reserves


@dataclass(frozen=True)
class Compiled:
    """The compiler's report of one kernel, and how often each memory instruction occurs in it."""

    architecture: int
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int
    instructions: Counter[str]


def disassembler() -> str | None:
    """cuobjdump of the toolkit, else the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found is None and (nvcc := shutil.which("nvcc")):
        beside = Path(nvcc).resolve().parent / "cuobjdump"
        found = str(beside) if beside.is_file() else None
    if found is None:
        triton = pytest.importorskip("triton", reason="needs cuobjdump, from a CUDA toolkit or Triton")
        beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(beside) if beside.is_file() else None
    return found


@pytest.fixture(scope="module", params=ARCHITECTURES, ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    cubin = tmp_path_factory.mktemp("route") / f"sm_{request.param}.cubin"
    command = [nvcc, "-O3", "-std=c++17", "-cubin", f"-arch=sm_{request.param}", "-Xptxas", "-v", "-o", str(cubin)]
    command.append(str(ROOT / "csrc" / "cuda" / "route.cu"))
    report = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unsupported" in report.stderr.lower() and report.returncode:
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    assert report.returncode == 0, report.stderr

    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, report.stderr)))

    tool = disassembler()
    if tool is None:
        pytest.skip("needs cuobjdump, from a CUDA toolkit or Triton")
    assembly = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    return Compiled(
        request.param,
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes smem"),
        Counter(re.findall(r"\b((?:LDG|STG|LDL|STL|ATOM|ATOMG|RED|BAR)\b[.\w]*)", assembly)),
    )


def test_the_route_kernel_keeps_within_its_budget(compiled: Compiled) -> None:
    assert compiled.registers, compiled
    assert compiled.registers <= MOST_REGISTERS, compiled
    assert compiled.spilled_bytes == compiled.stack_bytes == 0, compiled
    assert compiled.shared_bytes <= MOST_SHARED_BYTES, compiled


def test_rows_are_copied_by_128_bits_and_four_at_a_time(compiled: Compiled) -> None:
    loads = sum(n for name, n in compiled.instructions.items() if name.startswith("LDG") and "128" in name)
    stores = sum(n for name, n in compiled.instructions.items() if name.startswith("STG") and "128" in name)
    assert loads >= 4, compiled
    assert stores >= 4, compiled


def test_the_route_kernel_has_no_atomic_instruction_and_no_local_memory(compiled: Compiled) -> None:
    unwanted = [n for n in compiled.instructions if n.startswith(("ATOM", "RED", "LDL", "STL"))]
    assert not unwanted, compiled


def test_the_route_kernel_is_valid_ptx_for_later_architectures() -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = str(ROOT / "csrc" / "cuda" / "route.cu")
    command = [nvcc, "-O3", "-std=c++17", "-ptx", "-arch=compute_120", "-o", "-", source]
    ptx = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert ".visible .entry" in ptx
    assert "cudaGraphSetConditional" in ptx
