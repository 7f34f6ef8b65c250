"""Stage engines: what runs the stages below an executor, from torch's own kernels to compilers.

A gate saves a share of what the dense network costs, so the dense network has to be the fastest that there is. On CPUs
compiled engines are several times faster than eager float32; `prepare` puts the stages of a network on one, at a few
batch sizes, and every executor for the host runs on that as it runs on the network itself.

A function ``(stage, example, sizes) -> run`` is an engine too. TensorRT, say, on a GPU (not run so far)::

    def tensorrt(stage, example, sizes):
        return torch.compile(stage, backend="tensorrt", dynamic=False)

    dg.compile(program, device="cuda", engine=tensorrt, buckets=[8, 32])
"""

from dgate_rt.engines.base import EngineStages, PreparedStage, StageEngine
from dgate_rt.engines.build import ENGINES, check_engine, missing_packages
from dgate_rt.engines.precision import DTYPES, supports_bfloat16
from dgate_rt.engines.prepare import prepare

__all__ = [
    "DTYPES",
    "ENGINES",
    "EngineStages",
    "PreparedStage",
    "StageEngine",
    "check_engine",
    "missing_packages",
    "prepare",
    "supports_bfloat16",
]
