"""Devices by name, and every recipe on a GPU that is none, beside the CPU."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from checks import assert_same_bits
from fake_gpu import GPU, NAME, fake_gpu

from adatape_kernels.cli import main
from adatape_kernels.cli.options import asked_device
from adatape_kernels.data import Normaliser, Preprocessing, augment, digits, spoiled_images
from adatape_kernels.models import AdaTapeViT, AdaTapeViTConfig, AViTConfig, ViT, ViTConfig
from adatape_kernels.models.compared.avit import AViT
from adatape_kernels.recipes import checkpoint, measure, model_comparison, pictures
from adatape_kernels.recipes.budget import budget
from adatape_kernels.recipes.demo import run as demo
from adatape_kernels.recipes.devices import chosen_device, device_of, moved
from adatape_kernels.recipes.heatmap import heatmap
from adatape_kernels.recipes.heatmap.read_statistics import entries_read, places_read
from adatape_kernels.recipes.model_comparison import compare
from adatape_kernels.recipes.model_loading import load
from adatape_kernels.recipes.parity import parity_training
from adatape_kernels.recipes.parity.parity_config import ParityConfig, Run
from adatape_kernels.recipes.parity.reads_picture import reading_of
from adatape_kernels.recipes.predict import Predictor
from adatape_kernels.recipes.training import train
from adatape_kernels.recipes.training.train_loop import epoch_generator, predict
from adatape_kernels.recipes.training.train_loop import train as train_loop
from adatape_kernels.recipes.training.train_plan import TrainPlan

SIZES = dict(num_classes=10, dim=16, depth=1, num_heads=2, ffn_dim=16)
IMAGES = dict(image_size=8, in_channels=1, patch_size=4)
TAPE = dict(tape_ffn_dim=8, bank_patch_size=2, num_tape_tokens=3, topk=2)

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def images():
    """A few digits."""
    data = digits(0)
    return dataclasses.replace(
        data,
        train_images=data.train_images[:20],
        train_labels=data.train_labels[:20],
        test_images=data.test_images[:12],
        test_labels=data.test_labels[:12],
    )


def new_model(kind=AdaTapeViT, config=AdaTapeViTConfig, **further):
    torch.manual_seed(0)
    return kind(config(**SIZES, **IMAGES, **further))


MODELS = {
    "adatape": lambda: new_model(**TAPE),
    "learn": lambda: new_model(
        **{k: v for k, v in TAPE.items() if k != "bank_patch_size"}, bank="learn", bank_size=9
    ),
    "vit": lambda: new_model(ViT, ViTConfig),
    "avit": lambda: new_model(AViT, AViTConfig, gate_center=4.0),
}


@pytest.mark.parametrize(
    "name", ["", "gpu", "CPU", "cuda:", "cuda:-1", "cuda:x", "mps", "cuda:0:1"]
)
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match=r"^device: expected auto, cpu, cuda or cuda:N, got "):
        chosen_device(name)


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(name):
    words = f"^device: expected one that is here, got {name}, and torch finds no GPU$"
    with pytest.raises(ValueError, match=words):
        chosen_device(name)
    assert chosen_device("auto") == chosen_device("cpu") == torch.device("cpu")


@no_gpu
def test_names_of_gpus():
    with fake_gpu(count=2):
        assert chosen_device("auto") == chosen_device("cuda") == torch.device("cuda:0")
        assert chosen_device("cuda:1") == chosen_device(torch.device("cuda:1"))
        assert chosen_device("auto", backend="cpp,eager") == torch.device("cpu")
        assert chosen_device("auto", backend="triton") == torch.device("cuda:0")
        with pytest.raises(ValueError, match=r"^device: expected cuda:0 to cuda:1, got cuda:2$"):
            chosen_device("cuda:2")
    with fake_gpu(), pytest.raises(ValueError, match=r"^device: expected cuda:0, got cuda:1$"):
        chosen_device("cuda:1")
    with fake_gpu(capability=(7, 5)):
        assert chosen_device("auto") == torch.device("cpu")
        assert chosen_device("cuda") == torch.device("cuda:0")


COMMANDS = ["check", "demo", "train --data digits", "finetune --data digits", "budget run"]
COMMANDS += ["heatmap run", "parity", "compare", "predict run a.png", "verify a.npz", "export run"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_device_in_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--device", "tpu"]) == 2
    expected = "adatape-kernels: device: expected auto, cpu, cuda or cuda:N, got 'tpu'\n"
    assert capsys.readouterr().err == expected
    assert not list(tmp_path.iterdir())


def test_a_command_asks_for_the_device_that_its_backend_needs():
    arguments = SimpleNamespace(device="auto", backend="cpp")
    assert asked_device(arguments) == torch.device("cpu")


@no_gpu
def test_the_gpu_that_is_none_is_as_strict_as_one():
    with fake_gpu() as record:
        there, here = torch.ones(3, device=GPU), torch.ones(3)
        for mix in (
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: torch.where(here > 0, there, there),
        ):
            with pytest.raises(RuntimeError, match="expected all tensors on cuda:0"):
                mix()
        with pytest.raises(RuntimeError):
            there.numpy()
        assert record.waits == []
        assert (there + 1).sum().item() == 6 and there.cpu().device == here.device
        assert record.waits == ["_local_scalar_dense", "copy to the CPU"]


@no_gpu
@pytest.mark.parametrize("kind", MODELS)
def test_training_on_a_gpu_is_training_on_the_cpu(kind, images):
    """The same numbers, bit for bit, and no wait within a step but for those of models."""
    normalise, plan = Normaliser.of(images.train_images), TrainPlan(2, 10, 3e-3, max_grad_norm=1.0)

    def trained(device):
        model, results = MODELS[kind]().to(device), []
        train_loop(
            model,
            images,
            plan,
            normalise,
            augment.turn_and_move,
            after_epoch=lambda result: results.append(result) or "",
        )
        return model, [(each.loss, each.accuracy) for each in results]

    expected, curve = trained("cpu")
    with fake_gpu() as record:
        model, found = trained(GPU)
        assert found == curve
        waits, synchronised = len(record.waits), record.synchronised
        for name, parameter in model.state_dict().items():
            assert_same_bits(parameter.cpu(), expected.state_dict()[name])
        output = predict(model, images.test_images, normalise)
        assert_same_bits(output.logits, predict(expected, images.test_images, normalise).logits)
        comparison, _ = compare(model, images, normalise, 1)
    # 4 steps in 2 epochs: each epoch is read once.
    assert waits == 2 or kind == "avit"
    assert synchronised == 4
    assert comparison.peak_bytes == {"elastic": 1, "padded": 1}
    there = compare(expected, images, normalise, 1)[0]
    assert comparison.test_accuracy == there.test_accuracy and comparison.flops == there.flops


@no_gpu
def test_changes_of_images_are_the_same_on_every_device():
    x = torch.rand(5, 3, 8, 8)

    def changed(x):
        generator = epoch_generator(3, 1)
        yield augment.turn_and_move(x, generator)
        yield augment.crop(x, 2, generator)
        yield augment.flip(x, generator)
        yield spoiled_images.noisy(x, 0.2, generator)
        yield spoiled_images.blurred(x, 1.0)
        yield Normaliser((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))(x)
        yield Preprocessing(8, 3, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))(x)

    expected = list(changed(x))
    with fake_gpu():
        for ours, theirs in zip(changed(moved(x, GPU)), expected, strict=True):
            assert ours.device == GPU
            assert_same_bits(ours.cpu(), theirs)


@no_gpu
def test_reads_are_counted_wherever_they_lie(images):
    model, labels = MODELS["learn"](), images.test_labels
    x = Normaliser.of(images.train_images)(images.test_images)
    expected = entries_read(model(x).reads[0], labels, 10, 9)
    bank = MODELS["adatape"]()
    places = places_read(bank(x).reads[0], labels, 10, 4)
    with fake_gpu():
        found = entries_read(model.to(GPU)(moved(x, GPU)).reads[0], moved(labels, GPU), 10, 9)
        assert_same_bits(found.by_class, expected.by_class)
        found = places_read(bank.to(GPU)(moved(x, GPU)).reads[0], moved(labels, GPU), 10, 4)
        assert_same_bits(found.by_step, places.by_step)


OPTIONS = {"data": "digits", "limit": 40, "epochs": 2, "batch": 16, "dim": 16, "depth": 1}
OPTIONS |= {"heads": 2, "ffn": 16, "patch": 4, "bank_patch": 2, "num_tape_tokens": 3, "topk": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on the CPU, one on the GPU, and the latter as it was after its first epoch."""
    folder, save = tmp_path_factory.mktemp("runs"), checkpoint.save

    def save_a_copy(where, saved):
        save(where, saved)
        if saved.epoch == 1:
            shutil.copytree(where.folder, folder / "half", dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patched:
        leave_out_pictures(patched)
        train.run(folder / "cpu", OPTIONS, device="cpu")
        patched.setattr(checkpoint, "save", save_a_copy)
        with fake_gpu():
            train.run(folder / "gpu", OPTIONS, device="auto")
    return folder


def leave_out_pictures(monkeypatch):
    monkeypatch.setattr(pictures, "draw_all", lambda *arguments: None)
    monkeypatch.setattr(budget, "drawn", lambda results: b"")
    monkeypatch.setattr(heatmap, "_write", lambda *arguments: None)
    monkeypatch.setattr(train, "ROUNDS", 1)
    monkeypatch.setattr(model_comparison, "COMPARED_IMAGES", 30)


def history(folder):
    rows = checkpoint.load(folder).history
    return [{name: row[name] for name in row if name != "images_per_second"} for row in rows]


@no_gpu
def test_a_run_on_a_gpu_goes_on_on_the_cpu(runs, monkeypatch, capsys):
    for name, device in (("cpu", "cpu"), ("gpu", NAME)):
        report = json.loads((runs / name / "report.json").read_text())
        assert (report["device"], report["dtype"]) == (device, "float32")
    assert history(runs / "gpu") == history(runs / "cpu")
    saved = checkpoint.load(runs / "half")
    assert {tensor.device for tensor in saved.tensors.values()} == {torch.device("cpu")}
    assert saved.environment["device"] == NAME and saved.epoch == 1
    monkeypatch.setattr(train, "write_report", lambda *arguments, **options: None)
    train.run(runs / "half", OPTIONS, resume=True)
    assert f"note: device was {NAME} and is cpu; the curve may differ" in capsys.readouterr().err
    assert history(runs / "half") == history(runs / "cpu")


@no_gpu
def test_what_a_gpu_trained_is_used_on_one(runs, tmp_path, monkeypatch):
    import PIL.Image

    leave_out_pictures(monkeypatch)
    out, file = runs / "gpu", tmp_path / "a.png"
    PIL.Image.new("L", (9, 9), 90).save(file)
    with fake_gpu():
        budget.run(out, tmp_path / "b", thresholds=[0.5], rounds=1)
        heatmap.run(out, tmp_path / "h", images=[file])
        for made in "bh":
            assert json.loads((tmp_path / made / "report.json").read_text())["device"] == NAME
        model = load(out, device="cuda:0")
        assert device_of(model) == GPU
        found = Predictor(model)(file)
    expected = Predictor(load(out, device="cpu"))(file)
    assert (found.top, found.tape_tokens) == (expected.top, expected.tape_tokens)


@no_gpu
@pytest.mark.parametrize("name", ["adatape", "adatape-fixed-query"])
def test_a_run_of_parity_on_a_gpu_is_one_on_the_cpu(name):
    config = ParityConfig(
        lengths=(10,), models=(name,), steps=4, batch=16, eval_examples=50, curriculum=0.5
    )
    run, sequences = Run(name, 10, 0), parity_training.eval_sequences(10, 20)

    def trained(device):
        model, result = parity_training.train(run, config, lambda *step: None, device)
        return model, dataclasses.replace(result, seconds=0.0)

    model, expected = trained(torch.device("cpu"))
    with fake_gpu():
        ours, found = trained(GPU)
        assert found == expected
        if name == "adatape":
            there = reading_of(ours, sequences)
            assert_same_bits(there.queries, reading_of(model, sequences).queries)


def test_timings_wait_for_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(measure, "wait", waited.append)
    measure.seconds({"a": lambda: None}, 2, warmup=1, device=GPU)
    assert waited == 6 * [GPU]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_real_gpu_trains_predicts_and_measures(tmp_path, monkeypatch):
    leave_out_pictures(monkeypatch)
    train.run(tmp_path / "cpu", OPTIONS, device="cpu")
    train.run(tmp_path / "gpu", OPTIONS, device="cuda")
    for ours, theirs in zip(history(tmp_path / "gpu"), history(tmp_path / "cpu"), strict=True):
        assert abs(ours["train_loss"] - theirs["train_loss"]) < 1e-3
    demo(tmp_path / "demo", epochs=1, device="cuda", dtype="bf16")
    train.run(tmp_path / "bf16", {**OPTIONS, "dtype": "bf16"}, device="cuda")
