"""A chain of stages as one graph on the recording driver: it answers as the same stages run one by one.

What the driver refuses is in `test_graph_rules`.
"""

from __future__ import annotations

import gc
import json
import re
import threading
from collections.abc import Callable

import pytest
import torch
from tensors import i32
from torch import Tensor

from dgate_rt import ops
from dgate_rt.errors import ExecutorError
from dgate_rt.graphs import (
    AssembledGraph,
    Capture,
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

WIDTH, CLASSES, BATCH = 6, 4, 32
BUCKETS = [[4, 16, 32], [8, 32], [32]]  # of stage 1, 2, 3
STAGES = len(BUCKETS) + 1
EXITS = {"none": float("inf"), "mixed": 0.4, "all": -1e30}


class Chain:
    """Stages, each with the gate behind it; the last lets all go, as a network's classifier does."""

    def __init__(self, exits: str = "mixed", seed: int = 0, device: str = "cpu") -> None:
        random = torch.Generator().manual_seed(seed)
        self.device = device
        self.layers = [torch.randn(WIDTH, WIDTH, generator=random).to(device) for _ in range(STAGES)]
        self.gates = [torch.randn(CLASSES, WIDTH, generator=random).to(device) for _ in range(STAGES)]
        self.sizes = [torch.tensor(sizes, dtype=torch.int32, device=device) for sizes in [*BUCKETS, [BATCH]]]
        with torch.device(device):
            self.bias = torch.zeros(CLASSES)
            self.thresholds = torch.tensor([EXITS[exits]] * (STAGES - 1) + [-1e30])
            self.arenas = [torch.full((BATCH, WIDTH), torch.nan) for _ in range(STAGES + 1)]
            self.ids = [torch.full((BATCH,), 2**60) for _ in range(STAGES + 1)]
            self.counts = [i32(0) for _ in range(STAGES + 1)]
            self.handles = torch.zeros(STAGES, dtype=torch.int64)
            self.labels, self.exits = torch.empty(BATCH, dtype=torch.int64), torch.empty(BATCH, dtype=torch.int64)
            self.scores = torch.empty(BATCH)
            self.chosen = i32(-1)
        self.ran: list[tuple[int, int]] = []

    def feed(self, x: Tensor) -> None:
        self.arenas[0][: len(x)] = x
        self.ids[0][: len(x)] = torch.arange(len(x), device=self.device)
        self.counts[0].fill_(len(x))
        for output in (self.labels, self.exits, self.scores):
            output.fill_(-1)
        self.ran.clear()

    def stage(self, index: int, size: int) -> None:
        self.ran.append((index, size))
        features = torch.tanh(self.arenas[index][:size] @ self.layers[index])
        count = self.counts[index]
        margin, label = ops.gate_score(features, self.gates[index], self.bias, "flat", count)
        ops.route_(
            [features], self.ids[index][:size], margin, label, count, self.thresholds, index,
            [self.arenas[index + 1]], self.ids[index + 1], self.counts[index + 1],
            self.labels, self.scores, self.exits,
            buckets=self.sizes[index], bucket=self.chosen, handles=self.handles,
        )  # fmt: skip

    def capture(self, index: int, size: int) -> Capture:
        if self.device == "cpu":
            return SimulatedCapture(lambda: self.stage(index, size), "kernel, memory copy, kernel")
        self.stage(index, size)  # compiles what is compiled at the first call; no switch is set yet
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            self.stage(index, size)
        return graph

    def assemble(self) -> AssembledGraph:
        later = [{size: self.capture(index, size) for size in sizes} for index, sizes in enumerate(BUCKETS, 1)]
        driver = "recording" if self.device == "cpu" else "cuda"
        graph = AssembledGraph(self.capture(0, BATCH), later, driver)
        self.handles[: STAGES - 1] = torch.tensor(graph.switches)
        return graph

    def run_eagerly(self) -> None:
        """The stages as they are, with the host looking at each bucket that was chosen."""
        self.handles.zero_()
        size = BATCH
        for index in range(STAGES):
            self.stage(index, size)
            if int(self.chosen) == len(self.sizes[index]):
                return
            size = int(self.sizes[index][self.chosen])

    def answers(self) -> list[Tensor]:
        return [self.labels.clone(), self.scores.clone(), self.exits.clone()]


def images(n: int, seed: int = 1) -> Tensor:  # [n, WIDTH]
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("n", [1, 31, 32])
@pytest.mark.parametrize("exits", EXITS)
def test_a_graph_answers_as_its_stages_do_one_by_one(n: int, exits: str, device: str) -> None:
    chain = Chain(exits, device=device)
    with chain.assemble() as graph:
        for seed in range(3):  # the same graph, batch after batch
            chain.feed(images(n, seed))
            graph.launch()
            got, ran = chain.answers(), list(chain.ran)
            handles = chain.handles.clone()
            chain.feed(images(n, seed))
            chain.run_eagerly()
            assert all(torch.equal(a, b) for a, b in zip(got, chain.answers(), strict=True))
            assert (got[2][:n] >= 0).all()
            if device == "cpu":  # elsewhere a stage is seen only while it is captured
                assert ran == chain.ran
            chain.handles.copy_(handles)
    stages = [index for index, _ in chain.ran]
    assert stages == {"none": [0, 1, 2, 3], "all": [0]}.get(exits, stages)


def test_the_device_picks_the_smallest_bucket_that_holds_the_survivors() -> None:
    chain = Chain("none")
    with chain.assemble() as graph:
        for n, bucket in ((4, 4), (5, 16), (17, 32)):
            chain.feed(images(n))
            graph.launch()
            assert chain.ran[1] == (1, bucket)


def test_graphs_run_side_by_side() -> None:
    chains = [Chain("mixed", seed) for seed in range(3)]
    graphs = [chain.assemble() for chain in chains]
    assert len({handle for graph in graphs for handle in graph.switches}) == 3 * (STAGES - 1)
    for chain in chains:
        chain.feed(images(BATCH))
    for graph in graphs[::-1]:
        graph.launch()
    graphs[1].close()
    for chain, graph in zip(chains, graphs, strict=True):
        if graph is not graphs[1]:
            chain.feed(images(BATCH))
            graph.launch()
        got = chain.answers()
        chain.feed(images(BATCH))
        chain.run_eagerly()
        assert all(torch.equal(a, b) for a, b in zip(got, chain.answers(), strict=True))
    for graph in graphs:
        graph.close()


def test_threads_may_launch_graphs_of_their_own_and_one_that_they_share() -> None:
    chains = [Chain("mixed", seed) for seed in range(3)]
    shared = Chain("none")
    shared.feed(images(BATCH))
    graphs = [chain.assemble() for chain in chains]
    shared_graph = shared.assemble()
    failures: list[BaseException] = []

    def work(chain: Chain, graph: AssembledGraph) -> None:
        try:
            for _ in range(10):
                chain.feed(images(BATCH))
                graph.launch()
                shared_graph.launch()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(chains, graphs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(shared.ran) == 3 * 10 * STAGES
    for graph in (*graphs, shared_graph):
        graph.close()


@pytest.mark.parametrize(("exits", "stages"), [("none", STAGES), ("all", 1)])
def test_a_launch_is_one_call_and_neither_waits_nor_allocates(exits: str, stages: int) -> None:
    chain = Chain(exits)
    with chain.assemble() as graph:
        alive = driver_counts()[-2:]
        chain.feed(images(BATCH))
        reset_simulation()
        graph.launch()
        expected = DriverCounts(1, stages, STAGES - 1, 1, 0, 0, *alive)
        assert driver_counts() == expected
        graph.launch(stream=7)
        assert driver_counts().launches == 2


def test_what_a_stage_raises_comes_out_of_the_launch() -> None:
    chain = Chain("none")
    with chain.assemble() as graph:
        chain.feed(images(BATCH))
        chain.layers[2] = torch.zeros(WIDTH + 1, WIDTH)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            graph.launch()
        assert [index for index, _ in chain.ran] == [0, 1, 2]
        chain.layers[2] = torch.zeros(WIDTH, WIDTH)
        chain.feed(images(BATCH))
        graph.launch()
        assert len(chain.ran) == STAGES


def test_describe_tells_nodes_edges_and_bodies() -> None:
    later = [{8: SimulatedCapture(int, "kernel, memory set"), 16: SimulatedCapture(int)}, {16: SimulatedCapture(int)}]
    first = SimulatedCapture(int, "kernel, child graph(kernel, empty node), memory copy")
    names = ["stages 0 to 1", "stage 2", "stages 3 to 5"]
    with AssembledGraph(first, later, driver="recording", names=names) as graph:
        told = graph.describe()
        assert (told["driver"], told["version"]) == ("recording", 13000)
        assert told["edges"] == [[0, 1], [1, 2]]
        assert [(node["id"], node["name"], node["type"]) for node in told["nodes"]] == [
            (0, "stages 0 to 1", "child graph"), (1, "stage 2", "conditional"), (2, "stages 3 to 5", "conditional"),
        ]  # fmt: skip
        assert told["nodes"][0]["holds"] == {"kernel": 2, "child graph": 1, "empty node": 1, "memory copy": 1}
        assert [node["switch"] for node in told["nodes"][1:]] == list(graph.switches)
        assert [node["default"] for node in told["nodes"][1:]] == [2, 1]
        bodies = [tuple(body.values()) for node in told["nodes"][1:] for body in node["bodies"]]
        assert bodies == [
            (0, 8, "stage 2, bucket 8", [{"type": "child graph", "holds": {"kernel": 1, "memory set": 1}}]),
            (1, 16, "stage 2, bucket 16", [{"type": "child graph", "holds": {"kernel": 1}}]),
            (0, 16, "stages 3 to 5, bucket 16", [{"type": "child graph", "holds": {"kernel": 1}}]),
        ]
        assert list(told["nodes"][1]["bodies"][0]) == ["value", "bucket", "name", "nodes"]
        dot = graph.describe("dot")
        with pytest.raises(ValueError, match="format: expected 'json' or 'dot', got 'svg'"):
            graph.describe("svg")
    statement = r' *(digraph \w+ \{|subgraph \w+ \{|\}|node \[[^]]*\];|label="[^"]*";|\w+( -> \w+)?( \[[^]]*\])?;)'
    assert all(re.fullmatch(statement, line) for line in dot.splitlines())
    assert dot.count("{") == dot.count("}") == 1 + 3
    assert re.findall(r"(n\d) -> (n\d);", dot) == [("n0", "n1"), ("n1", "n2")]
    assert re.findall(r'(n\d) -> (\w+_0) \[style=dashed, label="(\d)"\]', dot) == [
        ("n1", "b1_0_0", "0"), ("n1", "b1_1_0", "1"), ("n2", "b2_0_0", "0"),
    ]  # fmt: skip
    for name in ("stages 0 to 1", "switch of stages 3 to 5", *(name for _, _, name, _ in bodies)):
        assert f'label="{name}' in dot


def test_names_of_any_kind_are_told() -> None:
    capture, name = SimulatedCapture(int), 'a "stage"\n\\ of ünits'
    table = graph_driver("recording")
    graph, _ = torch.ops.dgate_rt.graph_assemble(table, 0, [capture.raw_cuda_graph()] * 2, [name, name], [1], [8])
    told = json.loads(torch.ops.dgate_rt.graph_describe(graph, "json"))
    assert [node["name"] for node in told["nodes"]] == [name, name]
    assert told["nodes"][1]["bodies"][0]["name"] == f"{name}, bucket 8"
    assert torch.ops.dgate_rt.graph_describe(graph, "dot").count("\n") == 11
    torch.ops.dgate_rt.graph_destroy(graph)


def test_a_graph_of_one_stage_has_no_switch() -> None:
    ran: list[int] = []
    with AssembledGraph(SimulatedCapture(lambda: ran.append(0)), driver="recording") as graph:
        graph.launch()
        assert graph.switches == ()
        assert graph.describe()["edges"] == []
        assert [node["name"] for node in graph.describe()["nodes"]] == ["stage 0"]
    assert ran == [0]


def end_by_close(graph: AssembledGraph) -> None:
    graph.close()
    graph.close()


def end_by_with(graph: AssembledGraph) -> None:
    with graph:
        pass


@pytest.mark.parametrize("end", [end_by_close, end_by_with], ids=["close", "with"])
def test_a_graph_that_is_closed_is_gone(end: Callable[[AssembledGraph], None], simulation: DriverCounts) -> None:
    graph = Chain().assemble()
    end(graph)
    assert driver_counts().live == simulation.live
    for use in (graph.launch, graph.describe):
        with pytest.raises(ValueError, match="graph: expected one that was assembled and not destroyed, got 0"):
            use()


def test_a_graph_that_is_forgotten_is_gone_without_a_call_that_waits(simulation: DriverCounts) -> None:
    graph = Chain().assemble()
    assert driver_counts().live > simulation.live
    reset_simulation()
    del graph
    assert driver_counts() == DriverCounts(0, 0, 0, 2, 0, 0, *simulation[-2:])  # its instantiation and itself


def test_a_graph_may_be_forgotten_within_a_stage_even_its_own(simulation: DriverCounts) -> None:
    forgotten = [Chain().assemble()]
    with AssembledGraph(SimulatedCapture(forgotten.clear), driver="recording") as graph:
        graph.launch()
    ran: list[int] = []

    def stage() -> None:
        forgotten.pop().close()
        gc.collect()
        ran.append(1)

    forgotten.append(AssembledGraph(SimulatedCapture(stage), driver="recording"))
    forgotten[0].launch()
    assert ran == [1]
    assert driver_counts().live == simulation.live


def test_a_driver_that_is_not_there_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match="driver: expected 'cuda' or 'recording', got 'metal'"):
        graph_driver("metal")
    assert graph_driver("recording") == graph_driver("recording") != 0
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver")
    built = ops.extension_error("_C_cuda") is None
    missing = "CUDA 12.8 or newer, got no driver" if built else "the extension that has 'cuda', got none"
    with pytest.raises(ExecutorError, match=f"^driver: expected {missing}"):
        AssembledGraph(SimulatedCapture(int), driver="cuda")
