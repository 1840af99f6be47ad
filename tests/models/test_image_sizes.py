import itertools
import math

import pytest
import torch
from checks import assert_close, assert_same_bits, refused

from adatape_kernels.models import AdaTapeParity, AdaTapeParityConfig, AdaTapeViT, AdaTapeViTConfig

BASE = {
    "num_classes": 7,
    "dim": 24,
    "depth": 2,
    "num_heads": 3,
    "ffn_dim": 48,
    "tape_ffn_dim": 16,
    "num_tape_tokens": 5,
    "topk": 3,
    "halt_threshold": 1.5,
    "image_size": 16,
    "patch_size": 4,
    "bank_patch_size": 2,
}
VARIANTS = {
    "input bank": {},
    "learned bank, two reads": {"bank": "learn", "bank_size": 50, "read_layers": (0, 1)},
    "mean pooling": {"query": "gap", "pooling": "mean"},
    "max pooling, registers": {"query": "gap", "pooling": "max", "num_registers": 2},
    "registers, norms of CLIP": {
        "num_registers": 1,
        "pre_norm": True,
        "norm_after_pooling": True,
        "tape_ffn_dim": 0,
    },
    "bank patches that do not divide": {"image_size": 24, "bank_patch_size": 6, "topk": 1},
    "coarse bank": {"bank_patch_size": 8, "patch_size": 2, "topk": 2},
    "no reads": {"read_layers": ()},
}
SIZES = ((16, 16), (24, 8), (8, 40), (16, 16), (64, 8), (24, 24))


