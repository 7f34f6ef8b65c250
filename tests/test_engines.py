"""Stages on an engine answer as the stages themselves do, at any number of rows."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from engine_cases import COMPILED, installed, needs, network
from programs import all_margins, in_band, make_program, random_gates, thresholds_for
from torch import Tensor

import dgate_rt as dg
from dgate_rt import reference
from dgate_rt.engines import PreparedStage, openvino, precision, prepare
from dgate_rt.plan import likely_sizes
from dgate_rt.staged import as_tuple

SIZES = {"inductor": (4, 64)}  # it takes seconds a size
ROWS = (1, 3, 16, 17, 64)


@pytest.fixture(scope="module")
def images() -> Tensor:  # [64, 3, 16, 16]
    return (
        torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        * torch.linspace(0.2, 2, 64)[:, None, None, None]
    )


@pytest.fixture(scope="module")
def prepared():
    """Networks on engines, each prepared once."""
    made = {}

    def get(engine: str, kind: str, dtype: str | None = None):
        if (engine, kind, dtype) not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(precision, "supports_bfloat16", lambda device: True)  # emulated: right, and slow
                made[engine, kind, dtype] = prepare(
                    network(kind),
                    engine,
                    sizes=SIZES.get(engine, (1, 4, 64)),
                    sample_shape=(3, 16, 16),
                    dtype=dtype,
                    channels_last=kind != "vit",
                )
        return made[engine, kind, dtype]

    return get


KINDS = ("conv", "in place", "residual", "vit")


@pytest.mark.parametrize(("engine", "kind"), [needs(engine, kind) for engine in ("eager", *COMPILED) for kind in KINDS])
def test_every_engine_agrees_with_the_network_at_any_number_of_rows(prepared, images, engine, kind):
    stages, plain = prepared(engine, kind), network(kind)
    layout = torch.contiguous_format if engine == "onnxruntime" else torch.channels_last
    for count in ROWS:
        with torch.inference_mode():
            got, expected = images[:count], images[:count]
            for index in range(2):
                got, expected = stages.run_stage(index, got), plain.run_stage(index, expected)
                assert type(got) is type(expected)
                for a, b in zip(as_tuple(got), as_tuple(expected), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
                    if index == 0 and a.ndim == 4:
                        assert a.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("engine", [needs(engine) for engine in ("eager", "inductor", "openvino")])
def test_bfloat16_agrees_but_for_samples_in_the_boundary_band(prepared, images, engine):
    stages = prepared(engine, "conv", "bfloat16")
    assert stages.input_dtype is torch.bfloat16
    rounded = network("conv").to(torch.bfloat16).float()
    gates = random_gates(rounded, images, classes=5)
    margins = all_margins(rounded, gates, images)
    with torch.inference_mode():
        features = stages.gate_features(0, stages.run_stage(0, images.bfloat16()))
        assert features.dtype is torch.bfloat16
        margin = gates[0].score(features)[0]
    thresholds = thresholds_for(margins, 0.4)
    flipped = (margin >= thresholds[0]) != (margins[0] >= thresholds[0])
    wide = in_band(margins, list(thresholds), torch.bfloat16)
    near = (margins[0] - thresholds[0]).abs() <= 2e-2 * margins[0].abs().max()
    assert (wide | near)[flipped].all()
    assert flipped.sum() <= 3


@pytest.mark.parametrize("engine", [needs(engine) for engine in COMPILED])
def test_a_gated_runtime_answers_alike_on_every_engine(prepared, images, engine, monkeypatch):
    staged = network("conv")
    gates = random_gates(staged, images, classes=5)
    margins = all_margins(staged, gates, images)
    thresholds = thresholds_for(margins, 0.4)
    program = make_program(staged, gates, thresholds, images)
    monkeypatch.setattr("dgate_rt.compiling.prepare", lambda *args, **options: prepared(engine, "conv"))
    for executor in ("dense", "eager"):
        run = dg.compile(program, executor=executor, engine=engine, batch_size=64)
        out = run(images)
        expected = thresholds if executor == "eager" else (float("inf"),)
        with torch.inference_mode():
            labels, scores, exits = reference.predict(staged, gates, expected, images)
        same = out.exits == exits
        assert (same | in_band(margins, thresholds)).all()
        assert torch.equal(out.labels[same], labels[same])
        torch.testing.assert_close(out.scores[same], scores[same], rtol=1e-4, atol=1e-4)
        assert f"engine {engine}" in run.describe()


@pytest.mark.parametrize("engine", [needs(engine) for engine in ("inductor", "openvino")])
def test_padding_never_reaches_a_result(prepared, images, engine):
    stages = prepared(engine, "residual")
    with torch.inference_mode():
        clean = stages(images[:17]).clone()
        stages(torch.full_like(images, float("nan")))  # what lies in every padding row from now on
        assert torch.equal(stages(images[:17]), clean)
        assert torch.equal(stages(images[:3]), stages(images[:4])[:3])


@pytest.mark.parametrize("engine", [needs(engine) for engine in ("eager", *COMPILED)])
def test_input_of_any_layout(prepared, images, engine):
    stages = prepared(engine, "conv")
    with torch.inference_mode():
        flipped = images.transpose(2, 3)
        torch.testing.assert_close(stages(flipped), stages(flipped.contiguous()).clone(), rtol=1e-4, atol=1e-4)
        every_second = images[::2]
        torch.testing.assert_close(stages(every_second), network("conv")(every_second), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", [needs(engine) for engine in COMPILED])
def test_more_rows_than_prepared_are_cut_up(prepared, images, engine):
    many = torch.cat([images, images[:17]])
    with torch.inference_mode():
        torch.testing.assert_close(prepared(engine, "conv")(many), network("conv")(many), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", [needs(engine) for engine in ("eager", *COMPILED)])
def test_threads_do_not_share_memory(prepared, images, engine):
    stages, plain = prepared(engine, "residual"), network("residual")
    failures = []

    def work(count: int) -> None:
        for start in range(0, 30, 3):
            x = images[start : start + count]
            with torch.inference_mode():
                got, expected = stages(x), plain(x)
            if not torch.allclose(got, expected, rtol=1e-4, atol=1e-4):
                failures.append((count, start))

    threads = [threading.Thread(target=work, args=(count,)) for count in (2, 3, 31)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_result_outlives_calls_of_other_stages(prepared, images):
    for engine in filter(installed, COMPILED):
        stages = prepared(engine, "residual")
        with torch.inference_mode():
            crossing = stages.run_stage(0, images)
            kept = [t.clone() for t in crossing]
            stages.run_stage(1, crossing)
        assert all(torch.equal(a, b) for a, b in zip(crossing, kept, strict=True))


def test_a_function_is_an_engine_and_sees_exactly_the_prepared_sizes(images):
    seen: list[tuple[int, ...]] = []

    def spy(stage, example, sizes):
        seen.append(tuple(sizes))

        def run(*tensors):
            seen.append((len(tensors[0]),))
            return stage(*tensors)

        return run

    stages = prepare(network("residual"), spy, sizes=[4, 16, 4], sample_shape=(3, 16, 16))
    assert (stages.engine, stages.sizes(0), stages.sizes(1)) == ("spy", (4, 16), (4, 16))
    seen.clear()
    with torch.inference_mode():
        torch.testing.assert_close(stages(images[:5]), network("residual")(images[:5]), rtol=1e-4, atol=1e-4)
        stages(images[:3])
    assert seen == [(16,), (16,), (4,), (4,)]


def test_a_runtime_in_bfloat16_takes_the_batches_of_its_program(images, monkeypatch):
    monkeypatch.setattr(precision, "supports_bfloat16", lambda device: True)
    staged = network("conv")
    gates = random_gates(staged, images, 5)
    program = make_program(staged, gates, thresholds_for(all_margins(staged, gates, images), 0.5), images)
    run = dg.compile(program, dtype="bfloat16", batch_size=64)
    out = run(images)
    assert out.scores.dtype is torch.float32
    assert (out.exits == dg.compile(program)(images).exits).float().mean() >= 0.95
    assert torch.equal(run(images.bfloat16()).exits, out.exits)
    assert next(staged.parameters()).dtype is torch.float32
    with pytest.raises(TypeError, match=r"x: expected torch.float32, got torch.float64"):
        run(images.double())


def test_buckets_are_the_sizes_to_prepare(images):
    staged, sizes = network("conv"), []
    program = make_program(staged, random_gates(staged, images, 5), (0.5,), images)

    def spy(stage, example, given):
        sizes.append(tuple(given))
        return stage

    dg.compile(program, engine=spy, batch_size=32, buckets=[5, 48])
    assert sizes == [(5, 32)] * 2
    dg.compile(program, engine=spy, batch_size=32, executor="eager")
    assert sizes[2:4] == likely_sizes(32, program.point.shares)
    dg.compile(program, engine=spy, batch_size=32, executor="refill")
    assert sizes[4:] == [(1, 4, 16, 32)] * 2
    for batch_size, expected in ((1, (1,)), (3, (1, 3)), (60, (1, 4, 16, 30, 60)), (64, (1, 4, 16, 32, 64))):
        dg.compile(program, engine=spy, batch_size=batch_size, executor="refill")
        assert sizes[-2:] == [expected] * 2


def test_a_prepared_stage_keeps_its_parameters_where_the_engine_runs_in_torch(prepared):
    assert isinstance(prepared("inductor", "conv").stages[0], PreparedStage)
    assert list(prepared("inductor", "conv").parameters())


@pytest.mark.parametrize("engine", [needs("openvino")])
def test_openvino_writes_images_where_they_are_wanted(prepared, engine):
    stage = prepared(engine, "conv").stages[0]
    for compiled in stage.run._compiled.values():
        kinds = [node.get_rt_info()["layerType"] for node in compiled.get_runtime_model().get_ops()]
        assert "Transpose" not in kinds


@pytest.mark.parametrize("engine", [needs("openvino")])
@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not taken"])
def test_openvino_generates_no_code_for_casts_alone(engine, taken, monkeypatch):
    """Nor does it matter if a version does not know how to leave it."""
    if not taken:
        monkeypatch.setattr(openvino, "_GENERATION", "NO_SUCH_PROPERTY")
    monkeypatch.setattr(precision, "supports_bfloat16", lambda device: True)
    options = {"sample_shape": (3, 16, 16), "dtype": "bfloat16", "channels_last": True}
    stages = prepare(network("conv"), engine, sizes=[2, 4], **options)
    with torch.inference_mode():
        assert stages(torch.ones(4, 3, 16, 16, dtype=torch.bfloat16)).isfinite().all()
    compiled = [model for stage in stages.stages for model in stage.run._compiled.values()]
    assert any(map(openvino._generates_casts_alone, compiled)) != taken


@pytest.mark.parametrize("engine", [needs("openvino")])
@pytest.mark.parametrize("more_at", [(), (2,), (4,)], ids=str)
def test_code_that_one_size_needs_is_generated_at_all(engine, more_at, monkeypatch):
    monkeypatch.setattr(precision, "supports_bfloat16", lambda device: True)
    batch_size = lambda compiled: compiled.inputs[0].shape[0]  # noqa: E731 - short
    monkeypatch.setattr(openvino, "_generates_casts_alone", lambda compiled: batch_size(compiled) not in more_at)
    compile_all, options = openvino._compiled, []
    monkeypatch.setattr(
        openvino, "_compiled", lambda models, given: options.append(given) or compile_all(models, given)
    )
    prepare(network("conv"), engine, sizes=[2, 4], sample_shape=(3, 16, 16), dtype="bfloat16", channels_last=True)
    assert [openvino._GENERATION in given for given in options] == ([False] * 2 if more_at else [False, True] * 2)


_TWO_NETWORKS_END = """
import os, signal
import torch
from torch import nn
from dgate_rt import StagedModel
from dgate_rt.engines import prepare

def prepared():
    return prepare(StagedModel([nn.Linear(4, 4)]).eval(), "openvino", sizes=[2], sample_shape=(4,))

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
first, second = prepared(), prepared()
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.parametrize("engine", [needs("openvino")])
def test_a_signal_finds_its_stack_after_networks_have_ended(engine):
    command = [sys.executable, "-X", "faulthandler", "-c", _TWO_NETWORKS_END]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "handled\n"), run.stderr


def test_which_engines_have_threads_of_their_own(prepared):
    for engine in filter(installed, ("eager", *COMPILED)):
        assert prepared(engine, "conv").own_threads is (engine in ("openvino", "onnxruntime"))


@pytest.mark.parametrize("engine", [needs("openvino"), needs("onnxruntime")])
def test_one_sample_at_a_time(images, engine):
    stages = prepare(network("residual"), engine, sizes=[1], sample_shape=(3, 16, 16), channels_last=True)
    with torch.inference_mode():
        torch.testing.assert_close(stages(images[:2]), network("residual")(images[:2]), rtol=1e-4, atol=1e-4)
