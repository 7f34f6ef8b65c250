"""Compile, with no GPU, the kernels that `gate_score.score` launches; prints one JSON row per kernel and architecture.

Run as a script, in a process of its own: the interpreter is switched off before triton is imported. The launches are
recorded from a call on fake CUDA tensors, so what is compiled is what would run, specialised as it would be. Standard
input is a JSON list of cases, each ``{"name", "features", "classes", "pool", "criterion", "count", "keep_distances",
"archs"}``, with features ``{"shape", "dtype", "channels_last", "sliced"}``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections import Counter
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # what comes from a cache has no log

import torch
import triton
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dgate_rt.gate import pooled_width
from dgate_rt.kernels import gate_score

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages")


def recorded_launches(case: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Each kernel that the case launches, with its arguments by name."""
    launches = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def record(**kwargs: Any) -> None:
                launches.append((self.kernel, kwargs | {"grid": grid}))

            return record

    gate_score.wrap_triton = Recorder
    shape, dtype = case["features"]["shape"], getattr(torch, case["features"]["dtype"])
    classes, pool = case["classes"], case["pool"]
    with FakeTensorMode(), torch.device("cuda"):
        features = torch.empty(shape, dtype=dtype)
        if case["features"]["channels_last"]:
            features = features.to(memory_format=torch.channels_last)
        if case["features"]["sliced"]:
            features = features[..., 1:]
        weight, bias = torch.empty(classes, pooled_width(tuple(features.shape[1:]), pool)), torch.empty(classes)
        count = torch.empty((), dtype=torch.int32) if case["count"] else None
        gate_score.score(features, weight, bias, pool, count, case["criterion"], case["keep_distances"])
    return launches


def source_of(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """The kernel specialised to its arguments as a launch would: on 1, on None, and on divisibility by 16."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):  # what an allocator hands out is aligned
            signature[name], aligned = POINTERS[value.dtype], True
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = specialise and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_row(kernel: Any, arguments: dict[str, Any], arch: int) -> dict[str, Any]:
    options = {name: arguments[name] for name in OPTIONS}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source_of(kernel, arguments), target=GPUTarget("cuda", arch, 32), options=options)

    def number(pattern: str) -> int:
        found = re.search(pattern, log.getvalue())
        if found is None:
            raise RuntimeError(f"ptxas log: expected {pattern!r}, got {log.getvalue()!r}")
        return int(found[1])

    return {
        "kernel": kernel.fn.__name__,
        "arch": arch,
        "registers": number(r"Used (\d+) registers"),
        "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "shared_bytes": compiled.metadata.shared,
        "loads": loads_by_width(compiled.asm["ptx"]),
        "grid": arguments["grid"],
        "options": options,
        "constants": {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr},
    }


def loads_by_width(ptx: str) -> dict[int, int]:
    """How many loads from global memory there are of each width in bytes."""
    widths = [int(v or 1) * int(bits) // 8 for v, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)]
    widths += [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (0x\w+)", ptx)]
    return dict(Counter(widths))


def main(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        for kernel, arguments in recorded_launches(case):
            for arch in case["archs"]:
                print(json.dumps({"case": case["name"], **compile_row(kernel, arguments, arch)}), flush=True)


if __name__ == "__main__":
    main(json.load(sys.stdin))
