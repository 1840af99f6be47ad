"""The gradient of an input-driven bank passes the entries that were read, down to the patches."""

import dataclasses
import gc

import pytest
import torch
from checks import assert_close, assert_same_bits, refused
from reading_paths import all_entries, largest_saved, makes_rows_again, of_any_size
from torch import nn
from torch.utils.checkpoint import checkpoint

import adatape_kernels as ak
from adatape_kernels.models import AdaTapeViT, AdaTapeViTConfig

pytestmark = pytest.mark.usefixtures(of_any_size.__name__)
BATCH, SIZE = 4, 32
BASE = AdaTapeViTConfig(
    num_classes=5,
    dim=16,
    depth=3,
    num_heads=2,
    ffn_dim=24,
    tape_ffn_dim=8,
    num_tape_tokens=4,
    topk=3,
    halt_threshold=1.3,
    image_size=SIZE,
    patch_size=16,
    bank_patch_size=4,
)
VARIANTS = {
    "whole key": {},
    "part of the key": {"key_split": 4},
    "two reads": {"read_layers": (0, 2)},
    "gap": {"query": "gap", "pooling": "mean", "loss_type": "max", "average_query": False},
    "reads to the end": {"halt_threshold": 99.0},
    "reads nothing": {"halt_threshold": -1.0},
    "regularised": {"query_noise": 0.3, "bank_dropout": 0.4, "dropout": 0.2},
    "projection, norm, registers": {"tape_mlp_dim": 5, "pre_norm": True, "num_registers": 2},
    "one channel": {"in_channels": 1},
}


