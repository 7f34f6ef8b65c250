"""Every rule that binds what is assembled, broken on purpose: the assembler refuses, and names the offender.

The rules of the driver itself are in `test_graph_driver`.
"""

from __future__ import annotations

import pytest
import torch
from plain_graph import FORBIDDEN, call, refused
from tensors import REFUSAL

from dgate_rt import ops
from dgate_rt.graphs import (
    AssembledGraph,
    DriverCounts,
    SimulatedCapture,
    driver_counts,
    graph_driver,
    reset_simulation,
)

pytestmark = [
    pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built"),
    pytest.mark.usefixtures("simulation"),
]


NAMES = ["stages 0 to 1", "stage 2", "stages 3 to 5"]


def assemble(nodes: str, later: str | None = None) -> AssembledGraph:
    first = SimulatedCapture(int, nodes if later is None else "kernel")
    buckets = (
        []
        if later is None
        else [{8: SimulatedCapture(int)}, {8: SimulatedCapture(int), 64: SimulatedCapture(int, later)}]
    )
    return AssembledGraph(first, buckets, driver="recording", names=NAMES[: 1 + len(buckets)])


# What a captured graph may hold: the assembler says which capture and which node.


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_a_capture_that_holds_what_a_body_may_not_is_named(kind: str, simulation: DriverCounts) -> None:
    article = "an" if kind[0] == "e" else "a"
    expected = f"captures: stages 3 to 5, bucket 64: node 3 is {article} {kind}; expected only kernels, memory copies, "
    with refused(expected, ValueError):
        assemble("", f"kernel, kernel, memory set, {kind}, kernel")
    with refused(f"captures: stages 0 to 1: node 0 is {article} {kind}; ", ValueError):
        assemble(kind)
    assert driver_counts().live == simulation.live


def test_a_capture_may_hold_all_that_a_body_may() -> None:
    allowed = "kernel, empty node, child graph(memory set, child graph(kernel)), memory set, memory copy"
    with assemble("", allowed) as graph:
        graph.launch()


def test_a_child_graph_of_a_capture_is_looked_into() -> None:
    with refused(r"stages 3 to 5, bucket 64: node 1\.2\.0 is a host call;", ValueError):
        assemble("", "kernel, child graph(kernel, kernel, child graph(host call)), kernel")


def test_a_capture_with_a_conditional_cannot_be_a_child() -> None:
    with refused(
        "stages 3 to 5, bucket 64: node 1 is a conditional; a graph that holds one cannot be a child", ValueError
    ):
        assemble("", "kernel, conditional")


def test_a_capture_with_a_kernel_of_another_context_is_named() -> None:
    with refused(
        "stages 3 to 5, bucket 64: node 1 is a kernel of another context; expected all in the one", ValueError
    ):
        assemble("", "kernel, kernel@2")


def test_a_capture_without_nodes_is_named() -> None:
    with refused("stages 3 to 5, bucket 64: expected nodes, got an empty graph", ValueError):
        assemble("", "")


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("kernel, colonel", "expected the type of a node, got 'colonel'"),
        ("kernel,", "expected the type of a node"),
        ("kernel)", r"expected a comma or the end, got '\)'"),
        ("child graph(kernel", r"expected '\)'"),
        ("child graph", r"expected '\('"),
    ],
)
def test_nodes_that_cannot_be_read_are_an_error(nodes: str, message: str, simulation: DriverCounts) -> None:
    with refused(f"nodes: {message}", ValueError):
        SimulatedCapture(int, nodes)
    assert driver_counts().live_captures == simulation.live_captures


# What the assembler is given.


def test_a_driver_that_is_too_old_is_refused() -> None:
    call("set_version", 12060)
    with refused(r"driver: expected CUDA 12\.8 or newer, got 12\.6", ValueError):
        assemble("kernel")
    call("set_version", 12080)
    assemble("kernel").close()


def test_buckets_come_smallest_first_and_each_segment_has_one() -> None:
    captures = [SimulatedCapture(int) for _ in range(3)]
    with refused(r"later: expected the buckets of stage 1 smallest first, got \[8, 4\]", ValueError):
        AssembledGraph(captures[0], [{8: captures[1], 4: captures[2]}], driver="recording")
    with refused("buckets: stage 2: expected at least one, got 0", ValueError):
        AssembledGraph(captures[0], [{}], driver="recording", names=NAMES[:2])


def test_each_segment_has_a_name() -> None:
    for names in (NAMES[:1], NAMES):
        with refused(f"names: expected 2, got {len(names)}", ValueError):
            AssembledGraph(SimulatedCapture(int), [{8: SimulatedCapture(int)}], driver="recording", names=names)


@pytest.mark.parametrize(
    ("captures", "names", "buckets", "sizes", "message"),
    [
        (2, 2, [2], 2, "captures: expected 3, got 2"),
        (3, 1, [2], 2, "names: expected 2, got 1"),
        (3, 2, [2], 1, "sizes: expected 2, got 1"),
        (0, 1, [], 0, "captures: expected 1, got 0"),
        (2, 3, [-1, 1], 0, "buckets: stage: expected at least one, got -1"),
    ],
)
def test_lists_that_do_not_fit_are_an_error(
    captures: int, names: int, buckets: list[int], sizes: int, message: str
) -> None:
    table = graph_driver("recording")
    with pytest.raises(REFUSAL[True], match=message):
        torch.ops.dgate_rt.graph_assemble(table, 0, [7] * captures, ["stage"] * names, buckets, [8] * sizes)
    with pytest.raises(REFUSAL[True], match="captures: stage: expected a graph, got 0"):
        torch.ops.dgate_rt.graph_assemble(table, 0, [0], ["stage"], [], [])


def test_whichever_call_fails_nothing_is_left_behind(simulation: DriverCounts) -> None:
    first, later = (
        SimulatedCapture(int),
        [{8: SimulatedCapture(int), 16: SimulatedCapture(int)}, {8: SimulatedCapture(int)}],
    )
    reset_simulation()
    AssembledGraph(first, later, driver="recording").close()
    calls = driver_counts().host_calls - 2  # the last two destroy it
    names = set()
    for before in range(calls):
        call("fail_after", before)
        with refused(r": cu\w+ failed: out of memory, as the simulation was told \(CUDA error 2, ") as failure:
            AssembledGraph(first, later, driver="recording")
        names.add(str(failure.value).split(" failed")[0].split(": ")[1])
        call("fail_after", -1)
        assert driver_counts()[-2:] == (simulation.live, simulation.live_captures + 4), before
    assert {"cuGraphCreate", "cuGraphAddNode", "cuGraphInstantiate", "cuGraphUpload"} < names


def test_a_graph_goes_even_where_its_instantiation_cannot(simulation: DriverCounts) -> None:
    graph = AssembledGraph(SimulatedCapture(int), driver="recording")
    call("fail_after", 0)
    with refused("destruction: cuGraphExecDestroy failed: out of memory"):
        graph.close()
    assert driver_counts().live == simulation.live + 1
    (behind_it,) = call("cuGraphCreate")  # numbers follow one another
    call("cuGraphDestroy", behind_it)
    call("cuGraphExecDestroy", behind_it - 1)
