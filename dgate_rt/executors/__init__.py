"""The ladder of executors, from the plainest to the fastest; each answers every sample alike."""

from dgate_rt.executors.base import (
    Executor,
    GatedModel,
    Predictions,
    RegroupingExecutor,
    Setup,
    StreamingExecutor,
    deploy,
    prefers_channels_last,
)
from dgate_rt.executors.dense import DenseExecutor
from dgate_rt.executors.eager import EagerExecutor
from dgate_rt.executors.early import EarlyExecutor, Ticket
from dgate_rt.executors.graph import GraphExecutor
from dgate_rt.executors.lag import LagExecutor
from dgate_rt.executors.refill import RefillExecutor

EXECUTORS: dict[str, type[Executor]] = {
    e.name: e for e in (DenseExecutor, EagerExecutor, RefillExecutor, LagExecutor, GraphExecutor)
}

__all__ = [
    "EXECUTORS",
    "DenseExecutor",
    "EagerExecutor",
    "EarlyExecutor",
    "Executor",
    "GatedModel",
    "GraphExecutor",
    "LagExecutor",
    "Predictions",
    "RefillExecutor",
    "RegroupingExecutor",
    "Setup",
    "StreamingExecutor",
    "Ticket",
    "deploy",
    "prefers_channels_last",
]
