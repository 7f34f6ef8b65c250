"""Builds the extension: dgate_rt/_C (CPU operators) and, with a CUDA toolkit, dgate_rt/_C_cuda.

Everything else about the package is in pyproject.toml. Environment:

* ``DGATE_RT_BUILD_CUDA=auto|0|1``: ``auto`` (the default) builds the CUDA half when torch is a CUDA build and a
  matching nvcc is found, whether or not this machine has a GPU; ``1`` insists on it.
* ``CXX``: the C++ compiler. Without one the package is installed without extension and runs on its PyTorch reference.
* ``TORCH_CUDA_ARCH_LIST``: the GPU architectures to compile for.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
WARNINGS = ["-Wall", "-Wextra"]


class Toolkit(NamedTuple):
    """A CUDA toolkit, as its nvcc reports it."""

    home: Path
    version: tuple[int, int]


def find_compiler() -> str | None:
    """The C++ compiler command: ``CXX`` where it is set, else the first that exists."""
    if "CXX" in os.environ:
        return os.environ["CXX"] if shutil.which(shlex.split(os.environ["CXX"])[0]) else None
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def find_toolkit() -> Toolkit | None:
    """The toolkit of ``CUDA_HOME``'s nvcc, else of the one on the path, else of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((path for path in map(shutil.which, candidates) if path), None)
    if nvcc is None:
        return None
    # A dry run names the toolkit's own folder even where nvcc is a link or a script that calls another.
    run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", run.stderr, re.MULTILINE)
    release = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    if top is None or release is None:
        return None
    return Toolkit(Path(top[1]).resolve(), (int(release[1]), int(release[2])))


def wants_cuda(setting: str, torch_cuda: str | None, toolkit: Toolkit | None) -> tuple[bool, str]:
    """Whether to build the CUDA half, and why or why not.

    Args:
        setting: the value of ``DGATE_RT_BUILD_CUDA``.
        torch_cuda: the CUDA version torch was built with, ``torch.version.cuda``.
        toolkit: what `find_toolkit` found.

    Raises:
        ValueError: if ``setting`` is none of ``auto``, ``0`` and ``1``, or is ``1`` and CUDA cannot be built.
    """
    if setting not in ("auto", "0", "1"):
        raise ValueError(f"DGATE_RT_BUILD_CUDA: expected auto, 0 or 1, got {setting!r}")
    if setting == "0":
        return False, "DGATE_RT_BUILD_CUDA=0"
    if torch_cuda is None:
        missing = "this torch is a CPU build; install a CUDA build of torch (https://pytorch.org/get-started/locally)"
    elif toolkit is None:
        missing = f"nvcc was not found; install the CUDA toolkit {torch_cuda} or set CUDA_HOME to its folder"
    elif toolkit.version[0] != int(torch_cuda.split(".")[0]):
        got = ".".join(map(str, toolkit.version))
        missing = f"nvcc is of CUDA {got} and torch of CUDA {torch_cuda}; install the CUDA toolkit {torch_cuda}"
    else:
        return True, f"torch {torch_cuda} and the toolkit in {toolkit.home}"
    if setting == "1":
        raise ValueError(f"DGATE_RT_BUILD_CUDA=1, but {missing}")
    return False, missing


def say(message: str) -> None:
    print(f"dgate-rt: {message}", file=sys.stderr, flush=True)


def sources(folder: str, *patterns: str) -> list[str]:
    """Files under ``csrc`` as setuptools wants them: relative, with forward slashes, in a fixed order."""
    found = (path for pattern in patterns for path in (ROOT / folder).glob(pattern))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def extensions() -> list[Extension]:
    """What can be built here; a compiler that is there and fails stops the installation."""
    setting = os.environ.get("DGATE_RT_BUILD_CUDA", "auto")
    compiler = find_compiler()
    if compiler is None and setting != "1":
        wants_cuda(setting, None, None)  # a wrong setting is wrong without a compiler too
        say("no C++ compiler was found (set CXX, or install g++ or clang++): installing without the extension;")
        say("the operators will run on their plain-PyTorch reference, which is slower.")
        return []
    if compiler is None:
        raise ValueError("DGATE_RT_BUILD_CUDA=1, but no C++ compiler was found; install g++ or clang++, or set CXX")
    os.environ["CXX"] = compiler  # what torch and setuptools compile and link with

    toolkit = None if setting == "0" else find_toolkit()
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit.home)  # read by torch.utils.cpp_extension when it is imported
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    common: dict[str, Any] = {"py_limited_api": True, "depends": sources("csrc", "**/*.h", "**/*.cuh")}
    cxx = ["-O3", "-fopenmp-simd", "-fvisibility=hidden", "-g0", *WARNINGS, ABI]
    needs_cuda = sources("csrc/graph", "cuda_*.cpp")
    host = [path for path in sources("csrc", "*.cpp", "cpu/*.cpp", "graph/*.cpp") if path not in needs_cuda]
    built = [CppExtension("dgate_rt._C", host, extra_compile_args={"cxx": cxx}, **common)]
    with_cuda, reason = wants_cuda(setting, torch.version.cuda, toolkit)
    say(f"{'with' if with_cuda else 'without'} CUDA: {reason}")
    if with_cuda and toolkit is not None:
        newest = "8.0;9.0;10.0;12.0+PTX" if toolkit.version >= (12, 8) else "8.0;9.0+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", newest)
        nvcc = ["-O3", "-Xcompiler", ",".join(WARNINGS), ABI, "-DUSE_CUDA"]
        args = {"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": nvcc}
        device = [*sources("csrc/cuda", "*.cpp", "*.cu"), *needs_cuda]
        built.append(CUDAExtension("dgate_rt._C_cuda", device, extra_compile_args=args, **common))
    return built


def main() -> None:
    built = extensions()
    if not built:
        setup()
        return
    from torch.utils.cpp_extension import BuildExtension

    setup(
        ext_modules=built,
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