def build(dtype=torch.float32, **changes):
    model = AdaTapeViT(AdaTapeViTConfig(**{**BASE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def images_for(model, sizes=SIZES):
    """Images whose sides are multiples of both patch sizes."""
    c = model.config
    step = math.lcm(c.patch_size, c.bank_patch_size)
    up = 1 if all(side % step == 0 for size in sizes for side in size) else 3
    return [torch.randn(3, up * h, up * w, dtype=model.head.weight.dtype) for h, w in sizes]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def assert_close_gradients(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(ours[name], theirs[name], tolerance)


def assert_same_output(a, b, tolerance):
    assert torch.equal(a.tape_lens, b.tape_lens)
    assert_close(a.logits, b.logits.detach(), tolerance)
    assert_close(a.ponder, b.ponder.detach(), tolerance)
    for x, y in zip(a.reads, b.reads, strict=True):
        assert torch.equal(x.indices, y.indices)


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_sizes_equal_padded(variant):
    model = build(torch.float64, **VARIANTS[variant])
    images, labels = images_for(model), torch.randint(7, (len(SIZES),))
    ours, padded = model(images), model.padded()(images)
    assert_same_output(ours, padded, 1e-12)
    # The gradient of the keys' bias is 0 but for rounding.
    assert_close_gradients(
        gradients(model, model.loss(ours, labels)),
        gradients(model, model.loss(padded, labels)),
        1e-10,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_sizes_equal_each_alone(variant):
    model = build(torch.float64, **VARIANTS[variant])
    images, labels = images_for(model), torch.randint(7, (len(SIZES),))
    together = model(images)
    alone = [model([image]) for image in images]
    for i, each in enumerate(alone):
        assert_close(each.logits[0], together.logits[i].detach(), 1e-12)
        assert_close(each.ponder[0], together.ponder[i].detach(), 1e-12)
        for x, y in zip(each.reads, together.reads, strict=True):
            assert torch.equal(x.indices[0], y.indices[i])
    losses = [model.loss(each, label[None]) for each, label in zip(alone, labels, strict=True)]
    assert_close_gradients(
        gradients(model, model.loss(together, labels)),
        gradients(model, torch.stack(losses).mean()),
        1e-10,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_the_models_own_size_equal_one_tensor(variant):
    model = build(torch.float64, **VARIANTS[variant])
    images = torch.randn(3, 3, *[model.config.image_size] * 2, dtype=torch.float64)
    assert_same_output(model([*images]), model(images), 1e-12)
    assert_same_output(model(tuple(images)), model(images), 1e-12)


def test_the_order_of_images_is_that_of_results():
    model = build(torch.float64)
    images, order = images_for(model), [3, 0, 5, 1, 4, 2]
    together = model(images).logits
    assert_close(model([images[i] for i in order]).logits, together[order].detach(), 1e-12)


@pytest.mark.parametrize("variant", ["input bank", "learned bank, two reads", "mean pooling"])
def test_capacity_equals_exact(variant):
    model = build(torch.float64, **VARIANTS[variant])
    images = images_for(model)
    assert_same_output(model(images, capacity=40), model(images), 1e-12)
    with refused("capacity"):
        model(images, capacity=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree_with_float64(dtype):
    model = build(dtype)
    images = images_for(model)
    ours = model(images).logits
    exact = model.double().padded()([image.double() for image in images]).logits
    assert_close(ours, exact, 1e-5 if dtype == torch.float32 else 0.1)


def test_tape_lengths_differ_between_images_and_banks_have_their_own_lengths():
    model = build(halt_threshold=1.9, topk=2, num_tape_tokens=9)
    images = [torch.randn(3, 4 * h, 4 * w) for h, w in itertools.product(range(1, 6), range(1, 6))]
    out = model(images)
    banks = torch.tensor([image[0].numel() // 4 for image in images])
    assert (out.reads[0].indices.amax((1, 2)) < banks).all()
    assert len(out.tape_lens.unique()) > 1


def test_a_bank_shorter_than_topk_reads_nothing_alone_and_together():
    model = build(torch.float64, topk=5)
    small, large = images_for(model, ((4, 4), (16, 16)))
    assert model([small]).tape_lens.tolist() == [0]
    assert model.padded()([small]).tape_lens.tolist() == [0]
    together = model([small, large])
    assert together.tape_lens[0] == 0 and together.tape_lens[1] > 0
    assert_close(model([small]).logits, together.logits[:1].detach(), 1e-12)


@pytest.mark.parametrize("sizes", [((4, 4),), ((4, 400),), ((400, 4), (4, 4))])
def test_extreme_grids(sizes):
    model = build(torch.float64)
    images = images_for(model, sizes)
    assert_same_output(model(images), model.padded()(images), 1e-12)


def test_no_images_give_no_logits():
    model = build()
    for inputs in ([], ()):
        out = model(inputs)
        assert out.logits.shape == (0, 7) and out.tape_lens.shape == (0,)
        assert model.padded()(inputs).logits.shape == (0, 7)


def test_gradients_reach_images():
    model = build(torch.float64)
    images = [image.requires_grad_() for image in images_for(model)]
    model(images).logits.sum().backward()
    padded = [image.detach().clone().requires_grad_() for image in images]
    model.padded()(padded).logits.sum().backward()
    for ours, theirs in zip(images, padded, strict=True):
        assert_close(ours.grad, theirs.grad, 1e-10)


def test_a_poisoned_image_harms_nobody_else():
    model = build()
    images = images_for(model)
    clean = model(images).logits
    images[2] = torch.full_like(images[2], torch.nan)
    others = [0, 1, 3, 4, 5]
    assert_same_bits(model(images).logits[others], clean[others])


def test_images_with_any_strides():
    model = build(torch.float64)
    image = torch.randn(3, 16, 24, dtype=torch.float64)
    turned = image.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert_same_bits(model([turned]).logits, model([image]).logits)


def test_hooks_on_the_embeddings_run():
    model, seen = build(torch.float64), []
    images = images_for(model)
    before = model(images).logits
    for embed in (model.patch_embed, model.bank_embed):
        embed.register_forward_hook(lambda module, args, out: seen.append(out.shape) or 2 * out)
    assert not torch.allclose(model(images).logits, before)
    assert len(seen) == 2


def test_autocast_takes_images_in_float32():
    model = build()
    images = images_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        together = model(images).logits
        assert_close(together.float(), model.padded()(images).logits.detach().float(), 0.1)


def test_dropout_in_training():
    model = build(dropout=0.5, bank_dropout=0.3, query_noise=0.1, stochastic_depth=0.5).train()
    images = images_for(model)
    loss = model.loss(model(images), torch.zeros(len(images), dtype=torch.long))
    loss.backward()
    assert loss.isfinite() and not torch.equal(model(images).logits, model(images).logits)


@pytest.mark.compiles
def test_what_comes_after_the_embedding_compiles(fresh_compiler):
    model = build(depth=1)
    compiled = torch.compile(model, backend="eager")
    for sizes in (SIZES[:2], SIZES[2:]):
        images = images_for(model, sizes)
        assert_close(compiled(images).logits, model(images).logits.detach(), 1e-5)


def test_an_exported_program_keeps_the_sizes():
    model = build(depth=1)
    images = images_for(model, SIZES[:3])
    program = torch.export.export(model, (images,), {"capacity": 15}, strict=False)
    again = images_for(model, SIZES[:3])
    assert_close(program.module()(again, capacity=15).logits, model(again).logits.detach(), 1e-5)


@pytest.mark.parametrize(
    "image, parts",
    [
        (torch.zeros(3, 18, 16), ("(3, height, width)", "multiples of 4", "(3, 18, 16)")),
        (torch.zeros(3, 16, 0), ("multiples of 4", "(3, 16, 0)")),
        (torch.zeros(3, 0, 0), ("(3, 0, 0)",)),
        (torch.zeros(1, 16, 16), ("(3, height, width)", "(1, 16, 16)")),
        (torch.zeros(1, 3, 16, 16), ("(3, height, width)", "(1, 3, 16, 16)")),
        (torch.zeros(16, 16), ("(16, 16)",)),
        (torch.tensor(1.0), ("()",)),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), ("torch.float32", "torch.uint8")),
        (torch.zeros(3, 16, 16, dtype=torch.float64), ("torch.float32", "torch.float64")),
        (torch.zeros(3, 16, 16, device="meta"), ("cpu", "meta")),
        (torch.zeros(3, 16, 16).to_sparse(), ("a dense tensor", "torch.sparse_coo")),
    ],
)
def test_a_wrong_image_is_named(image, parts):
    model = build()
    with refused("inputs[1]", *parts):
        model([torch.zeros(3, 16, 16), image])
    with refused("inputs[1]", *parts):
        model.padded()([torch.zeros(3, 16, 16), image])


def test_what_is_no_image_is_named():
    model = build()
    with refused("inputs", "(batch, (3, 16, 16)) or a list of images", "(2, 3, 8, 16)"):
        model(torch.zeros(2, 3, 8, 16))
    for wrong in (torch.zeros(3, 16, 16).numpy(), None, [[1.0]], "a.png"):
        with refused("inputs[0]", error=TypeError):
            model([wrong])
    for wrong in (None, 3, "photo.jpg", iter([]), torch.zeros(3, 16, 16).numpy(), {1, 2}):
        with refused("inputs", error=TypeError):
            model(wrong)


def test_a_nested_image_is_named():
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    with refused("inputs[0]", "a dense tensor", "a nested one"):
        build()([nested])


def test_bank_patches_count_among_the_sides():
    model = build(image_size=24, bank_patch_size=6, topk=1)
    with refused("inputs[0]", "multiples of 12"):
        model([torch.zeros(3, 16, 24)])
    build(image_size=24, bank_patch_size=6, bank="learn")([torch.zeros(3, 16, 24)])


def test_other_models_still_name_what_they_take():
    model = AdaTapeParity(
        AdaTapeParityConfig(num_classes=2, dim=24, depth=1, num_heads=2, ffn_dim=32, seq_len=8)
    )
    with pytest.raises(TypeError, match="inputs: expected"):
        model([torch.zeros(8, 3)])


@pytest.mark.parametrize("kind", ["tensor", "list"])
def test_images_of_another_dtype_or_device_are_named(kind):
    given = torch.zeros(2, 3, 16, 16)
    name = {"tensor": "inputs", "list": "inputs[0]"}[kind]
    for wrong, expected in (
        (given.bfloat16(), "torch.float32"),
        (given.double(), "torch.float32"),
        (given.to(torch.complex64), "torch.float32"),
        (given.to(torch.uint8), "torch.float32"),
        (given.to("meta"), "cpu"),
    ):
        with refused(name, expected):
            build()(wrong if kind == "tensor" else list(wrong))
    with refused(name, "meta"):
        build().to("meta")(given if kind == "tensor" else list(given))
    with torch.autocast("cpu", torch.bfloat16):
        build()(given.bfloat16() if kind == "tensor" else list(given.bfloat16()))
