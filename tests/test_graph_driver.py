"""Every rule of CUDA that the recording driver checks, broken on purpose past the assembler that keeps them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from plain_graph import ASSIGN_DEFAULT, CONTEXT, FORBIDDEN, Plain, call, refused
from tensors import REFUSAL, i32

from dgate_rt import ops
from dgate_rt.graphs import AssembledGraph, SimulatedCapture, graph_driver

pytestmark = [
    pytest.mark.skipif(not ops.extension_loaded(), reason="the C++ extension is not built"),
    pytest.mark.usefixtures("simulation"),
]

# What may be put into what.


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_a_body_takes_no_graph_with_a_forbidden_node(kind: str) -> None:
    forbidden = SimulatedCapture(int, f"kernel, child graph({kind})")
    with Plain() as plain, refused(f"holds a {kind}, (which the body of a conditional may not|so it cannot be cloned)"):
        call("cuGraphAddChildGraphNode", plain.bodies[0], forbidden.raw_cuda_graph())


def test_a_graph_with_a_conditional_is_neither_a_child_nor_cloned() -> None:
    with Plain() as plain, Plain() as other:
        with refused(f"graph {plain.graph} holds a conditional, so it can be neither a child nor cloned"):
            call("cuGraphAddChildGraphNode", other.graph, plain.graph)
        captured = SimulatedCapture(int, "conditional")
        with refused("holds a conditional"):
            call("cuGraphAddChildGraphNode", other.graph, captured.raw_cuda_graph())


def test_a_graph_with_a_conditional_has_one_instantiation_at_a_time() -> None:
    with Plain() as plain:
        plain.instantiate()
        with refused(f"graph {plain.graph} holds a conditional and is instantiated already"):
            plain.instantiate()
        call("cuGraphExecDestroy", plain.execs.pop())
        plain.instantiate()


def test_a_switch_belongs_to_its_graph_and_to_one_node() -> None:
    with Plain() as plain, Plain() as other:
        with refused(f"switch {other.switch} is of graph {other.graph}, not {plain.graph}"):
            plain.add_switch(2, other.switch)
        with refused(f"switch {plain.switch} is used by node {plain.node} already"):
            plain.add_switch(2)
        with refused("no switch 12345678: never made, or destroyed"):
            plain.add_switch(2, 12345678)


def test_a_switch_without_a_node_stops_the_instantiation() -> None:
    with Plain() as plain:
        (unused,) = call("cuGraphConditionalHandleCreate", plain.graph, CONTEXT, 0, ASSIGN_DEFAULT)
        with refused(f"switch {unused} is of no conditional"):
            plain.instantiate()


def test_all_is_of_one_context() -> None:
    with Plain() as plain:
        with refused("no context 2"):
            call("cuGraphConditionalHandleCreate", plain.graph, 2, 0, ASSIGN_DEFAULT)
        (switch,) = call("cuGraphConditionalHandleCreate", plain.graph, CONTEXT, 0, ASSIGN_DEFAULT)
        with refused(f"switch {switch} is of another context"):
            plain.add_switch(1, switch, context=2)
        plain.add_switch(1, switch)
        foreign = SimulatedCapture(int, "kernel@2")
        call("cuGraphAddChildGraphNode", plain.bodies[0], foreign.raw_cuda_graph())
        with refused("is of context 2, the conditional around it of 1"):
            plain.instantiate()


def test_flags_kinds_and_sizes_that_do_not_exist_are_refused() -> None:
    with Plain() as plain:
        with refused("no flags 2 of a switch"):
            call("cuGraphConditionalHandleCreate", plain.graph, CONTEXT, 0, 2)
        with refused("knows only SWITCH nodes"):
            plain.add_switch(2, kind=0)
        with refused("a SWITCH node of no bodies"):
            plain.add_switch(0)


def test_dependencies_are_nodes_of_the_same_graph_each_once() -> None:
    with Plain() as plain, Plain() as other:
        with refused(f"node {other.first} is not of graph {plain.graph}"):
            call("cuGraphAddChildGraphNode", plain.graph, plain.before.raw_cuda_graph(), other.first)
        with refused(f"node {plain.first} is twice among the dependencies"):
            call("cuGraphAddChildGraphNode", plain.graph, plain.before.raw_cuda_graph(), plain.first, plain.first)
        with refused("no node 99999999: never made"):
            call("cuGraphAddChildGraphNode", plain.graph, plain.before.raw_cuda_graph(), 99999999)


def test_what_is_instantiated_or_captured_is_not_changed_nor_a_part_destroyed() -> None:
    with Plain() as plain:
        with refused("is captured: parts are not instantiated"):
            call("cuGraphInstantiate", plain.before.raw_cuda_graph())
        with refused("is captured, and not for changing"):
            call("cuGraphAddChildGraphNode", plain.before.raw_cuda_graph(), plain.captures[0].raw_cuda_graph())
        for use in ("cuGraphInstantiate", "cuGraphDestroy"):
            with refused(f"graph {plain.bodies[0]} is part of another"):
                call(use, plain.bodies[0])
        plain.instantiate()
        with refused(f"graph {plain.graph} is instantiated, and not for changing"):
            call("cuGraphAddChildGraphNode", plain.bodies[0], plain.before.raw_cuda_graph())


# Running: order, switches, ends.


def test_nodes_that_nothing_orders_run_out_of_order() -> None:
    ran: list[int] = []
    captures = [SimulatedCapture(lambda i=i: ran.append(i)) for i in range(3)]
    for ordered in (False, True):
        (graph,) = call("cuGraphCreate")
        nodes: list[int] = []
        for capture in captures:
            nodes += call("cuGraphAddChildGraphNode", graph, capture.raw_cuda_graph(), *(nodes[-1:] if ordered else []))
        (instantiation,) = call("cuGraphInstantiate", graph)
        call("cuGraphUpload", instantiation, 0)
        call("cuGraphLaunch", instantiation, 0)
        call("cuGraphExecDestroy", instantiation)
        call("cuGraphDestroy", graph)
    assert ran == [2, 1, 0, 0, 1, 2]


def test_a_switch_runs_the_body_of_its_value_and_none_out_of_range() -> None:
    with Plain(bodies=3) as plain:
        for value in range(3):
            assert plain.run((plain.switch, value)) == [value]
        for value in (3, 4, 2**32 - 1):
            assert plain.run((plain.switch, value)) == []
        assert plain.run() == []  # the default again, though the last launch set it


@pytest.mark.parametrize(("default", "expected"), [(0, [0]), (2, [2]), (3, [])])
def test_a_switch_that_nothing_sets_has_its_default(default: int, expected: list[int]) -> None:
    with Plain(bodies=3, default=default) as plain:
        assert plain.run() == expected
        assert plain.run((plain.switch, 1)) == [1]
        assert plain.run() == expected


def test_a_default_is_ignored_without_its_flag() -> None:
    with Plain(bodies=3, default=1, flags=0) as plain:
        assert plain.run((plain.switch, 2)) == [2]
        with refused(f"switch {plain.switch} has no value: nothing set it, and its default counts only with the flag"):
            plain.run()


def test_a_switch_is_set_once_a_launch() -> None:
    with Plain() as plain:
        with refused(f"that nothing has set in this launch, got switch {plain.switch} again"):
            plain.run((plain.switch, 1), (plain.switch, 1))
        assert plain.run((plain.switch, 1)) == [1]


def test_a_switch_that_was_passed_is_not_set_any_more() -> None:
    late: list[BaseException] = []

    def set_late() -> None:
        with refused(f"that is yet to come, got switch {plain.switch}, which was passed") as failure:
            call("cudaGraphSetConditional", plain.switch, 1)
        late.append(failure.value)

    with Plain() as plain:
        capture = SimulatedCapture(set_late)
        call("cuGraphAddChildGraphNode", plain.graph, capture.raw_cuda_graph(), plain.node)
        plain.run()
    assert late


def test_only_a_switch_of_the_graph_that_runs_is_set() -> None:
    with Plain() as plain, Plain() as other:
        of_another = f"expected a switch of the graph that runs, got switch {other.switch} of graph {other.graph} while"
        with refused(f"{of_another} graph {plain.graph} runs"):
            plain.run((other.switch, 1))
        with refused(f"{of_another} none runs"):
            call("cudaGraphSetConditional", other.switch, 1)
        with refused("expected a switch of the simulated driver, got 12345678"):
            plain.run((12345678, 1))


@pytest.mark.parametrize("fault", ["twice", "another graph", "no launch"])
def test_route_refuses_a_switch_that_it_may_not_set_before_it_writes(fault: str) -> None:
    written = i32(-1)

    def route(handle: int) -> None:
        ops.route_(
            [], torch.arange(2), torch.zeros(2), torch.zeros(2).long(), None, torch.ones(1), 0, [],
            torch.zeros(2).long(), written, torch.zeros(2).long(), torch.zeros(2), torch.zeros(2).long(),
            buckets=torch.tensor([1, 2], dtype=torch.int32), handles=torch.tensor([handle]),
        )  # fmt: skip

    def stage() -> None:
        if fault == "twice":
            route(plain.switch)
            assert written == 2
            written.fill_(-1)
        route(plain.switch if fault == "twice" else other.switch)

    messages = {
        "twice": "handles: expected a switch that nothing has set in this launch",
        "another graph": "handles: expected a switch of the graph that runs, got switch",
        "no launch": "handles: expected a switch of the graph that runs, got .* while none runs",
    }
    with Plain() as plain, Plain() as other:
        plain.before = SimulatedCapture(stage)
        call("cuGraphAddChildGraphNode", plain.graph, plain.before.raw_cuda_graph())
        with refused(messages[fault], ValueError):
            route(plain.switch) if fault == "no launch" else plain.run()
    assert written == -1


def test_a_launch_comes_after_the_upload() -> None:
    with Plain() as plain:
        plain.instantiate(upload=False)
        with refused("cuGraphLaunch failed: launched before it was uploaded"):
            plain.run()


def test_a_stage_stands_for_device_code_and_launches_nothing() -> None:
    launched: list[Callable[[], None]] = []
    with AssembledGraph(SimulatedCapture(lambda: launched[0]()), driver="recording") as graph:
        launched.append(graph.launch)
        with refused("launched from within a stage, which stands for device code"):
            graph.launch()


def test_a_stage_that_fails_fails_the_launch() -> None:
    callback = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 3)
    capture = torch.ops.dgate_rt.sim_capture(ctypes.cast(callback, ctypes.c_void_p).value, "kernel")
    graph, *_ = torch.ops.dgate_rt.graph_assemble(graph_driver("recording"), 0, [capture], ["stage 0"], [], [])
    with refused(
        rf"launch: cuGraphLaunch failed: the stage of captured graph {capture} failed with 3 \(CUDA error 719"
    ):
        torch.ops.dgate_rt.graph_launch(graph, 0)
    torch.ops.dgate_rt.graph_destroy(graph)
    torch.ops.dgate_rt.sim_release(capture)


def test_what_was_destroyed_is_not_used() -> None:
    with Plain() as plain:
        instantiation = plain.instantiate()
        plain.execs.clear()
        call("cuGraphExecDestroy", instantiation)
        for use in (("cuGraphLaunch", instantiation, 0), ("cuGraphUpload", instantiation, 0)):
            with refused(f"no instantiation {instantiation}: never made, or destroyed"):
                call(*use)
        with refused("no instantiation"):
            call("cuGraphExecDestroy", instantiation)
    with refused(f"no graph {plain.graph}: never made, or destroyed"):
        call("cuGraphDestroy", plain.graph)


def test_a_graph_that_is_destroyed_first_still_runs() -> None:
    with Plain() as plain:
        plain.instantiate()
        call("cuGraphDestroy", plain.graph)
        assert plain.run((plain.switch, 2)) == [2]
        call("cuGraphExecDestroy", plain.execs.pop())
        (plain.graph,) = call("cuGraphCreate")


def test_a_capture_that_was_released_is_not_assembled() -> None:
    capture = SimulatedCapture(int)
    number = capture.raw_cuda_graph()
    capture.release()
    capture.release()
    with refused("captures: stage 0: expected a graph, got 0", ValueError):
        AssembledGraph(capture, driver="recording")
    with pytest.raises(REFUSAL[True], match=f"capture: expected one that was simulated and not released, got {number}"):
        torch.ops.dgate_rt.sim_release(number)
    with refused(f"stage 0: cuGraphGetNodes failed: no graph {number}: never made, or destroyed"):
        torch.ops.dgate_rt.graph_assemble(graph_driver("recording"), 0, [number], ["stage 0"], [], [])


def test_a_graph_does_not_outlive_what_was_captured() -> None:
    capture = SimulatedCapture(int)
    with AssembledGraph(capture, driver="recording") as graph:
        graph.launch()
        number = capture.raw_cuda_graph()
        capture.release()
        with refused(f"use after free: captured graph {number} and its memory are gone"):
            graph.launch()
