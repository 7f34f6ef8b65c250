"""Builds what tests/simt holds and talks to it: CUDA kernels as programs for the host, with and without sanitizers."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SIMT = ROOT / "tests" / "simt"
CSRC = ROOT / "csrc"
CACHE = ROOT / ".pytest_cache" / "simt"  # programs, by the hash of all that goes into them

FLAGS = ("-std=c++17", "-O1", "-fno-omit-frame-pointer", "-Wno-unknown-pragmas")
STRICT = ("-g", "-Wall", "-Wextra", "-Werror")
# What the kernel is compiled with; the harness itself only learns of it by a macro.
SANITIZERS = {
    "plain": (),
    "asan": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "tsan": ("-fsanitize=thread",),
}
MODES = tuple(SANITIZERS)
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:history_size=1",
}
ORDERS = ("forward", "backward", "random")
PATIENCE_S = 120


class KernelError(Exception):
    """The process ended within a launch; the message is what it had to say."""


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")


def _run(command: Iterable[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def _build(name: str, command: list[str], sources: Iterable[Path], folder: Path = CACHE) -> Path:
    """Runs ``command``, a ``{}`` in it the file to make, unless a file of these sources is there already."""
    key = hashlib.sha256("\0".join([_compiler_version(), *command]).encode())
    for source in sources:
        key.update(source.read_bytes())
    target = folder / f"{name}-{key.hexdigest()[:16]}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # so that nobody sees half a file
            made = Path(scratch) / "made"
            done = _run([part.replace("{}", str(made)) for part in command])
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            made.replace(target)
    return target


@functools.cache
def _compiler_version() -> str:
    return _run([compiler() or "false", "--version"]).stdout


@functools.cache
def why_not(mode: str) -> str | None:
    """Why nothing can run in this mode here; None where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the harness switches stacks on Linux on x86-64, not {sys.platform} on {platform.machine()}"
    cxx = compiler()
    if cxx is None:
        return "no C++ compiler: install g++ or set CXX"
    with tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch) / "probe"
        source = probe.with_suffix(".cpp")
        source.write_text("int main() { return 0; }\n")
        built = _run([cxx, *SANITIZERS[mode], source, "-o", probe])
        if built.returncode != 0:
            return f"{cxx} does not link {' '.join(SANITIZERS[mode])}: {built.stderr.strip()[-200:]}"
        ran = _run([*_prefix(mode), probe])
        if ran.returncode != 0:
            return f"a program built with {' '.join(SANITIZERS[mode])} does not start: {ran.stderr.strip()[-200:]}"
    return None


@functools.cache
def _prefix(mode: str) -> tuple[str, ...]:
    """What sanitized programs are started with: their memory lies where random addresses may not leave it free."""
    fixed_addresses = ("setarch", platform.machine(), "-R")
    wanted = mode != "plain" and shutil.which("setarch") is not None
    return fixed_addresses if wanted and _run([*fixed_addresses, "true"]).returncode == 0 else ()


class Program(NamedTuple):
    """An executable, and the mode that it was built in."""

    path: Path
    mode: str

    @property
    def command(self) -> list[str]:
        return [*_prefix(self.mode), str(self.path)]


def program(
    main: Path,
    mode: str,
    csrc: Path = CSRC,  # what the kernels' includes are relative to
    folder: Path = CACHE,
    flags: tuple[str, ...] = STRICT,
) -> Program:
    """``main`` with the harness, built in this mode."""
    cxx, header = compiler() or "c++", SIMT / "simt.h"
    macro = [] if mode == "plain" else [f"-DSIMT_{mode.upper()}"]
    objects = []
    for source in (SIMT / "simt.cpp", SIMT / "memory.cpp"):
        command = [cxx, *FLAGS, *STRICT, *macro, "-c", str(source), "-o", "{}"]
        objects.append(_build(f"{source.stem}-{mode}", command, (header, source)))
    kernels = sorted(path for suffix in ("h", "cuh") for path in csrc.rglob(f"*.{suffix}"))
    includes = [f"-I{SIMT}", f"-I{csrc}"]
    command = [cxx, *FLAGS, *flags, *SANITIZERS[mode], *includes, *map(str, objects), str(main), "-o", "{}"]
    return Program(_build(f"{main.stem}-{mode}", command, (header, main, *kernels), folder), mode)


def run_once(program: Program, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that takes its case from the command line."""
    return _run([*program.command, *arguments], env=os.environ | ENVIRONMENT, timeout=PATIENCE_S)


class Harness:
    """A program that answers cases over its standard input and output; one process, until a case ends it."""

    def __init__(self, program: Program, patience_s: float = PATIENCE_S) -> None:
        self.program = program
        self.patience_s = patience_s
        self.process: subprocess.Popen[bytes] | None = None
        self.report = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this

    def ask(self, case: bytes, answer_size: int) -> bytes:
        """The answer to one case.

        Raises:
            KernelError: if the process ended, with the sanitizer's report.
        """
        if self.process is None:
            self.report.seek(0)
            self.report.truncate()
            self.process = subprocess.Popen(
                self.program.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.report,
                env=os.environ | ENVIRONMENT,
            )
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(self.patience_s, process.kill)
        watch.start()
        try:
            process.stdin.write(case)
            process.stdin.flush()
            answer = process.stdout.read(answer_size)
        except BrokenPipeError:
            answer = b""
        finally:
            watch.cancel()
        if len(answer) < answer_size:
            self.close()
            self.report.seek(0)
            text = self.report.read().decode(errors="replace")
            raise KernelError(f"exit {process.returncode}\n{text or f'no answer within {self.patience_s} s'}")
        return answer

    def close(self) -> None:
        """Ends the process: it does so by itself where its input ends."""
        if self.process is None:
            return
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
