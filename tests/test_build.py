"""What is built where, and what an installation without the extension does."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import dgate_rt
from dgate_rt import ops

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module; it sets up only when it is run."""
    spec = importlib.util.spec_from_file_location("dgate_rt_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("setting", "torch_cuda", "toolkit", "wanted"),
    [
        ("auto", "13.0", (13, 0), True),
        ("auto", "13.0", (13, 2), True),
        ("auto", "13.0", (12, 8), False),
        ("auto", "13.0", None, False),
        ("auto", None, (13, 0), False),
        ("1", "13.0", (13, 0), True),
        ("0", "13.0", (13, 0), False),
    ],
    ids=str,
)
def test_cuda_is_built_with_a_cuda_torch_and_its_toolkit(
    build: ModuleType, setting: str, torch_cuda: str | None, toolkit: tuple[int, int] | None, wanted: bool
) -> None:
    found = build.Toolkit(Path("/opt/cuda"), toolkit) if toolkit else None
    decision, why = build.wants_cuda(setting, torch_cuda, found)
    assert decision is wanted
    assert why


@pytest.mark.parametrize(
    ("setting", "torch_cuda", "toolkit", "message"),
    [
        ("1", "13.0", None, "nvcc was not found; install the CUDA toolkit 13.0"),
        ("1", None, (13, 0), "install a CUDA build of torch"),
        ("1", "13.0", (12, 8), r"nvcc is of CUDA 12\.8 and torch of CUDA 13\.0; install the CUDA toolkit 13\.0"),
        ("yes", "13.0", (13, 0), "DGATE_RT_BUILD_CUDA: expected auto, 0 or 1, got 'yes'"),
        ("", None, None, "DGATE_RT_BUILD_CUDA: expected auto, 0 or 1, got ''"),
    ],
    ids=str,
)
def test_cuda_that_cannot_be_built_is_an_error_that_says_what_to_install(
    build: ModuleType, setting: str, torch_cuda: str | None, toolkit: tuple[int, int] | None, message: str
) -> None:
    found = build.Toolkit(Path("/opt/cuda"), toolkit) if toolkit else None
    with pytest.raises(ValueError, match=message):
        build.wants_cuda(setting, torch_cuda, found)


def script(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_toolkit_is_found_behind_a_script_that_calls_nvcc(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cuda-13.2").mkdir()
    version = 'echo "Cuda compilation tools, release 13.2, V13.2.1"'
    answer = f'case "$*" in --version) {version};; *) echo "#$ TOP={tmp_path}/cuda-13.2" >&2;; esac'
    script(tmp_path / "bin", "nvcc", answer)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)
    assert build.find_toolkit() == build.Toolkit(tmp_path / "cuda-13.2", (13, 2))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert build.find_toolkit() is None


def test_the_compiler_is_cxx_or_the_first_on_the_path(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert build.find_compiler() is None
    script(tmp_path, "clang++", "")
    assert build.find_compiler() == "clang++"
    monkeypatch.setenv("CXX", "clang++ -stdlib=libc++")
    assert build.find_compiler() == "clang++ -stdlib=libc++"
    monkeypatch.setenv("CXX", "missing-c++")
    assert build.find_compiler() is None


@pytest.mark.parametrize("setting", ["auto", "0"])
def test_without_a_compiler_nothing_is_built_and_the_output_says_so(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("DGATE_RT_BUILD_CUDA", setting)
    assert build.extensions() == []
    assert "no C++ compiler was found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"), [("1", r"no C\+\+ compiler was found"), ("2", "expected auto, 0 or 1")]
)
def test_without_a_compiler_a_setting_that_needs_one_is_an_error(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, setting: str, message: str
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("DGATE_RT_BUILD_CUDA", setting)
    with pytest.raises(ValueError, match=message):
        build.extensions()


def run_copy(folder: Path, code: str, **binaries: bytes) -> str:
    """Run Python code against a copy of the package that has no extension but the given files."""
    source = Path(dgate_rt.__file__).parent
    shutil.copytree(source, folder / "dgate_rt", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    for name, content in binaries.items():
        (folder / "dgate_rt" / f"{name}.abi3.so").write_bytes(content)
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    command = [sys.executable, "-W", "always", "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


FALLBACK = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dgate_rt
    from dgate_rt import graphs, ops
    assert dgate_rt.__file__.startswith(sys.path[0])
    assert not [w for w in caught if "dgate_rt" in str(w.message)], "warned at import"
    features = torch.arange(12.0).view(3, 2, 2, 1)
    weight, bias = torch.eye(2), torch.zeros(2)
    margin, label = ops.gate_score(features, weight, bias)
    for _ in range(2):
        ops.gate_distances(features, weight, bias)
    i32, ids = torch.tensor(0, dtype=torch.int32), torch.arange(3)
    dest, exits = torch.zeros(3, 2, 2, 1), torch.full((3,), -1)
    ops.route_([features], ids, margin, label, None, torch.tensor([5.0]), 0, [dest], ids.clone(), i32,
               exits.clone(), margin.clone(), exits)
    print([str(w.message) for w in caught if "dgate_rt" in str(w.message)])
    print(margin.tolist(), label.tolist(), exits.tolist(), int(i32), dest[0].flatten().tolist())
    try:
        ops.gate_score(features, weight, bias, "avg", torch.tensor(4, dtype=torch.int32))
    except ValueError as error:
        print(error)
    for handle in (0, 7):
        try:
            ops.route_([features], ids, margin, label, None, torch.tensor([5.0]), 0, [dest], ids.clone(), i32,
                       exits.clone(), margin.clone(), exits, buckets=i32[None] + 3, handles=torch.tensor([handle]))
        except ValueError as error:
            print(error)
    try:
        graphs.SimulatedCapture(int)
    except dgate_rt.ExecutorError as error:
        print(error)
    print(ops.extension_loaded(), ops.build_info()["error"])
"""


@pytest.mark.parametrize("binary", [None, b"not a library"], ids=["missing", "damaged"])
def test_without_the_extension_the_reference_runs_and_says_so_once(tmp_path: Path, binary: bytes | None) -> None:
    output = run_copy(tmp_path, FALLBACK, **({"_C": binary} if binary else {})).splitlines()
    warning, results, count_error, switch_error, graph_error, info = output
    assert warning.count("dgate_rt extension is missing") == 1
    assert results == "[2.5, 6.5, 10.5] [1, 1, 1] [-1, 0, 0] 1 [0.0, 1.0, 2.0, 3.0]"
    assert count_error == "count: expected 0 to 3, got 4"
    assert switch_error == "handles: expected 0, since only the extension sets a switch, got 7"
    assert graph_error.startswith("driver: expected the extension that has 'recording', got none (")
    assert info.startswith("False ")
    assert ("not built" if binary is None else "_C.abi3.so") in info


def test_importing_touches_neither_a_gpu_nor_triton() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import dgate_rt
from dgate_rt import graphs, ops
assert not torch.cuda.is_initialized()
print([name for name in set(sys.modules) - before if name.split(".")[0] == "triton"])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built")
def test_build_info_says_what_was_built() -> None:
    info = ops.build_info()
    assert Path(info["extension"]).name == "_C.abi3.so"
    assert info["error"] is None
    assert info["compiler"]
    assert tuple(map(int, info["torch"].split(".")[:2])) >= (2, 10)
    if info["cuda"] is None:
        assert info["cuda_error"]
    else:
        assert info["cuda"]["toolkit"] >= (12, 0)
        assert info["cuda"]["devices"] >= 0