def build(dtype=torch.float64, cls=AdaTapeViT, **changes):
    torch.manual_seed(1)
    model = cls(dataclasses.replace(BASE, **changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images(model, requires_grad=True):
    torch.manual_seed(2)
    made = torch.randn(BATCH, model.config.in_channels, SIZE, SIZE)
    return made.to(model.head.weight.dtype).requires_grad_(requires_grad)


def results(model, x, run=None, **options):
    """Outputs, and the gradient of the images and of every parameter."""
    torch.manual_seed(3)
    output = (model if run is None else run)(x, **options)
    loss = model.loss(output, torch.arange(BATCH))
    inputs = {"x": x, **dict(model.named_parameters())}
    inputs = {name: each for name, each in inputs.items() if each.requires_grad}
    found = torch.autograd.grad(loss, [*inputs.values()], allow_unused=True)
    return output, dict(zip(inputs, found, strict=True))


def with_all_entries(model, x, **options):
    with all_entries(model):
        return results(model, x, **options)


def assert_same(ours, theirs, tolerance=1e-10):
    assert_same_bits(ours[0].logits, theirs[0].logits)
    assert_same_bits(ours[0].tape_lens, theirs[0].tape_lens)
    assert_gradients(ours[1], theirs[1], tolerance)


def assert_gradients(ours, theirs, tolerance=1e-10):
    for name, expected in theirs.items():
        assert (ours[name] is None) == (expected is None), name
        if expected is not None:
            assert_close(ours[name], expected, tolerance)


@pytest.mark.parametrize("capacity", [None, BATCH * 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_all_entries(variant, capacity):
    model = build(**VARIANTS[variant])
    x = images(model)
    assert makes_rows_again(model, x, capacity=capacity)
    ours = results(model, x, capacity=capacity)
    with all_entries(model):
        assert not makes_rows_again(model, x, capacity=capacity)
        theirs = results(model, x, capacity=capacity)
    assert_same(ours, theirs)
    assert all(grad is not None for grad in ours[1].values())


def test_gradients_are_those_of_the_padded_model():
    model = build()
    x = images(model)
    _, ours = results(model, x)
    _, theirs = results(model, x, run=model.padded())
    assert_gradients(ours, theirs, 1e-9)


@pytest.mark.parametrize("frozen", ["images", "pre_bank", "bank_embed", "bank_norm", "bank"])
def test_frozen_parts(frozen):
    model = build()
    x = images(model, requires_grad=frozen != "images")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    assert_same(results(model, x), with_all_entries(model, x))


def test_a_frozen_model_makes_nothing_twice():
    model = build().requires_grad_(False)
    assert not makes_rows_again(model, images(model, requires_grad=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_other_dtypes(dtype):
    model = build(dtype)
    x = images(model)
    assert_same(
        results(model, x), with_all_entries(model, x), 1e-5 if dtype.itemsize == 4 else 5e-2
    )


def test_autocast():
    model = build(torch.float32)
    x = images(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert makes_rows_again(model, x)
        ours, theirs = results(model, x), with_all_entries(model, x)
    assert_same(ours, theirs, 3e-2)


def test_what_is_kept_for_the_backward_pass():
    model = build(torch.float32, image_size=64, depth=1)
    x = torch.randn(BATCH, 3, 64, 64)
    bank = BATCH * model.config.bank_tokens * model.config.dim
    with largest_saved() as sizes:
        model(x)
    assert bank not in sizes
    with all_entries(model), largest_saved() as sizes:
        model(x)
    assert sizes.count(bank) >= 2


def test_second_derivatives():
    model = build(depth=1, num_tape_tokens=2)
    x = images(model)

    def of_the_gradient():
        first = torch.autograd.grad(model(x).logits.square().sum(), x, create_graph=True)[0]
        wanted = {"x": x, **dict(model.named_parameters())}
        objective = first.square().sum()
        found = torch.autograd.grad(objective, [*wanted.values()], allow_unused=True)
        return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}

    ours = of_the_gradient()
    with all_entries(model):
        theirs = of_the_gradient()
    assert_gradients({**dict.fromkeys(theirs), **ours}, theirs, 1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model = build()
    x = images(model)

    expected = results(model, x)[1]

    def parts(x):
        output = model(x)
        return output.logits, output.ponder, *(r.weights for r in output.reads)

    logits, ponder, *_ = checkpoint(parts, x, use_reentrant=reentrant)
    output = dataclasses.replace(model(x.detach()), logits=logits, ponder=ponder)
    model.loss(output, torch.arange(BATCH)).backward()
    assert_gradients({"x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}, expected)


def test_layers_that_are_checkpointed():
    model = build()
    x = images(model)
    expected = results(model, x)
    model.set_grad_checkpointing()
    assert makes_rows_again(model, x)
    assert_same(results(model, x), expected)


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone, which outlives what the test makes with it.

    A wrapped model that held the group last would wait, with Python's lock, for a thread of the
    group's that wants the lock.
    """
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_data_parallel_training_finds_every_gradient():
    model = build(halt_threshold=-1.0)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        model.loss(wrapped(images(model)), torch.arange(BATCH)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_default_model_s_bank_is_large_enough_and_a_small_one_s_is_not(monkeypatch):
    monkeypatch.undo()
    model = ak.models.adatape_vit("Ti/16", depth=1)
    assert makes_rows_again(model, torch.zeros(1, 3, 224, 224))
    assert not makes_rows_again(build(), images(build()))


@pytest.mark.compiles
def test_one_graph_of_a_training_step(fresh_compiler):
    model = build(depth=1)
    x = images(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, ours = results(model, x, run=compiled)
    expected, theirs = with_all_entries(model, x)
    assert_close(output.logits, expected.logits, 1e-12)
    assert_gradients(ours, theirs)
    with largest_saved() as sizes:
        compiled(x)
    assert sizes and BATCH * model.config.bank_tokens * model.config.dim not in sizes


@pytest.mark.compiles
def test_an_exported_program_reads_once():
    model = build(depth=1)
    program = torch.export.export(model, (images(model, requires_grad=False),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "adatape.tape_read.default" in called
    assert not any("tape_read_again" in name for name in called)


class Scaled(AdaTapeViT):
    def embed(self, inputs):
        tokens, bank = super().embed(inputs)
        return tokens, 2 * bank


class Batched(AdaTapeViT):
    def embed_elastic(self, inputs):
        tokens, bank, lens = super().embed_elastic(inputs)
        return tokens, 2 * bank, lens


class Reader(ak.layers.TapeReader):
    pass


def with_other(path, make):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))

    return change


def hooked(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *args: None)


def overlapping(old):
    made = nn.Conv2d(3, BASE.dim, 4, stride=4, padding=2, dtype=torch.float64)
    made.forward = lambda x: nn.functional.conv2d(x, made.weight, made.bias, stride=4)
    return made


def padded_patches(old):
    return nn.Conv2d(3, BASE.dim, 6, stride=4, padding=1, dtype=torch.float64)


UNSUITED = {
    "bank_embed in another module": with_other("bank_embed", nn.Sequential),
    "bank_embed with a forward of its own": with_other("bank_embed", overlapping),
    "patches that overlap": with_other("bank_embed", padded_patches),
    "pre_bank in another module": with_other("pre_bank", nn.Sequential),
    "a hook on bank_embed": hooked("bank_embed"),
    "a hook on pre_bank": hooked("pre_bank"),
    "a hook on the encoder": hooked("encoder"),
    "a hook on the reader": hooked("encoder.readers.0"),
    "another reader": lambda model: setattr(model.encoder.readers["0"], "__class__", Reader),
    "embed of the model's own": lambda model: setattr(model, "embed", model.embed),
}


@pytest.mark.parametrize("why", UNSUITED)
def test_the_bank_is_dense_where(why):
    """The reader may copy rows of it all the same, so that the gradient of the bank is dense."""
    model = build()
    UNSUITED[why](model)
    x = images(model)
    with largest_saved() as sizes:
        ours = results(model, x)
    assert BATCH * model.config.bank_tokens * model.config.dim in sizes
    assert_same(ours, with_all_entries(model, x))


@pytest.mark.parametrize("cls", [Scaled, Batched])
def test_what_a_subclass_embeds_is_read(cls):
    model, plain = build(cls=cls), build()
    x = images(model)
    assert_same(results(model, x), with_all_entries(model, x))
    assert not torch.equal(model(x).reads[0].weights, plain(x).reads[0].weights)


def test_images_of_many_sizes():
    model = build()
    wide, tall = torch.randn(3, 32, 64).double(), torch.randn(3, 48, 16).double()

    def gradients():
        loss = model([wide, tall]).logits.square().sum()
        found = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
        return dict(zip(dict(model.named_parameters()), found, strict=True))

    ours = gradients()
    with all_entries(model):
        assert_gradients(ours, gradients())


def test_images_with_any_strides():
    model = build()
    x = images(model)
    expected = results(model, x)[1]
    last = x.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_()
    assert_gradients(results(model, last)[1], expected)


def test_wrong_images_are_named_as_before():
    model = build()
    with refused("inputs", "(3, 32, 32)", "got (2, 3, 16, 16)"):
        model(torch.zeros(2, 3, 16, 16).double())
    with refused("inputs", "got ()"):
        model(torch.zeros(()).double())


def test_no_images():
    model = build()
    assert model(images(model)[:0]).logits.shape == (0, 5)
