"""Every executor answers every sample as dense execution with post-hoc gating would."""

from __future__ import annotations

import math

import pytest
import torch
from programs import TOLERANCE, all_margins, in_band, make_program, random_gates, thresholds_for

import dgate_rt as dg
from dgate_rt import StagedModel, ops, reference

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def images():
    return torch.randn(1000, 3, 16, 16) * torch.linspace(0.2, 2.0, 1000)[torch.randperm(1000), None, None, None]


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["none", "mixed", "all"])
@pytest.mark.parametrize("count", [0, 1, 31, 129, 1000], ids="N={}".format)
def test_eager_agrees_with_dense_and_post_hoc_gating(
    tiny_staged, tiny_gates, images, count, share, dtype, channels_last
):
    x = images[:count].to(dtype)
    staged = tiny_staged.to(dtype)
    margins = all_margins(staged, tiny_gates, images.to(dtype))
    thresholds = thresholds_for(margins, share)
    program = make_program(staged, tiny_gates, thresholds, images.to(dtype))
    run = dg.compile(program, batch_size=256, executor="eager", channels_last=channels_last)
    out = run(x)
    assert (out.labels.dtype, out.scores.dtype, out.exits.dtype) == (torch.int64, torch.float32, torch.int64)
    assert len(out) == count
    if count == 0:
        return
    with torch.inference_mode():
        labels, scores, exits = reference.predict(staged, tiny_gates, thresholds, x)
    band, same = in_band(margins[:, :count], thresholds, dtype), out.exits == exits
    assert (same | band).all()
    assert band.sum() <= 1 + 0.1 * count  # only few samples may hide behind float error
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.scores[same], scores[same], rtol=tolerance, atol=tolerance)
    assert (out.labels == labels)[same].float().mean() >= (1.0 if dtype is torch.float32 else 0.98)


