"""A training step that is captured once and replayed is the step; a CUDA graph where a GPU is.

Elsewhere the graph is one that notes down what torch computes, on a GPU that is none.
"""

import contextlib
import dataclasses

import pytest
import torch
from checks import assert_same_bits
from fake_gpu import GPU, fake_gpu
from recorded_graph import RecordedGraph
from torch import nn

from adatape_kernels.cli import main
from adatape_kernels.data import Normaliser, augment, digits
from adatape_kernels.data.loading.batch_draws import generator_of
from adatape_kernels.models import (
    AdaTapeViT,
    AdaTapeViTConfig,
    AViT,
    AViTConfig,
    UViT,
    UViTConfig,
    ViT,
    ViTConfig,
)
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.training import graphed_step, train
from adatape_kernels.recipes.training.averaged_model import averaged_model
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.train_loop import train as train_loop
from adatape_kernels.recipes.training.train_plan import TrainPlan
from adatape_kernels.recipes.training.train_step import EagerSteps

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SIZES = dict(num_classes=10, dim=16, num_heads=2, ffn_dim=16, image_size=8, in_channels=1)
TAPE = dict(tape_ffn_dim=8, num_tape_tokens=3, topk=2, patch_size=4)
MODELS = {
    "adatape": (AdaTapeViT, AdaTapeViTConfig, {**TAPE, "bank_patch_size": 2, "depth": 1}),
    "learn": (
        AdaTapeViT,
        AdaTapeViTConfig,
        {**TAPE, "bank": "learn", "bank_size": 9, "depth": 2, "read_layers": (0, 1)},
    ),
    "vit": (ViT, ViTConfig, {"patch_size": 4, "depth": 1}),
}


