"""`split`: stages that compute what the model computes, cut where asked, and the errors where that cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dgate_rt.errors import SplitError
from dgate_rt.staged import StagedModel, as_tuple, split

timm = pytest.importorskip("timm")

RESNET = ["layer1", "layer2", "layer3"]
DENSENET = ["features.denseblock1", "features.denseblock2", "features.denseblock3"]
CONVNEXT = ["features.1", "features.3", "features.5"]
ViT = [f"encoder.layers.encoder_layer_{index}" for index in (2, 5, 8)]
BLOCKS = ["blocks.0", "blocks.1", "blocks.3"]

# name: how to build it, how large an image, and where "auto" shall cut it
NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(), 64, RESNET),
    "resnet101": (lambda: torchvision.models.resnet101(), 48, RESNET),
    "densenet121": (lambda: torchvision.models.densenet121(), 48, DENSENET),
    "densenet201": (lambda: torchvision.models.densenet201(), 48, DENSENET),
    "mobilenet_v3_small": (
        lambda: torchvision.models.mobilenet_v3_small(),
        64,
        ["features.1", "features.3", "features.8"],
    ),
    "efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(), 64, ["features.2", "features.3", "features.5"]),
    "convnext_tiny": (lambda: torchvision.models.convnext_tiny(), 64, CONVNEXT),
    "regnet_y_400mf": (
        lambda: torchvision.models.regnet_y_400mf(),
        64,
        [f"trunk_output.block{index}" for index in (1, 2, 3)],
    ),
    "vit_b_16": (lambda: torchvision.models.vit_b_16(image_size=64), 64, ViT),
    "swin_t": (lambda: torchvision.models.swin_t(), 64, CONVNEXT),
    "googlenet": (
        lambda: torchvision.models.googlenet(aux_logits=False, init_weights=False),
        64,
        ["conv3", "inception3b", "inception4e"],
    ),
    "googlenet-aux": (
        lambda: torchvision.models.googlenet(aux_logits=True, init_weights=False),
        64,
        ["conv3", "inception3b", "inception4e"],
    ),
    "timm-resnet10t": (lambda: timm.create_model("resnet10t"), 64, RESNET),
    "timm-mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_100"), 64, BLOCKS),
    "timm-convnext": (lambda: timm.create_model("convnext_atto"), 64, [f"stages.{index}" for index in range(3)]),
    "timm-vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64),
        64,
        [f"blocks.{index}" for index in (2, 5, 8)],
    ),
    "timm-untraceable-convolutions": (
        lambda: timm.create_model("tf_efficientnet_b0"),
        64,
        ["blocks.1", "blocks.2", "blocks.4"],
    ),
}


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


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_stages_compute_what_the_model_computes(name):
    build, size, expected_cuts = NETWORKS[name]
    model = build().eval()
    x = torch.randn(3, 3, size, size)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    staged = split(model, "auto", example=x[:1])
    assert list(staged.cuts) == expected_cuts
    assert staged.checked
    assert staged.example_shape == (3, size, size)
    assert staged.example_dtype == torch.float32
    expected = model(x)
    torch.testing.assert_close(staged(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in staged.parameters()} <= own
    for index, boundary in enumerate(list(staged.boundaries(x))[:-1]):
        features = staged.gate_features(index, boundary)
        assert len(as_tuple(boundary)) == 1
        assert len(features) == 3
        if name == "swin_t":
            assert features.shape[1] == 96 * 2**index
            assert features.data_ptr() == as_tuple(boundary)[0].data_ptr()


@pytest.mark.parametrize("build", [torchvision.models.resnet18, torchvision.models.mobilenet_v3_small])
def test_no_example_is_needed(build):
    model = build(num_classes=7).eval()
    staged = split(model, "auto")
    assert staged.checked
    assert staged.example_shape is None
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(staged(x), model(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet101"])
def test_auto_finds_the_main_blocks_of_a_cifar_form(name):
    model = getattr(torchvision.models, name)(num_classes=10).eval()
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    assert split(model, "auto", example=torch.zeros(1, 3, 16, 16)).cuts == tuple(RESNET)


def test_auto_cuts_a_chain_of_one_resolution_at_quarters_of_its_cost():
    layers = [layer for _ in range(8) for layer in (nn.Linear(16, 16), nn.ReLU())]
    staged = split(nn.Sequential(*layers, nn.Linear(16, 3)).eval(), "auto")
    assert staged.cuts == ("3", "7", "11")


def test_auto_counts_the_work_of_attention():
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 64, 64, num_classes=4).eval()
    assert split(model, "auto").cuts == ("encoder.layers.encoder_layer_0",)


def test_auto_says_so_where_there_is_no_place():
    with pytest.raises(SplitError, match="'auto' found no place"):
        split(nn.Sequential(nn.Linear(8, 3)).eval(), "auto")


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


def test_a_model_whose_own_forward_branches_on_data_is_refused():
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.mean() > 0 else -x)

    with pytest.raises(SplitError, match="forward of Model cannot be traced"):
        split(Model().eval(), ["stem"])


def net() -> nn.Module:
    return Net(unused=nn.Conv2d(8, 8, 1)).eval()


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (["stam"], "no module 'stam'; near names: stem"),
        (["zzzzz"], "no module 'zzzzz'; near names: stem, middle, head"),
        (["stem", "stem"], "'stem' is named twice"),
        (["middle", "stem"], r"expected the order in which they run, \['stem', 'middle'\]"),
        (["unused"], "'unused' is never executed"),
        (["head"], "nothing runs behind 'head'"),
        (["head.2"], "nothing runs behind 'head.2'"),
        (["head.0", "head"], "nothing runs behind 'head'"),
        ([""], "no module ''"),
        ([], "expected a list of names"),
        ([3], "expected a list of names"),
        ("stem", r"pass a list: at=\['stem'\]"),
    ],
    ids=[
        "near",
        "far",
        "twice",
        "order",
        "never-run",
        "last",
        "last-leaf",
        "last-of-two",
        "root",
        "none",
        "int",
        "str",
    ],
)
def test_wrong_names_are_explained(at, message):
    with pytest.raises(SplitError, match=message):
        split(net(), at)


def test_two_names_for_one_place_are_refused():
    model = torchvision.models.resnet18().eval()
    with pytest.raises(SplitError, match=r"'layer1' and 'layer1.1' end at the same place|'layer1.1' and 'layer1'"):
        split(model, ["layer1.1", "layer1"])


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got function"):
        split(net, ["stem"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="example: expected a tensor, got list"):
        split(net(), ["stem"], example=[1.0])  # type: ignore[arg-type]
    with pytest.raises(SplitError, match=r"example: the model does not run on shape \(1, 5, 16, 16\)"):
        split(net(), ["stem"], example=torch.zeros(1, 5, 16, 16))
    with pytest.raises(SplitError, match="example: expected a batch of at least one sample"):
        split(net(), ["stem"], example=torch.zeros(0, 3, 16, 16))


def test_a_model_of_two_inputs_or_no_logits_is_refused():
    class Two(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    class Maps(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.middle(self.stem(x))

    class Several(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    for model, message in [
        (Two(), "takes one tensor"),
        (Maps(), r"expected logits \[N, K\]"),
        (Several(), "got tuple"),
    ]:
        with pytest.raises(SplitError, match=message):
            split(model.eval(), ["stem"])


def test_what_crosses_must_be_batch_first():
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.turn(self.stem(x))
            return self.head(self.middle(x.transpose(0, 1)))

    class Turn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1)

    with pytest.raises(SplitError, match="the cut 'turn' must be batch first; operation 'transpose' in 'turn'"):
        split(Model(turn=Turn()).eval(), ["turn"])


class BatchMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Whiten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, None, None, training=True)


class Always(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize(
    ("mixer", "culprit"),
    [
        (BatchMean(), "operation 'mean' in 'mixer'"),
        (Whiten(), "operation 'batch_norm' in 'mixer'"),
        (Always(), "operation 'dropout' in 'mixer'"),
        (nn.Sequential(nn.Identity(), BatchMean()), "operation 'mean' in 'mixer.1'"),
    ],
    ids=["mean", "batch-norm", "dropout", "nested"],
)
@pytest.mark.parametrize("example", [None, torch.zeros(1, 3, 16, 16)], ids=["guessed", "zeros"])
def test_a_stage_that_mixes_samples_is_refused_by_name(mixer, culprit, example):
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mixer(self.middle(self.stem(x))))

    with pytest.raises(SplitError, match=f"stage 1 does not treat samples independently: the output of {culprit}"):
        split(Model(mixer=mixer).eval(), ["stem"], example=example)


def test_a_mean_over_the_batch_in_the_root_is_named():
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x / x.abs().amax(0, keepdim=True))

    with pytest.raises(SplitError, match=r"stage 1 .* operation 'amax' in the model's own forward"):
        split(Model().eval(), ["stem"])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm2d(8), r"'norm' \(BatchNorm2d\) is in train mode.*call model.eval\(\)"),
        (nn.Dropout(0.1), r"'norm' \(Dropout\) is in train mode.*call model.eval\(\)"),
        (torchvision.ops.StochasticDepth(0.1, "row"), r"'norm' \(StochasticDepth\) is in train mode"),
    ],
    ids=["batch-norm", "dropout", "stochastic-depth"],
)
def test_train_mode_is_refused_by_name(module, message):
    model = Net(norm=module).train()
    with pytest.raises(SplitError, match=message):
        split(model, ["stem"])
    assert model.training
    assert module.training


def test_batch_norm_without_running_statistics_is_refused_even_in_eval_mode():
    model = Net(norm=nn.BatchNorm2d(8, track_running_stats=False)).eval()
    with pytest.raises(SplitError, match=r"'norm' .*track_running_stats=False"):
        split(model, ["stem"])


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