@pytest.mark.parametrize("criterion", ["softmax", "entropy"])
def test_a_gate_may_go_by_another_criterion(tiny_staged, tiny_gates, images, criterion):
    x = images[:129]
    for gate in tiny_gates:
        gate.criterion = dg.Criterion(criterion)
    with torch.inference_mode():
        scored = [gate.score(f)[0] for gate, f in zip(tiny_gates, tiny_staged.features(x), strict=True)]
    thresholds = [float(s.quantile(0.7)) for s in scored]
    run = dg.compile(make_program(tiny_staged, tiny_gates, thresholds, x), channels_last=False)
    out = run(x)
    with torch.inference_mode():
        labels, scores, exits = reference.predict(tiny_staged, tiny_gates, thresholds, x)
    same = out.exits == exits
    assert (~same).sum() <= 2
    assert set(exits.tolist()) == {0, 1, 2, 3}
    assert torch.equal(out.labels[same], labels[same])
    torch.testing.assert_close(out.scores[same], scores[same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("executor", ["eager", "refill", "graph"])
@pytest.mark.parametrize("pool", ["grid2", "grid4"])
def test_a_gate_may_read_a_grid_of_means(tiny_staged, images, executor, pool, tmp_path):
    """It survives its file, and every executor answers as post-hoc gating does; `graph` on the simulated driver."""
    x = images[:129]
    gates = random_gates(tiny_staged, x, 5, pool)
    thresholds = thresholds_for(all_margins(tiny_staged, gates, x), 0.4)
    make_program(tiny_staged, gates, thresholds, x).save(tmp_path / "program.safetensors")
    program = dg.load(tmp_path / "program.safetensors", tiny_staged)
    assert [gate.pool for gate in program.gates] == [dg.Pool(pool)] * 3
    run = dg.compile(program, batch_size=64, executor=executor, device="cpu-sim" if executor == "graph" else "cpu")
    out = run(x)
    with torch.inference_mode():
        labels, _, exits = reference.predict(tiny_staged, gates, thresholds, x)
    same = out.exits == exits
    assert (~same).sum() <= 2
    assert len(set(exits.tolist())) == 4
    assert torch.equal(out.labels[same], labels[same])


def test_dense_is_the_network_itself(tiny_staged, tiny_gates, tiny_images):
    program = make_program(tiny_staged, tiny_gates, (-100.0,) * 3, tiny_images)
    out = dg.compile(program, executor="dense", channels_last=False)(tiny_images)
    with torch.no_grad():
        logits = tiny_staged(tiny_images)
    assert torch.equal(out.labels, logits.argmax(1))
    assert (out.exits == 3).all()


@pytest.mark.parametrize("batch_size", [1, 7, 31, 64], ids="B={}".format)
def test_a_batch_larger_than_batch_size_is_cut_up(tiny_staged, tiny_gates, tiny_images, batch_size):
    margins = all_margins(tiny_staged, tiny_gates, tiny_images)
    program = make_program(tiny_staged, tiny_gates, thresholds_for(margins, 0.4), tiny_images)
    whole = dg.compile(program, batch_size=31)(tiny_images)
    parts = dg.compile(program, batch_size=batch_size)(tiny_images)
    assert torch.equal(whole.exits, parts.exits)
    assert torch.equal(whole.labels, parts.labels)
    assert len(whole.exits.unique()) == 4


@pytest.mark.parametrize("executor", ["dense", "eager"])
def test_scores_returns_the_distances_behind_each_answer(tiny_staged, tiny_gates, tiny_images, executor):
    margins = all_margins(tiny_staged, tiny_gates, tiny_images)
    program = make_program(tiny_staged, tiny_gates, thresholds_for(margins, 0.3), tiny_images)
    out = dg.compile(program, executor=executor, scores=True)(tiny_images)
    assert out.distances.shape == (31, 5)
    assert torch.equal(out.distances.amax(1), out.scores)
    assert torch.equal(out.distances.argmax(1), out.labels)
    assert dg.compile(program, executor=executor, scores=True)(tiny_images[:0]).distances.shape == (0, 5)


def test_set_thresholds_moves_the_operating_point(tiny_staged, tiny_gates, tiny_images):
    program = make_program(tiny_staged, tiny_gates, (INF,) * 3, tiny_images)
    run = dg.compile(program)
    assert (run(tiny_images).exits == 3).all()
    run.set_thresholds([-100.0, INF, INF])
    assert (run(tiny_images).exits == 0).all()
    run.set_thresholds(torch.tensor([INF, -100.0, 0.0]))
    assert (run(tiny_images).exits == 1).all()
    assert run.thresholds == (INF, -100.0, 0.0)


def test_a_gate_that_is_off_is_not_computed(tiny_staged, tiny_gates, tiny_images, monkeypatch):
    run = dg.compile(make_program(tiny_staged, tiny_gates, (INF, 1000.0, INF), tiny_images))
    widths, score = [], ops.gate_score
    monkeypatch.setattr(
        ops,
        "gate_score",
        lambda features, *rest, **more: (widths.append(features.shape[1]), score(features, *rest, **more))[1],
    )
    run(tiny_images)
    assert set(widths) == {16}


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("executor", ["dense", "eager"])
def test_a_broken_image_runs_to_the_end_and_harms_nobody(tiny_staged, tiny_gates, tiny_images, executor, value):
    margins = all_margins(tiny_staged, tiny_gates, tiny_images)
    thresholds = thresholds_for(margins, 0.3)
    program = make_program(tiny_staged, tiny_gates, thresholds, tiny_images)
    run = dg.compile(program, executor=executor)
    last = int(
        (run(tiny_images).exits == 3).nonzero()[0]
    )  # one that runs to the end anyway: all batches keep their size
    clean, broken = run(tiny_images), tiny_images.clone()
    broken[last] = value
    out = run(broken)
    rest = torch.arange(len(tiny_images)) != last
    assert out.exits[last] == 3
    for name in ("labels", "scores", "exits"):
        assert torch.equal(getattr(out, name)[rest], getattr(clean, name)[rest]), name


def test_the_input_and_the_model_are_left_alone(tiny_staged, tiny_gates, tiny_images):
    program = make_program(tiny_staged, tiny_gates, (0.5,) * 3, tiny_images)
    before, state = tiny_images.clone(), {k: v.clone() for k, v in tiny_staged.state_dict().items()}
    run = dg.compile(program)
    run(tiny_images)
    assert torch.equal(tiny_images, before)
    assert all(torch.equal(v, state[k]) for k, v in tiny_staged.state_dict().items())
    assert all(v.is_contiguous() for v in tiny_staged.state_dict().values())
    first = run(tiny_images)
    next(tiny_staged.parameters()).data.zero_()  # a compiled runtime does not see later changes
    assert torch.equal(run(tiny_images).scores, first.scores)


def test_non_contiguous_input(tiny_staged, tiny_gates, tiny_images):
    program = make_program(tiny_staged, tiny_gates, (0.5,) * 3, tiny_images)
    run = dg.compile(program, channels_last=False)
    flipped = tiny_images.transpose(2, 3)
    assert torch.equal(run(flipped).exits, run(flipped.contiguous()).exits)


def test_several_tensors_cross_a_cut():
    class Fork(torch.nn.Module):
        def forward(self, x):
            return x * 2, x.flatten(1)[:, :3].long()

    class Join(torch.nn.Module):
        def forward(self, x, ints):
            return x.mean((2, 3)), ints, x.amax((1, 2, 3))

    class Head(torch.nn.Module):
        def forward(self, mean, ints, peak):
            return torch.cat([mean, ints.float(), peak[:, None]], 1)

    x = torch.randn(40, 4, 5, 5) * 3
    staged = StagedModel(stages=[Fork(), Join(), Head()]).eval()
    gates = random_gates(staged, x, classes=8)
    thresholds = thresholds_for(all_margins(staged, gates, x), 0.4)
    out = dg.compile(make_program(staged, gates, thresholds, x))(x)
    labels, scores, exits = reference.predict(staged, gates, thresholds, x)
    assert torch.equal(out.exits, exits)
    assert torch.equal(out.labels, labels)
    assert set(exits.tolist()) == {0, 1, 2}
    torch.testing.assert_close(out.scores, scores)


def test_a_network_without_gates_runs():
    staged = StagedModel(stages=[torch.nn.Linear(4, 3)]).eval()
    x = torch.randn(6, 4)
    out = dg.compile(make_program(staged, torch.nn.ModuleList(), (), x), scores=True)(x)
    assert out.exits.tolist() == [0] * 6
    assert out.distances.shape == (6, 3)


@pytest.fixture
def run(tiny_staged, tiny_gates, tiny_images):
    return dg.compile(make_program(tiny_staged, tiny_gates, (0.5,) * 3, tiny_images))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "x: expected a torch.Tensor, got list"),
        (torch.zeros(2, 4, 16, 16), ValueError, r"x: expected shape \[N, 3, 16, 16\], got \[2, 4, 16, 16\]"),
        (torch.zeros(3, 16, 16), ValueError, r"x: expected shape \[N, 3, 16, 16\], got \[3, 16, 16\]"),
        (torch.zeros(()), ValueError, r"x: expected shape \[N, 3, 16, 16\], got \[\]"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.float64), TypeError, "x: expected torch.float32, got torch.float64"),
        (torch.zeros(2, 3, 16, 16, device="meta"), ValueError, "x: expected a tensor on cpu, got one on meta"),
    ],
    ids=["list", "channels", "rank", "scalar", "dtype", "device"],
)
def test_wrong_input_is_refused(run, x, error, message):
    with pytest.raises(error, match=message):
        run(x)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [([0.5, 0.5], "expected 3, one a gate, got 2"), ([0.5, NAN, 0.5], "expected numbers, got")],
)
def test_wrong_thresholds_are_refused_and_nothing_changes(run, thresholds, message):
    with pytest.raises(ValueError, match=message):
        run.set_thresholds(thresholds)
    assert run.thresholds == (0.5,) * 3


