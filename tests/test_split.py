"""`split` at named modules: stages that compute what the model computes, wherever they are cut."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dgate_rt.errors import SplitError
from dgate_rt.staged import StagedModel, as_tuple, split

RESNET = ["layer1", "layer2", "layer3"]

pytestmark = pytest.mark.usefixtures("one_thread")


def compact(tensor: Tensor, rows: list[int]) -> Tensor:
    """What the runtime does between stages: some rows, copied."""
    return tensor[torch.tensor(rows)]


def run_compacted(staged: StagedModel, x: Tensor, rows: list[int]) -> Tensor:
    """The logits of ``rows``, which alone go on behind the first cut."""
    boundary = tuple(compact(tensor, rows) for tensor in as_tuple(staged.run_stage(0, x)))
    for index in range(1, len(staged.stages)):
        boundary = staged.run_stage(index, boundary)
    return as_tuple(boundary)[0]


class Net(nn.Module):
    """A stem, a middle and a head; subclasses say how they are joined."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)))


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cut", ["layer2.0.conv1", "layer2.0.bn1", "layer2.0.bn2"])
@torch.no_grad()
def test_two_tensors_cross_inside_a_residual_branch(cut):
    model = torchvision.models.resnet18().eval()
    x = torch.randn(3, 3, 64, 64)
    outputs = []
    hook = model.get_submodule(cut).register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    expected = model(x)
    hook.remove()
    staged = split(model, [cut, "layer3"], example=x)
    boundary = staged.run_stage(0, x)
    assert isinstance(boundary, tuple)
    assert len(boundary) == 2
    torch.testing.assert_close(staged.gate_features(0, boundary), outputs[0])  # the named module's output comes first
    torch.testing.assert_close(staged(x), expected)
    torch.testing.assert_close(run_compacted(staged, x, [2, 0]), expected[[2, 0]])


@torch.no_grad()
def test_an_output_that_nobody_uses_behind_the_cut_still_crosses_for_the_gate():
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            self.middle(x)
            return self.head(x)

    model = Model().eval()
    staged = split(model, ["middle"])
    boundary = staged.run_stage(0, IMAGES)
    torch.testing.assert_close(staged.gate_features(0, boundary), model.middle(model.stem(IMAGES)))
    torch.testing.assert_close(staged(IMAGES), model(IMAGES))


def test_a_shared_module_cuts_behind_its_last_call():
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.stem(x))
            x = self.relu(self.middle(x))
            return self.head(x * 2)

    model = Model(relu=nn.ReLU(inplace=True)).eval()
    staged = split(model, ["relu"])
    assert [node.target for node in staged.stages[1].graph.nodes if node.op == "call_module"] == [
        "head.0",
        "head.1",
        "head.2",
    ]
    torch.testing.assert_close(staged(IMAGES), model(IMAGES))


