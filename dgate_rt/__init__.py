"""dgate_rt: decision gates for trained PyTorch classifiers, and a runtime that packs what remains.

    staged  = split(model, at=["layer1", "layer2", "layer3"])
    gates   = fit(staged, train_loader)
    program = calibrate(staged, gates, val_loader, max_accuracy_drop=0.005)
    run     = compile(program, batch_size=256)
    out     = run(x)            # out.labels, out.scores, out.exits

Method: Shafiee, Shafiee, Wong, "Dynamic Representations Toward Efficient Inference on Deep Neural Networks by
Decision Gates", CVPR Workshops 2019.
"""

from dgate_rt.calibrate import calibrate
from dgate_rt.compiling import compile
from dgate_rt.errors import ExecutorError, ProgramError, SplitError, UnreachableTargetError
from dgate_rt.executors import Predictions
from dgate_rt.gate import Criterion, Gate, Pool
from dgate_rt.program import GateProgram, load
from dgate_rt.runtime import Runtime
from dgate_rt.staged import StagedModel, split
from dgate_rt.train import fit

__version__ = "0.1.0"

__all__ = [
    "Criterion",
    "ExecutorError",
    "Gate",
    "GateProgram",
    "Pool",
    "Predictions",
    "ProgramError",
    "Runtime",
    "SplitError",
    "StagedModel",
    "UnreachableTargetError",
    "calibrate",
    "compile",
    "fit",
    "load",
    "split",
]