def test_compile_refuses_what_it_cannot_do(tiny_staged, tiny_gates, tiny_images):
    program = make_program(tiny_staged, tiny_gates, (0.5,) * 3, tiny_images)
    with pytest.raises(ValueError, match="batch_size: expected a whole number of at least 1, got 0"):
        dg.compile(program, batch_size=0)
    with pytest.raises(ValueError, match=r"executor: expected one of 'auto', 'dense', 'eager', .*, got 'fast'"):
        dg.compile(program, executor="fast")
    with pytest.raises(ValueError, match="batch_size: expected at most 65536 on cuda, got 65537"):
        dg.compile(program, batch_size=65_537, device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(dg.ExecutorError, match="sees no CUDA device"):
            dg.compile(program, device="cuda")


def test_describe_names_executor_reason_and_gates(run):
    run.set_thresholds([0.5, math.inf, 1.25])
    text = run.describe()
    assert "executor refill (chunks that suit a CPU)" in text
    assert "gate 1 after stage1: off" in text
    assert "gate 2 after stage2: t = 1.25" in text


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0], ids=["none", "mixed", "all"])
@pytest.mark.parametrize(
    ("executor", "options"),
    [
        ("eager", {}),
        ("lag", {"monitor": True}),
        ("graph", {"monitor": True}),
        ("graph", {"early_answers": True}),
        ("graph", {"engine": "inductor", "buckets": [16]}),
    ],
    ids=["eager", "lag", "graph", "early answers", "compiled"],
)
def test_executors_on_cuda_agree(tiny_staged, tiny_gates, tiny_images, executor, options, share):
    margins = all_margins(tiny_staged, tiny_gates, tiny_images)
    thresholds = thresholds_for(margins, share)
    program = make_program(tiny_staged, tiny_gates, thresholds, tiny_images)
    run = dg.compile(program, device="cuda", executor=executor, batch_size=32, **options)
    out = run.submit(tiny_images.cuda()).result() if "early_answers" in options else run(tiny_images.cuda())
    with torch.inference_mode():
        _, _, exits = reference.predict(tiny_staged, tiny_gates, thresholds, tiny_images)
    assert ((out.exits.cpu() == exits) | ((margins - torch.tensor(thresholds)[:, None]).abs() < 1e-2).any(0)).all()
    if "monitor" in options:
        assert torch.equal(run.monitor.counts().sum(1), torch.bincount(out.exits.cpu(), minlength=4))