@torch.no_grad()
def test_functional_operations_branches_and_values_that_do_not_depend_on_the_input():
    class Model(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(8, 1, 1))
            self.register_buffer("shift", torch.rand(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            gain = (self.scale * 2).exp()
            x = nn.functional.relu(self.stem(x)) * gain
            a, b = self.middle(x), torch.nn.functional.avg_pool2d(x, 3, 1, 1)
            x = torch.cat([a, b], 1).unflatten(1, (2, 8)).sum(1)
            return self.head(x * gain + self.shift)

    model = Model().eval()
    staged = split(model, ["stem", "middle"], example=IMAGES)
    torch.testing.assert_close(staged(IMAGES), model(IMAGES))
    names = [name for name, _ in staged.stages[2].named_parameters()] + [n for n, _ in staged.stages[2].named_buffers()]
    assert {"scale", "shift"} <= set(names)  # repeated behind the cut, not sent across it
    model.shift.add_(1)
    model.scale.data.mul_(0.5)
    torch.testing.assert_close(staged(IMAGES), model(IMAGES))


@torch.no_grad()
def test_the_batch_size_is_read_anew_behind_a_cut():
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            n, _, height, width = x.shape
            doubled = n * 2
            x = self.middle(self.stem(x))
            x = x.reshape(doubled, 4, height * width).reshape(n, 8, height, width)
            return self.head(x)

    model = Model().eval()
    staged = split(model, ["stem"], example=IMAGES)
    assert isinstance(staged.run_stage(0, IMAGES), Tensor)
    torch.testing.assert_close(run_compacted(staged, IMAGES, [3]), model(IMAGES)[[3]])
    with pytest.raises(SplitError, match=r"'stem'.*give an example="):
        split(model, ["stem"])  # height and width could be anything


@torch.no_grad()
def test_one_tensor_under_two_names_crosses_once_and_survives_work_in_place():
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.middle(self.stem(x))
            same = self.drop(x)
            return self.head(same.mul_(2) + x)

    model = Model(drop=nn.Dropout()).eval()
    staged = split(model, ["drop"])
    assert isinstance(staged.run_stage(0, IMAGES), Tensor)
    torch.testing.assert_close(run_compacted(staged, IMAGES, [2, 1]), model(IMAGES)[[2, 1]])


@torch.no_grad()
def test_attention_that_returns_two_values_can_be_cut():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(6, 8)
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor, mask: Tensor | None = None, *, strict: bool = False) -> Tensor:
            x = self.embed(x)
            if mask is not None or strict:
                raise ValueError("not used")
            y, _ = self.attend(x, x, x, need_weights=False)
            return self.head((x + y).mean(1))

    model = Model().eval()
    x = torch.randn(3, 7, 6)
    staged = split(model, ["attend"], example=x)
    assert len(as_tuple(staged.run_stage(0, x))) == 2
    torch.testing.assert_close(staged(x), model(x))


def test_an_untraceable_module_is_kept_whole_unless_it_holds_a_cut():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.shape[-1] > 4 else x

    model = Net(middle=Block()).eval()
    staged = split(model, ["middle"])
    torch.testing.assert_close(staged(IMAGES), model(IMAGES))
    with pytest.raises(SplitError, match=r"'middle' \(Block\) holds the cut 'middle.conv' and cannot be traced: Trace"):
        split(model, ["middle.conv"])


def test_split_leaves_no_trace():
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.middle(self.stem(x) * torch.arange(8).view(8, 1, 1)))

    model = Model().eval()
    model.stem.weight.requires_grad_(False)
    model.middle.train()
    attributes, flags = set(vars(model)), [module.training for module in model.modules()]
    example, random = torch.randn(2, 3, 16, 16), torch.get_rng_state()
    kept = example.clone()
    staged = split(model, ["stem"], example=example)
    assert torch.equal(example, kept)
    assert torch.equal(torch.get_rng_state(), random)
    assert set(vars(model)) == attributes
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.stem.parameters()] == [False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(staged(example), model(example))


def test_a_model_that_cannot_be_tried_is_split_but_not_checked():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.body = nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.embed(x)).mean(1))

    model, tokens = Model().eval(), torch.randint(11, (4, 5))
    staged = split(model, ["body"])
    assert not staged.checked
    torch.testing.assert_close(staged(tokens), model(tokens))
    assert split(model, ["body"], example=tokens).checked
    with pytest.raises(SplitError, match=r"'auto' has to run the model.*give an example="):
        split(model, "auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fingerprint_belongs_to_weights_and_cuts(dtype):
    model = torchvision.models.resnet18(num_classes=4).to(dtype).eval()
    example = torch.zeros(1, 3, 32, 32, dtype=dtype)
    one, two = (split(model, RESNET, example=example).fingerprint() for _ in range(2))
    assert one == two
    assert one.startswith("sha256:")
    assert one != split(model, RESNET[:2], example=example).fingerprint()
    assert one == split(model.to(memory_format=torch.channels_last), RESNET, example=example).fingerprint()
    with torch.no_grad():
        model.layer4[1].bn2.running_var[3] += 1
    assert one != split(model, RESNET, example=example).fingerprint()


@torch.no_grad()
def test_a_copy_is_whole_and_independent():
    model = torchvision.models.resnet18(num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    staged = split(model, ["layer2.0.conv1"], example=x)
    other = copy.deepcopy(staged)
    expected = staged(x)
    assert torch.equal(other(x), expected)
    assert other.fingerprint() == staged.fingerprint()
    assert (other.cuts, other.example_shape, other.checked) == (staged.cuts, (3, 32, 32), True)
    for parameter in other.parameters():
        parameter.zero_()
    assert torch.equal(staged(x), expected)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, doubled: Tensor, plain: Tensor) -> Tensor:
        return self.linear(doubled + plain)


def test_stages_one_already_has():
    join = Join()
    staged = StagedModel(stages=[Pair(), join])
    x = torch.randn(5, 4)
    assert staged.cuts == ("stage0",)
    assert staged.gate_count == 1
    boundary, logits = staged.boundaries(x)
    assert torch.equal(staged.gate_features(0, boundary), x * 2)
    assert torch.equal(logits, join.linear(x * 3))
    assert torch.equal(staged(x), join.linear(x * 3))
    with pytest.raises(ValueError, match="cuts: expected 1 for 2 stages, got 2"):
        StagedModel(stages=[Pair(), join], cuts=["a", "b"])
    with pytest.raises(ValueError, match="stages: expected at least one module"):
        StagedModel(stages=[])
    with pytest.raises(TypeError, match="stages: expected modules, got function"):
        StagedModel(stages=[run_compacted])  # type: ignore[list-item]
