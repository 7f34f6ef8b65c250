"""What `split` refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch
import torchvision
from test_split import Net
from torch import Tensor, nn

from dgate_rt.errors import SplitError
from dgate_rt.staged import split

pytestmark = pytest.mark.usefixtures("one_thread")


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