def test_compiled_and_run_inside_inference_mode(tiny_staged, tiny_gates, tiny_images):
    program = make_program(tiny_staged, tiny_gates, (INF,) * 3, tiny_images)
    with torch.inference_mode():
        run = dg.compile(program)
    run.set_thresholds([-100.0, INF, INF])
    with torch.inference_mode():
        out = run(tiny_images)
        run.set_thresholds([INF, -100.0, INF])
    assert (out.exits == 0).all()
    out.scores.add_(1)  # ordinary tensors
    assert (run(tiny_images).exits == 1).all()


def test_describe_leaves_out_shares_that_are_not_those_of_the_thresholds(run):
    assert "left here on validation data" in run.describe()
    run.set_thresholds([-100.0, INF, INF])
    assert "left here on validation data" not in run.describe()


def test_dense_says_that_it_runs_no_gate(tiny_staged, tiny_gates, tiny_images):
    program = make_program(tiny_staged, tiny_gates, (0.5,) * 3, tiny_images)
    assert dg.compile(program, executor="dense").describe().count("not run by this executor") == 3


def test_what_passes_through_a_stage_survives_the_next_packing():
    """An identity returns the very memory into which the survivors were packed."""
    x = torch.randn(40, 6)
    staged = StagedModel(stages=[torch.nn.Linear(6, 6), torch.nn.Identity(), torch.nn.ReLU(inplace=True)]).eval()
    gates = random_gates(staged, x, classes=6)
    thresholds = thresholds_for(all_margins(staged, gates, x), 0.3)
    run = dg.compile(make_program(staged, gates, thresholds, x))
    with torch.inference_mode():
        labels, scores, exits = reference.predict(staged, gates, thresholds, x)
    for _ in range(3):
        out = run(x)
        assert torch.equal(out.exits, exits)
        assert torch.equal(out.labels, labels)
        torch.testing.assert_close(out.scores, scores)
    assert set(exits.tolist()) == {0, 1, 2}


def test_several_threads_may_share_a_runtime(tiny_staged, tiny_gates, images):
    from concurrent.futures import ThreadPoolExecutor

    margins = all_margins(tiny_staged, tiny_gates, images)
    run = dg.compile(make_program(tiny_staged, tiny_gates, thresholds_for(margins, 0.3), images))
    parts = images.split(125)
    expected = [run(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(run, parts), expected, strict=True):
            assert torch.equal(got.exits, wanted.exits)
            assert torch.equal(got.scores, wanted.scores)
