import pytest
import torch
from checks import assert_close, assert_same_bits, refused
from test_image_sizes import assert_same_output, build, images_for

KEYS = ("patches", "patch_coord", "patch_valid")


def patches_of(images, size, flat=True):
    """A padded batch of patches as timm's NaFlex collator makes it, NaN where there is none."""
    lens = [image[0].numel() // size**2 for image in images]
    patches = torch.full((len(images), max(lens), size, size, 3), torch.nan, dtype=images[0].dtype)
    places = torch.zeros(len(images), max(lens), 2, dtype=torch.int64)
    exist = torch.zeros(len(images), max(lens), dtype=torch.bool)
    for i, (image, patch_count) in enumerate(zip(images, lens, strict=True)):
        rows, columns = image.shape[1] // size, image.shape[2] // size
        grid = image.view(3, rows, size, columns, size).permute(1, 3, 2, 4, 0)
        patches[i, :patch_count] = grid.flatten(0, 1)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places[i, :patch_count] = torch.stack([y.flatten(), x.flatten()], 1)
        exist[i, :patch_count] = True
    return dict(zip(KEYS, (patches.flatten(2) if flat else patches, places, exist), strict=True))


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("bank", ["input", "learn"])
def test_patches_equal_the_images_that_they_were_cut_from(bank, flat):
    model = build(torch.float64, bank=bank, bank_size=30)
    images = images_for(model)
    inputs = patches_of(images, 4, flat)
    assert_same_bits(model(inputs).logits, model(images).logits)
    assert_same_output(model(inputs), model.padded()(inputs), 1e-12)
    inputs["seq_len"] = inputs["patches"].shape[1]
    inputs["patch_coord"] = inputs["patch_coord"].int()
    assert_same_bits(model(inputs, capacity=40).logits, model(images, capacity=40).logits)


def test_patches_may_lie_in_any_order():
    model = build(torch.float64)
    images = images_for(model)
    inputs = patches_of(images, 4)
    order = torch.stack([torch.randperm(inputs["patches"].shape[1]) for _ in images])
    shuffled = {
        key: torch.stack([part[own] for part, own in zip(inputs[key], order, strict=True)])
        for key in KEYS
    }
    assert_same_bits(model(shuffled).logits, model(images).logits)


def test_bank_patches_may_be_larger_than_patches():
    model = build(torch.float64, patch_size=2, bank_patch_size=8, topk=2)
    images = images_for(model)
    assert_same_bits(model(patches_of(images, 2)).logits, model(images).logits)


def test_gradients_reach_patches_and_skip_padding():
    model = build(torch.float64)
    images = [image.requires_grad_() for image in images_for(model)]
    inputs = patches_of([image.detach() for image in images], 4)
    patches = inputs["patches"].requires_grad_()
    model(inputs).logits.sum().backward()
    model(images).logits.sum().backward()
    grads = patches_of([image.grad for image in images], 4)
    exist = inputs["patch_valid"]
    assert_close(patches.grad[exist], grads["patches"][exist], 1e-12)
    assert not patches.grad[~exist].any()


def changed(key, value):
    return lambda inputs: {**inputs, key: value(inputs[key])}


def with_place(place):
    def change(places):
        places = places.clone()
        places[1, 3] = torch.tensor(place)
        return places

    return changed("patch_coord", change)


FAULTS = {
    "no patches": (lambda x: {k: v for k, v in x.items() if k != "patches"}, "inputs", "patches"),
    "none at all": (lambda x: {}, "inputs", "patch_valid", "got []"),
    "a mask of attention": (lambda x: {**x, "attn_mask": None}, "inputs", "attn_mask"),
    "another patch size": (changed("patches", lambda p: p[..., :27]), "inputs['patches']", "48"),
    "channels first": (
        changed("patches", lambda p: p.unflatten(2, (3, 4, 4))),
        "inputs['patches']",
        "4, 4, 3)",
    ),
    "images for patches": (changed("patches", lambda p: p[0]), "inputs['patches']", "(batch, lon"),
    "patches of bytes": (changed("patches", lambda p: p.byte()), "inputs['patches']", "uint8"),
    "places of floats": (changed("patch_coord", lambda c: c.float()), "inputs['patch_coord']"),
    "places of one axis": (changed("patch_coord", lambda c: c[..., 0]), "inputs['patch_coord']"),
    "fewer places": (changed("patch_coord", lambda c: c[:, 1:]), "inputs['patch_coord']"),
    "a mask of numbers": (changed("patch_valid", lambda v: v.int()), "inputs['patch_valid']"),
    "a mask of fewer": (changed("patch_valid", lambda v: v[1:]), "inputs['patch_valid']"),
    "nothing valid": (
        changed("patch_valid", torch.zeros_like),
        "inputs['patch_valid']",
        "none in image 0",
    ),
    "a place twice": (with_place((0, 1)), "inputs['patch_coord']", "(0, 1) twice in image 1"),
    "a negative place": (with_place((0, -1)), "inputs['patch_coord']", "(0, -1) in image 1"),
    "a place far away": (with_place((1 << 40, 1 << 40)), "inputs['patch_coord']", "in image 1"),
    "a hole": (
        lambda x: {
            **x,
            "patch_valid": x["patch_valid"] & (torch.arange(x["patch_valid"].shape[1]) != 2),
        },
        "inputs['patch_coord']",
        "15 places of a grid of 4 by 4 in image 0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_entry_is_named(fault):
    model = build()
    change, *expected = FAULTS[fault]
    inputs = change(patches_of(images_for(model), 4))
    with refused(*expected):
        model(inputs)


@pytest.mark.parametrize("key", KEYS)
def test_an_entry_that_is_no_tensor_is_named(key):
    model = build()
    inputs = patches_of(images_for(model), 4)
    inputs[key] = inputs[key].tolist()
    with refused(f"inputs[{key!r}]", error=TypeError):
        model(inputs)
