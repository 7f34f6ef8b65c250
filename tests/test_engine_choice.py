"""Which engine a stage gets, and what is said where it cannot have the one that was asked for."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import conv_block
from engine_cases import COMPILED, Pooled, needs, network
from torch import Tensor, nn

from dgate_rt import ExecutorError, StagedModel
from dgate_rt.cache import cache_dir
from dgate_rt.engines import ENGINES, auto, build, precision, prepare
from dgate_rt.timing import Timing


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGATE_RT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Unknown(nn.Module):
    """An operator that no engine outside of torch has."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x.flatten(1)[:, :4].unflatten(1, (2, 2))).real


@pytest.mark.parametrize("engine", [needs("openvino"), needs("onnxruntime")])
def test_an_operator_that_an_engine_does_not_have_is_named(engine):
    staged = StagedModel([conv_block(3, 4), Unknown()], cuts=["stem"]).eval()
    with pytest.raises(ExecutorError, match=r"cannot run stage 1, the last: .*aten\.linalg_eig") as raised:
        prepare(staged, engine, sizes=[4], sample_shape=(3, 8, 8))
    assert "\x1b" not in str(raised.value)


class Stubborn(nn.Module):
    """Runs in torch and nowhere else: what it does depends on its data, on the host."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2.0 if x.sum().item() == x.sum().item() else 1.0)


@pytest.mark.parametrize("engine", [needs(engine) for engine in COMPILED])
def test_an_engine_that_cannot_run_a_stage_names_it(engine):
    staged = StagedModel([conv_block(3, 4), Stubborn(), Pooled(4)], cuts=["stem", "odd"]).eval()
    with pytest.raises(ExecutorError, match=rf"engine: {engine} cannot run stage 1, which ends at odd: "):
        prepare(staged, engine, sizes=[4], sample_shape=(3, 8, 8))


def test_auto_falls_back_stage_by_stage_and_says_so(monkeypatch):
    class Picky:
        name = any_size = "picky"
        devices, packages = ("cpu",), ()

        def __call__(self, stage, example, sizes):
            if isinstance(stage, Stubborn):
                raise NotImplementedError("no")
            return stage

    monkeypatch.setattr(auto, "ENGINES", {"eager": ENGINES["eager"], "picky": Picky})
    monkeypatch.setattr(auto, "interleaved", lambda jobs, rounds: [Timing.of([ms]) for ms in (5.0, 2.0)])
    staged = StagedModel([conv_block(3, 4), Stubborn(), Pooled(4)]).eval()
    stages = prepare(staged, "auto", sizes=[4], sample_shape=(3, 8, 8))
    assert stages.engine == "picky"
    text = "\n".join(stages.describe())
    assert "ms a sample picky 0.5, eager 1.25" in text
    assert "stage 1 runs on eager, picky cannot run it: NotImplementedError: no" in text
    assert "measured now" in text
    monkeypatch.setattr(auto, "measure", None)  # is not called again
    assert "measured before" in "\n".join(prepare(staged, "auto", sizes=[4], sample_shape=(3, 8, 8)).describe())
    monkeypatch.setattr(auto, "measure", lambda *_: ({"eager": 1.0}, ["looked again"]))
    again = prepare(staged, "auto", sizes=[4], sample_shape=(3, 8, 8), remeasure=True)
    assert "looked again" in "\n".join(again.describe())
    assert prepare(staged, "auto", sizes=[4], sample_shape=(3, 8, 8)).engine == "eager"


def test_auto_takes_no_engine_that_answers_otherwise(monkeypatch):
    class Wrong:
        name = any_size = "wrong"
        devices, packages = ("cpu",), ()

        def __call__(self, stage, example, sizes):
            return lambda *tensors: stage(*tensors) * 1.1

    monkeypatch.setattr(auto, "ENGINES", {"eager": ENGINES["eager"], "wrong": Wrong})
    stages = prepare(network("conv"), "auto", sizes=[4], sample_shape=(3, 16, 16))
    assert stages.engine == "eager"
    assert "wrong not taken: its logits lie" in "\n".join(stages.describe())


def test_a_damaged_choice_is_measured_again(monkeypatch):
    monkeypatch.setattr(auto, "ENGINES", {"eager": ENGINES["eager"]})
    for text in ("{", "[1]", json.dumps({"gone": 1.0})):
        (cache_dir() / "key.json").write_text(text)
        assert auto._recalled("key.json") is None
    assert prepare(network("conv"), "auto", sizes=[2], sample_shape=(3, 16, 16)).engine == "eager"


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_engine_that_is_not_installed_names_the_extra(monkeypatch, engine):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ExecutorError, match=rf'needs .*: pip install "dgate-rt\[{engine}\]"'):
        prepare(network("conv"), engine, sizes=[4], sample_shape=(3, 16, 16))


@pytest.mark.parametrize("engine", [needs("onnxruntime")])
def test_onnxruntime_has_no_bfloat16(engine, monkeypatch):
    monkeypatch.setattr(precision, "supports_bfloat16", lambda device: True)
    with pytest.raises(ExecutorError, match="expected float32, got bfloat16"):
        prepare(network("conv"), engine, sizes=[4], sample_shape=(3, 16, 16), dtype="bfloat16")


def test_bad_arguments_are_named(monkeypatch):
    options = {"sizes": [4], "sample_shape": (3, 16, 16)}
    with pytest.raises(ValueError, match=r"engine: expected one of 'auto', 'eager', .*got 'fast'"):
        prepare(network("conv"), "fast", **options)
    with pytest.raises(TypeError, match="engine: expected a name or a function, got int"):
        prepare(network("conv"), 3, **options)
    with pytest.raises(ValueError, match="dtype: expected None, 'float32' or 'bfloat16', got 'int8'"):
        prepare(network("conv"), dtype="int8", **options)
    with pytest.raises(ValueError, match="sizes: expected whole numbers of at least 1, got"):
        prepare(network("conv"), sizes=[0], sample_shape=(3, 16, 16))
    for sizes in ([[1, 4]], [[1, 4], [8]]):
        with pytest.raises(ValueError, match="sizes: expected them for 2 stages, with the same largest, got"):
            prepare(network("conv"), sizes=sizes, sample_shape=(3, 16, 16))
    monkeypatch.setattr(precision, "supports_bfloat16", lambda device: False)
    with pytest.raises(ExecutorError, match="bfloat16 was asked for, but cpu here has no instructions for it"):
        prepare(network("conv"), dtype="bfloat16", **options)
