import errno
import json
import math
import os
import stat

import pytest
import safetensors.torch
import torch
from checks import assert_same_bits, refused

from adatape_kernels.data import Normaliser, digits
from adatape_kernels.data.augment import turn_and_move
from adatape_kernels.models import AdaTapeViT, AdaTapeViTConfig
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.checkpoint import INDEX, Checkpoint, sealed
from adatape_kernels.recipes.training.deterministic_mode import repeatable
from adatape_kernels.recipes.training.train_loop import epoch_generator, predict, train
from adatape_kernels.recipes.training.train_plan import TrainPlan

# Everything that draws from torch's generator in training is on.
CONFIG = AdaTapeViTConfig(
    num_classes=10,
    dim=16,
    depth=2,
    num_heads=2,
    ffn_dim=16,
    tape_ffn_dim=16,
    num_tape_tokens=3,
    topk=2,
    image_size=8,
    in_channels=1,
    patch_size=4,
    bank_patch_size=2,
    dropout=0.1,
    attention_dropout=0.1,
    stochastic_depth=0.1,
    query_noise=0.1,
    bank_dropout=0.1,
)
PLAN = TrainPlan(epochs=3, batch=24, learning_rate=3e-3, max_grad_norm=1.0)


@pytest.fixture(scope="module")
def data():
    return digits().limited(96, seed=0)


def begin(seed=0):
    torch.manual_seed(seed)
    model = AdaTapeViT(CONFIG)
    return model, PLAN.optimizer(model)


def go_on(model, optimizer, data, done=0, stop=None):
    """Train; return each epoch's result. `stop` breaks off after that epoch."""
    results = []

    def after_epoch(result):
        results.append((result.epoch, result.loss, result.accuracy, result.learning_rate))
        if result.epoch == stop:
            raise StopIteration
        return ""

    normalise = Normaliser.of(data.train_images)
    try:
        train(
            model,
            data,
            PLAN,
            normalise,
            turn_and_move,
            optimizer=optimizer,
            epochs_done=done,
            after_epoch=after_epoch,
        )
    except StopIteration:
        pass
    return results


def of(model, optimizer, epoch=1):
    return Checkpoint(
        epoch,
        4 * epoch,
        {"lr": 0.1},
        {"train_images": 96},
        [{"epoch": number + 1} for number in range(epoch)],
        {"threads": 2},
        checkpoint.tensors_of(model, optimizer),
    )


@pytest.fixture
def saved(tmp_path, data):
    model, optimizer = begin()
    go_on(model, optimizer, data, stop=1)
    checkpoint.save(tmp_path, of(model, optimizer))
    return tmp_path


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def number_of_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("number_of_threads")
def test_a_run_that_went_through_a_file_repeats_an_unbroken_one(tmp_path, data):
    model, optimizer = begin()
    unbroken = go_on(model, optimizer, data)
    half, half_optimizer = begin()
    first = go_on(half, half_optimizer, data, stop=1)
    checkpoint.save(tmp_path, of(half, half_optimizer))
    torch.rand(3)  # what happens in between does not matter
    other, other_optimizer = begin(seed=5)
    loaded = checkpoint.load(tmp_path)
    checkpoint.restore(tmp_path, loaded.tensors, other, other_optimizer)
    assert first + go_on(other, other_optimizer, data, done=1) == unbroken
    for name, tensor in model.state_dict().items():
        assert_same_bits(other.state_dict()[name], tensor)


def test_a_checkpoint_gives_back_what_it_was_given(saved, data):
    model, optimizer = begin()
    go_on(model, optimizer, data, stop=1)
    loaded, given = checkpoint.load(saved), of(model, optimizer)
    for name in ("epoch", "step", "config", "data", "history", "environment"):
        assert getattr(loaded, name) == getattr(given, name)
    assert loaded.tensors.keys() == given.tensors.keys()
    for name, tensor in given.tensors.items():
        assert_same_bits(loaded.tensors[name], tensor)


