"""`ak.patch` on timm's NaFlexVit, whose batches of patches are padded."""

import pytest
import torch
from checks import assert_close, refused
from torch import nn

import adatape_kernels as ak

pytest.importorskip("timm", reason="timm is not installed; `make newest` installs it")

from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

GRIDS = (3, 5), (6, 6), (1, 1), (2, 7)
FORMS = {
    "pooling by attention": {},
    "class token": {"class_token": True, "global_pool": "token"},
    "registers": {"reg_tokens": 3, "class_token": True, "global_pool": "avg"},
    "half maximum": {"global_pool": "avgmax"},
    "factorised positions": {"pos_embed": "factorized", "global_pool": "max"},
    "LayerScale": {"init_values": 0.1, "use_key_only_attn_mask": True},
}


def naflex(**options):
    sizes = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    config = NaFlexVitCfg(**{**sizes, "pos_embed_grid_size": (6, 6), **options})
    model = NaFlexVit(config, num_classes=5).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def patches_of(grids):
    longest = max(height * width for height, width in grids)
    coord = torch.zeros(len(grids), longest, 2, dtype=torch.int64)
    valid = torch.zeros(len(grids), longest, dtype=torch.bool)
    for number, (height, width) in enumerate(grids):
        count = height * width
        coord[number, :count] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        valid[number, :count] = True
    patches = torch.randn(len(grids), longest, 4 * 4 * 3)
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


@pytest.mark.parametrize("form", FORMS)
def test_valid_patches_get_what_timm_gives_them(form):
    model, batch = naflex(**FORMS[form]), patches_of(GRIDS)
    logits, features = model(batch), model.forward_features(**batch)["patches"]
    images, several = torch.randn(2, 3, 24, 24), [torch.randn(3, 8, 16), torch.randn(3, 24, 24)]
    of_images = model(images)
    alone = torch.cat([model(image.unsqueeze(0)) for image in several])

    ak.patch(model)
    assert_close(model(batch), logits, 1e-5)
    found = model.forward_features(**batch)
    valid = nn.functional.pad(batch["patch_valid"], (model.num_prefix_tokens, 0), value=True)
    assert_close(found["patches"][valid], features[valid], 1e-5)
    assert (found["patches"][~valid] == 0).all()
    assert_close(model(images), of_images, 1e-5)
    assert_close(model(several), alone, 1e-5)


def test_padding_is_not_computed():
    model, batch = ak.patch(naflex()), patches_of(GRIDS)
    rows = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda m, given, out: rows.append(len(out)))
    model(batch)
    assert rows == [sum(height * width for height, width in GRIDS)]


def test_training_draws_what_timm_draws():
    model, batch = naflex(patch_drop_rate=0.5, drop_path_rate=0.3).train(), patches_of(GRIDS[:2])
    found = []
    for change in (lambda model: model, ak.patch):
        change(model)
        model.zero_grad()
        torch.manual_seed(3)
        out = model(batch)
        out.square().sum().backward()
        found += [out.detach(), model.embeds.proj.weight.grad.clone()]
    assert_close(found[2], found[0], 1e-5)
    assert_close(found[3], found[1], 1e-4)


def test_a_mask_of_your_own_is_timm_s():
    model, batch = naflex(), patches_of(GRIDS)
    mask = torch.where(batch["patch_valid"], 0.0, -1e9)[:, None, None]
    expected = model({**batch, "attn_mask": mask})
    assert_close(ak.patch(model)({**batch, "attn_mask": mask}), expected, 1e-5)
    with refused("x", "a tensor where a mask is given"):
        model.forward_features([torch.randn(3, 24, 24)], attn_mask=mask)


def test_rotary_positions_are_named():
    with refused("model", "blocks.* of class timm.models.eva.EvaBlock"):
        ak.patch(naflex(rope_type="axial"))