def new_model(name, **further):
    made, config, options = MODELS[name]
    torch.manual_seed(0)
    model = made(config(**SIZES, **options, **further))
    nn.init.normal_(model.head.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def images():
    """Twenty-two digits: with batches of eight the last one has six."""
    data = digits(0)
    return dataclasses.replace(
        data, train_images=data.train_images[:22], train_labels=data.train_labels[:22]
    )


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(graphed_step, "StepGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "made", [])
    # A graph has its learning rate in float32.
    rate = TrainPlan.learning_rate_at
    monkeypatch.setattr(
        TrainPlan,
        "learning_rate_at",
        lambda *arguments: torch.tensor(rate(*arguments)).item(),
    )
    return RecordedGraph.made


def reserving(model):
    """Let a model reserve the rows of its worst case, where its batch is a full one."""
    forward = model.forward

    def reserved(pixels, **limits):
        if len(pixels) % 4 == 0 and not isinstance(model, ViT):
            limits["capacity"] = 3 * len(pixels)
            if "halt_threshold" in limits:
                limits["halt_threshold"] = torch.tensor(limits["halt_threshold"])
        return forward(pixels, **limits)

    model.forward = reserved
    return model


def trained(model, images, plan, *, ema=0.0, device="cpu", execution=None, record=None):
    """Train, and return the tensors and the curve that come of it."""
    torch.manual_seed(3)
    model = model.to(device)
    optimizer, results = plan.optimizer(model), []
    averaged = averaged_model(model, ema) if ema else None
    train_loop(
        model,
        images,
        plan,
        Normaliser.of(images.train_images),
        augment.turn_and_move,
        optimizer=optimizer,
        averaged=averaged,
        after_epoch=lambda result: results.append((result.loss, result.accuracy)) or "",
        execution=execution,
    )
    if record is not None:
        assert len(record.waits) == plan.epochs  # each is read once
    tensors = {name: t.cpu() for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name} {k}": v.cpu() for k, v in optimizer.state[parameter].items()}
    if averaged is not None:
        tensors |= {f"average {k}": v.cpu() for k, v in averaged.state_dict().items()}
    return tensors, results


DRAWN = {"halt_threshold_range": (0.0, 2.0)}
CASES = {
    "drawn, mixed, averaged, clipped": (
        "adatape",
        {"mixup": 0.4, **DRAWN, "max_grad_norm": 0.5},
        {"ema": 0.9},
    ),
    "learned bank, in parts": ("learn", {"max_grad_norm": 1.0}, {"accumulate": 2}),
    "no tape": ("vit", {"loss": "sigmoid"}, {}),
}


@no_gpu
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_replayed_is_the_step(case, images, recorded):
    """The same bits over three epochs whose last batches are smaller, dropout included."""
    name, options, further = CASES[case]
    plan = TrainPlan(3, 8, 3e-3, **options)
    ema, parts = further.get("ema", 0.0), further.get("accumulate", 1)
    expected, curve = trained(
        reserving(new_model(name, dropout=0.1)),
        images,
        plan,
        ema=ema,
        execution=Execution(accumulate=parts),
    )
    assert not recorded
    with fake_gpu() as record:
        found, ours = trained(
            new_model(name, dropout=0.1),
            images,
            plan,
            ema=ema,
            device=GPU,
            execution=Execution(accumulate=parts, graph=True),
            record=record,
        )
    (graph,) = recorded
    assert (graph.captures, graph.replays) == (1, 6)
    assert ours == curve
    assert found.keys() == expected.keys()
    for each, tensor in found.items():
        assert_same_bits(tensor, expected[each])


@no_gpu
def test_a_replayed_step_is_the_exact_one_but_for_rounding(images, recorded):
    plan = TrainPlan(2, 11, 3e-3, **DRAWN)
    _, expected = trained(new_model("adatape"), images, plan)
    with fake_gpu():
        _, found = trained(
            new_model("adatape"), images, plan, device=GPU, execution=Execution(graph=True)
        )
    for (loss, right), (as_expected, as_right) in zip(found, expected, strict=True):
        assert abs(loss - as_expected) < 1e-5 and right == as_right


@no_gpu
def test_a_resumed_graph_goes_on(images, recorded):
    """A warm-up leaves the moments as the checkpoint has them, and the numbers that are drawn."""
    plan, execution = TrainPlan(2, 11, 3e-3), Execution(graph=True)
    normalise = Normaliser.of(images.train_images)
    ways = {"execution": execution, "after_epoch": None}
    with fake_gpu():
        expected, _ = trained(
            new_model("adatape", dropout=0.1), images, plan, device=GPU, execution=execution
        )
        torch.manual_seed(3)
        model = new_model("adatape", dropout=0.1).to(GPU)
        torch.manual_seed(3)
        optimizer = plan.optimizer(model)

        class Stop(Exception):
            pass

        def stop(result):
            raise Stop

        with pytest.raises(Stop):
            train_loop(
                *(model, images, plan, normalise, augment.turn_and_move),
                optimizer=optimizer,
                **{**ways, "after_epoch": stop},
            )
        train_loop(
            *(model, images, plan, normalise, augment.turn_and_move),
            optimizer=optimizer,
            epochs_done=1,
            **ways,
        )
        for name, parameter in model.named_parameters():
            assert_same_bits(parameter.cpu(), expected[name])
            assert optimizer.state[parameter]["step"].item() == 4
    assert [graph.replays for graph in recorded] == [4, 2, 2]


@no_gpu
def test_a_loss_that_is_not_finite_is_named_with_its_step(images, recorded):
    whole = images.train_images / 16
    whole[5] = torch.nan
    spoiled = dataclasses.replace(images, train_images=whole)
    order = torch.randperm(22, generator=generator_of(0, 0))
    step = int((order == 5).nonzero()) // 8
    with fake_gpu(), pytest.raises(RuntimeError) as stop:
        train_loop(
            new_model("vit").to(GPU),
            spoiled,
            TrainPlan(1, 8, 3e-3),
            Normaliser((0.0,), (1.0,)),
            lambda images, generator: images,
            execution=Execution(graph=True),
        )
    found = f"epoch 1, step {step + 1} of 3"
    assert str(stop.value) == f"loss: expected a finite value at {found}, got nan"


class Asking(ViT):
    """A model that looks at a value in each step."""

    def forward(self, inputs):
        output = super().forward(inputs)
        assert float(output.logits.detach().sum()) < 1e9
        return output


@no_gpu
def test_a_step_that_waits_is_not_recorded(images, recorded):
    """So the graph of these tests refuses what a CUDA graph does."""
    _, config, options = MODELS["vit"]
    model = Asking(config(**SIZES, **options))
    with fake_gpu(), pytest.raises(RuntimeError, match="_local_scalar_dense: operation not perm"):
        trained(model, images, TrainPlan(1, 8, 3e-3), device=GPU, execution=Execution(graph=True))


def test_a_capture_that_fails_is_told_in_one_line(monkeypatch):
    class Streams:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def graph(made, **options):
        try:
            yield
        finally:
            raise RuntimeError("the capture was invalidated")

    for name, stand_in in (
        ("Stream", Streams),
        ("current_stream", Streams),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("device", lambda device: contextlib.nullcontext()),
        ("CUDAGraph", object),
        ("graph", graph),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def step():
        raise RuntimeError("CUDA error: operation not permitted\nCompile with TORCH_USE_CUDA_DSA")

    words = "^graph: expected a step that a CUDA graph can hold, got CUDA error: operation not .*d$"
    with pytest.raises(RuntimeError, match=words):
        graphed_step.StepGraph(GPU).captured(step)
    calls = []
    graphed_step.StepGraph(GPU).warm_up(lambda: calls.append(1))
    assert len(calls) == graphed_step.WARM_UPS


@pytest.mark.parametrize(
    ("further", "words"),
    [
        ({"graph": 1}, "graph: expected True or False, got 1"),
        ({"graph": True, "compiled": True}, "graph: expected no compile beside it, got both"),
        (
            {"graph": True, "checkpoint_layers": True},
            "graph: expected no checkpoint-layers beside it, which asks ",
        ),
        (
            {"graph": True, "ranks": Ranks(1, 2)},
            "graph: expected one process, got 2; what several send each other is not captured",
        ),
    ],
)
def test_what_no_graph_holds_is_refused(further, words):
    with pytest.raises(ValueError) as refusal:
        Execution(**further)
    assert str(refusal.value).startswith(words) and "\n" not in str(refusal.value)


def test_models_that_count_what_has_halted_are_refused():
    for kind, config in ((AViT, AViTConfig), (UViT, UViTConfig)):
        model = kind(config(**SIZES, patch_size=4, depth=1))
        words = f"^graph: expected a model whose number of rows is fixed, got {kind.__name__}, "
        with pytest.raises(ValueError, match=words):
            Execution(graph=True).check_model(model)
        Execution().check_model(model)


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_a_graph_on_a_cpu_is_refused_before_anything_is_written(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([command, "--data", "digits", "--graph", "--device", "cpu"]) == 2
    expected = "adatape-kernels: graph: expected a GPU to compute on, or --no-graph, got cpu\n"
    assert capsys.readouterr().err == expected
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"^graph: expected a GPU to compute on, "):
        Execution(graph=True).check_device(torch.device("cpu"))


@no_gpu
def test_a_run_says_that_it_was_a_graph(tmp_path, recorded, monkeypatch, capsys):
    options = {"data": "digits", "limit": 20, "epochs": 1, "batch": 16, "dim": 16, "depth": 1}
    options |= {"heads": 2, "ffn": 16, "patch": 4, "num_tape_tokens": 0}
    monkeypatch.setattr(train, "write_report", lambda *arguments, **options: None)
    with fake_gpu():
        train.run(tmp_path / "run", options, execution={"graph": True})
    assert [graph.replays for graph in recorded] == [1]
    assert checkpoint.load(tmp_path / "run").environment["graph"] is True
    resumed = ["train", "--out", str(tmp_path / "run"), "--resume", "--device", "cpu"]
    assert main(resumed) == 2
    assert "graph: expected a GPU to compute on, or --no-graph, got cpu" in capsys.readouterr().err
    assert main([*resumed, "--no-graph"]) == 0
    assert "note: graph was True and is False" in capsys.readouterr().err


def test_another_average_is_refused():
    model = new_model("vit")
    average = torch.optim.swa_utils.AveragedModel(model)
    eager = EagerSteps(
        model, model, model.loss, None, average, 1.0, Execution(), torch.device("cpu")
    )
    with pytest.raises(TypeError, match=r"^averaged: expected .*MovingAverage"):
        graphed_step.GraphedSteps(eager, 8)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("case", CASES)
def test_a_cuda_graph_is_the_step(case, images):
    """The curve of eager steps but for rounding, over replays and eager steps in turn."""
    name, options, further = CASES[case]
    plan = TrainPlan(3, 8, 1e-3, **options)
    ema, parts = further.get("ema", 0.0), further.get("accumulate", 1)
    (expected, curve), (found, ours) = (
        trained(
            new_model(name),
            images,
            plan,
            ema=ema,
            device="cuda",
            execution=Execution(accumulate=parts, graph=graph),
        )
        for graph in (False, True)
    )
    for (loss, _), (expected_loss, _) in zip(ours, curve, strict=True):
        assert abs(loss - expected_loss) < 1e-3
    for each, tensor in found.items():
        if each.endswith(" step") or each.endswith("n_averaged"):
            assert_same_bits(tensor, expected[each])
        elif " exp_avg" not in each:
            torch.testing.assert_close(tensor, expected[each], rtol=1e-2, atol=2e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_cuda_graph_refuses_a_step_that_waits(images):
    _, config, options = MODELS["vit"]
    model = Asking(config(**SIZES, **options))
    with pytest.raises(RuntimeError, match=r"^graph: expected a step that a CUDA graph can hold, "):
        trained(
            model, images, TrainPlan(1, 8, 3e-3), device="cuda", execution=Execution(graph=True)
        )