def test_only_the_newest_pair_stays(saved):
    model, optimizer = begin()
    for epoch in (2, 3):
        checkpoint.save(saved, of(model, optimizer, epoch))
    assert {file.name for file in saved.iterdir()} == {INDEX, "checkpoint-3.safetensors"}
    assert checkpoint.load(saved).epoch == 3


@pytest.mark.parametrize("fails", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2], ids=["tensors", "index"])
def test_a_full_disk_leaves_the_last_good_pair(saved, monkeypatch, fails, call):
    before = checkpoint.load(saved)
    model, optimizer = begin(seed=1)
    calls = []

    def full(original, counts):
        def run(*arguments, **options):
            if counts(arguments):
                calls.append(arguments)
                if len(calls) == call:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **options)

        return run

    path_type = type(saved)
    if fails == "open":
        monkeypatch.setattr(path_type, "open", full(path_type.open, lambda a: True))
    elif fails == "write":
        original = path_type.open

        class Full:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.stream.close()

            def write(self, content):
                calls.append(content)
                if len(calls) == call:
                    self.stream.write(content[: len(content) // 2])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.stream.write(content)

            def flush(self):
                self.stream.flush()

            def fileno(self):
                return self.stream.fileno()

        monkeypatch.setattr(path_type, "open", lambda *a, **o: Full(original(*a, **o)))
    elif fails == "fsync":
        # The folder is flushed too, once for each file.
        monkeypatch.setattr(
            os, "fsync", full(os.fsync, lambda a: not stat.S_ISDIR(os.fstat(a[0]).st_mode))
        )
    else:
        monkeypatch.setattr(os, "replace", full(os.replace, lambda a: True))
    name = "checkpoint-2.safetensors" if call == 1 else INDEX
    with refused(saved / name, "No space left on device", error=OSError):
        checkpoint.save(saved, of(model, optimizer, 2))
    monkeypatch.undo()
    assert not list(saved.glob("*.part"))
    after = checkpoint.load(saved)
    assert after.epoch == before.epoch
    for tensor_name, tensor in before.tensors.items():
        assert_same_bits(after.tensors[tensor_name], tensor)
    checkpoint.save(saved, of(model, optimizer, 2))
    assert checkpoint.load(saved).epoch == 2


def change(file, /, **entries):
    """Change entries of an index, as its writer would have written them."""
    file.write_bytes(sealed({**json.loads(file.read_text()), **entries}))


def test_a_damaged_index_is_named(saved):
    file = saved / INDEX
    whole = file.read_text()
    for content, words in (
        (whole[:100], "whole JSON"),
        ("", "whole JSON"),
        ("[" * 100_000, "whole JSON"),
        ("[1]", "the format"),
        ('{"format": "pytorch-lightning"}', "got 'pytorch-lightning'"),
        (whole.replace("checkpoint, 2", "checkpoint, 4"), "checkpoint, 4'"),
        (whole.replace("checkpoint, 2", "checkpoint, 1"), "its own SHA-256"),
        (whole.replace('"epoch": 1,', '"epoch": 2,'), "its own SHA-256"),
        (whole[:-1], "its own SHA-256"),
        (whole + "\n", "its own SHA-256"),
    ):
        assert content != whole
        file.write_text(content)
        with refused(file, words):
            checkpoint.load(saved)
    for entry, value, words in (
        ("sha256", None, "sha256 of type str"),
        ("epoch", True, "epoch of type int"),
        ("epoch", 7, "length of history"),
        ("step", -1, "step of 0 or more"),
        ("file", "../checkpoint-1.safetensors", "of the form"),
        ("file", "checkpoint-best.safetensors", "of the form"),
    ):
        file.write_text(whole)
        change(file, **{entry: value})
        with refused(file, words):
            checkpoint.load(saved)
    file.write_bytes(b"\xff\xfe\x00")
    with refused(file, "whole JSON"):
        checkpoint.load(saved)
    file.unlink()
    with refused("resume", "no such file"):
        checkpoint.load(saved)


def test_damaged_tensors_are_named(saved):
    file = saved / "checkpoint-1.safetensors"
    whole = file.read_bytes()
    altered = bytearray(whole)
    altered[-1] ^= 1
    for content, words in (
        (whole[:-7], f"{len(whole)} bytes"),
        (b"", "got 0"),
        (bytes(altered), "SHA-256"),
    ):
        file.write_bytes(content)
        with refused(file, words):
            checkpoint.load(saved)
    file.unlink()
    with refused(file, "no such file"):
        checkpoint.load(saved)


def test_a_file_that_is_no_safetensors_is_named_even_with_its_own_hash(saved):
    import hashlib

    file = saved / "checkpoint-1.safetensors"
    file.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    content = file.read_bytes()
    change(saved / INDEX, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    with refused(file, "safetensors"):
        checkpoint.load(saved)


def test_tensors_of_another_model_are_refused(saved):
    loaded = checkpoint.load(saved)
    model, optimizer = begin()
    wider = AdaTapeViT(AdaTapeViTConfig(**{**vars(CONFIG), "dim": 32}))
    with refused(saved / INDEX, "of shape", "32"):
        checkpoint.restore(saved, loaded.tensors, wider, PLAN.optimizer(wider))
    deeper = AdaTapeViT(AdaTapeViTConfig(**{**vars(CONFIG), "depth": 3}))
    with refused(saved / INDEX, "layers.2", "got none"):
        checkpoint.restore(saved, loaded.tensors, deeper, PLAN.optimizer(deeper))
    for name, tensor in (
        ("rng", torch.zeros(3, dtype=torch.uint8)),
        ("rng", torch.zeros(5056)),
        ("optimizer.head.weight.exp_avg", torch.zeros(3)),
        ("optimizer.head.weight.momentum", torch.zeros(10, 16)),
        ("model.extra", torch.zeros(3)),
    ):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with refused(saved / INDEX):
            checkpoint.restore(saved, {**loaded.tensors, name: tensor}, model, optimizer)
        for key, value in before.items():
            assert_same_bits(model.state_dict()[key], value)


def test_checkpoints_are_plain_safetensors(saved):
    tensors = safetensors.torch.load_file(saved / "checkpoint-1.safetensors")
    model, _ = begin()
    weights = {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
    assert model.load_state_dict(weights)


def test_epochs_and_seeds_draw_differently():
    draws = [
        tuple(torch.randperm(1000, generator=epoch_generator(seed, epoch))[:4].tolist())
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(draws)) == len(draws)


def test_the_learning_rate_rises_and_falls():
    plan = TrainPlan(epochs=1, batch=1, learning_rate=2.0, warmup_share=0.1)
    rates = [plan.learning_rate_at(step, 100) for step in range(100)]
    assert rates.index(max(rates)) == 9 and 1.9 < max(rates) <= 2.0
    assert rates[0] == pytest.approx(0.2) and 0 < rates[-1] < 0.01


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("epochs", {"epochs": 0}),
        ("batch", {"batch": -1}),
        ("lr", {"learning_rate": 0.0}),
        ("lr", {"learning_rate": math.nan}),
        ("weight-decay", {"weight_decay": -0.1}),
        ("seed", {"seed": -1}),
    ],
)
def test_a_plan_checks_its_numbers(name, values):
    with refused(name):
        TrainPlan(**{"epochs": 1, "batch": 1, "learning_rate": 0.1, **values})


def test_repeatable_puts_torch_back_as_it_was():
    for before, warn_only in ((True, True), (True, False), (False, False)):
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        try:
            with repeatable():
                assert torch.are_deterministic_algorithms_enabled()
                assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.are_deterministic_algorithms_enabled() == before
            assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
            assert torch.utils.deterministic.fill_uninitialized_memory
        finally:
            torch.use_deterministic_algorithms(True)


def test_predictions_in_batches_are_those_of_single_images(data):
    model, _ = begin()
    normalise = Normaliser.of(data.train_images)
    model.train()
    output = predict(model, data.test_images, normalise)
    assert model.training
    model.eval()
    one = predict(model, data.test_images[300:301], normalise)
    torch.testing.assert_close(output.logits[300:301], one.logits)
    assert torch.equal(output.reads[0].indices[300:301], one.reads[0].indices)
    assert len(output.tape_lens) == len(output.ponder) == 360
