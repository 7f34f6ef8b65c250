"""A program on disk: whole, unpickled, and only for its own backbone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from programs import all_margins, make_program, random_gates, thresholds_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dgate_rt as dg
from dgate_rt import StagedModel
from dgate_rt.risk import Guarantee


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.block = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x).relu()).relu().mean((2, 3)))


@pytest.fixture
def program():
    x = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    staged = dg.split(Net().eval(), ["stem", "block"], example=x[:2])
    gates = random_gates(staged, x, classes=3)
    return make_program(staged, gates, (*thresholds_for(all_margins(staged, gates, x), 0.5)[:1], float("inf")), x)


@pytest.fixture
def path(program, tmp_path):
    program.save(tmp_path / "program.safetensors")
    return tmp_path / "program.safetensors"


def edit(path, **changes):
    """Rewrite the file's metadata; a value of None deletes the key."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(path), path, {k: v for k, v in metadata.items() if v is not None})


def test_what_is_loaded_is_what_was_saved(program, path):
    loaded = dg.load(path, Net().eval())
    assert loaded.thresholds == program.thresholds
    assert loaded.point == program.point
    assert loaded.frontier == program.frontier
    assert loaded.costs == program.costs
    assert (loaded.input_shape, loaded.input_dtype) == (program.input_shape, program.input_dtype)
    x = torch.randn(50, 1, 8, 8)
    before, after = dg.compile(program)(x), dg.compile(loaded)(x)
    assert torch.equal(before.scores, after.scores)
    assert torch.equal(before.exits, after.exits)


def test_the_criteria_of_the_gates_are_kept(program, tmp_path):
    program.gates[1].criterion = dg.Criterion.ENTROPY
    program.save(tmp_path / "other.safetensors")
    loaded = dg.load(tmp_path / "other.safetensors", Net().eval())
    assert [gate.criterion for gate in loaded.gates] == [dg.Criterion.MARGIN, dg.Criterion.ENTROPY]


def test_a_guarantee_is_kept_and_older_files_have_none(program, path, tmp_path):
    guarantee = Guarantee(0.01, 0.95, 2500)
    replace(program, guarantee=guarantee).save(tmp_path / "sure.safetensors")
    assert dg.load(tmp_path / "sure.safetensors", Net().eval()).guarantee == guarantee
    assert dg.load(path, Net().eval()).guarantee is None
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["program"])
    del header["guarantee"]
    edit(path, program=json.dumps(header))
    assert dg.load(path, Net().eval()).guarantee is None


def test_a_staged_model_may_be_given_instead(program, path):
    assert dg.load(path, program.staged).staged is program.staged


def test_saving_leaves_no_partial_file(path):
    assert [p.name for p in path.parent.iterdir()] == ["program.safetensors"]


def test_another_backbone_is_refused(path):
    with pytest.raises(dg.ProgramError, match=r"backbone: expected fingerprint sha256:\w+, got sha256:"):
        dg.load(path, Net(seed=1).eval())


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        dg.load(tmp_path / "nothing.safetensors", Net().eval())


@pytest.mark.parametrize("keep", [0, 5, 100, -10], ids=["empty", "header length", "header", "data"])
def test_a_truncated_file(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(dg.ProgramError, match="damaged or foreign"):
        dg.load(path, Net().eval())


def test_a_foreign_safetensors_file(path):
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(dg.ProgramError, match=r"expected format 'dgate_rt\.program', got None"):
        dg.load(path, Net().eval())


def test_another_schema_version(path):
    edit(path, schema="99")
    with pytest.raises(dg.ProgramError, match="expected schema 2, got 99"):
        dg.load(path, Net().eval())


@pytest.mark.parametrize("damage", ["{", None, json.dumps({"cuts": ["stem", "block"]})], ids=["json", "none", "keys"])
def test_a_damaged_header(path, damage):
    edit(path, program=damage)
    with pytest.raises(dg.ProgramError):
        dg.load(path, Net().eval())


def test_gates_of_the_wrong_shape(path):
    tensors = load_file(path)
    tensors["gates.0.bias"] = torch.zeros(7)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(
        dg.ProgramError, match=r"gate 0: expected weight \[K, C\] and bias \[K\], got \[3, 4\] and \[7\]"
    ):
        dg.load(path, Net().eval())


def test_at_takes_exactly_one_target(program):
    with pytest.raises(ValueError, match="expected one of max_accuracy_drop, min_accuracy, max_cost, got none"):
        program.at()
    with pytest.raises(ValueError, match="got min_accuracy and max_cost"):
        program.at(min_accuracy=0.5, max_cost=1.0)


def test_other_cuts_are_refused(path):
    with pytest.raises(dg.ProgramError, match=r"backbone: expected cuts \['stem', 'block'\], got \['stem', 'head'\]"):
        dg.load(path, StagedModel([nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 3)], ["stem", "head"]))


def test_the_same_weights_in_another_network_are_refused(path):
    class Other(Net):
        def forward(self, x):
            return self.head(nn.functional.gelu(self.block(self.stem(x).relu())).mean((2, 3)))

    strided = Net()
    strided.block.stride = (2, 2)
    for model in (Other(), strided):
        with pytest.raises(dg.ProgramError, match="backbone: expected fingerprint"):
            dg.load(path, model.eval())


def test_a_model_without_the_cut_modules_is_refused(path):
    with pytest.raises(dg.ProgramError, match=r"backbone: expected a model with cuts .* got Linear"):
        dg.load(path, nn.Linear(8, 3).eval())
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        dg.load(path, "net")


def test_one_gate_may_serve_two_cuts(tmp_path):
    staged = StagedModel([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)]).eval()
    gate, x = dg.Gate(4, 3), torch.randn(5, 4)
    make_program(staged, nn.ModuleList([gate, gate]), (0.0, 0.0), x).save(tmp_path / "p")
    assert dg.load(tmp_path / "p", staged).thresholds == (0.0, 0.0)


def test_a_missing_folder_is_named(program, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        program.save(tmp_path / "missing" / "program.safetensors")


@pytest.mark.parametrize("thresholds", [(0.0,), (0.0, float("nan"))], ids=["count", "nan"])
def test_a_program_has_a_number_for_every_gate(program, thresholds):
    with pytest.raises(ValueError, match="thresholds: expected"):
        replace(program, thresholds=thresholds)
