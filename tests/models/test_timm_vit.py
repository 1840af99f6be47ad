"""`from_timm` beside timm's own VisionTransformer."""

import copy
import subprocess
import sys

import pytest
import torch
from checks import assert_close, refused
from torch import nn

from adatape_kernels.models import from_timm

pytest.importorskip("timm", reason="timm is not installed; `make newest` installs it")

import timm
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
KNOWN = {
    "class token": {},
    "LayerScale, positions of patches alone": {"init_values": 0.1, "no_embed_class": True},
    "registers": {"reg_tokens": 3},
    "registers without positions": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
    "mean": {"global_pool": "avg"},
    "mean without a class token": {"global_pool": "avg", "class_token": False},
    "norm, then mean": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "mean beside registers": {"global_pool": "avg", "reg_tokens": 2, "fc_norm": False},
    "mean of all": {"global_pool": "avg", "class_token": False, "pool_include_prefix": True},
    "max": {"global_pool": "max"},
    "norm before the blocks": {"pre_norm": True, "norm_layer": nn.LayerNorm},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "no positions": {"pos_embed": "none"},
    "tanh": {"act_layer": "gelu_tanh"},
    "ReLU": {"act_layer": "relu"},
    "timm's GELU": {"act_layer": "gelu"},
    "dynamic": {"dynamic_img_size": True},
    "grey": {"in_chans": 1},
    "rates": {"drop_path_rate": 0.2, "proj_drop_rate": 0.1, "pos_drop_rate": 0.1},
}
REFUSED = {
    "norms of queries and keys": ({"qk_norm": True}, "blocks.*.attn.q_norm of", "attn.k_norm of"),
    "RMSNorm": ({"norm_layer": "rmsnorm"}, "blocks.*.norm1 of class timm", "RmsNorm"),
    "quick GELU": ({"act_layer": "quick_gelu"}, "blocks.*.mlp.act of", "QuickGELU"),
    "SwiGLU": ({"mlp_layer": timm.layers.SwiGLU}, "blocks.*.mlp of", "SwiGLU"),
    "packed SwiGLU": ({"mlp_layer": timm.layers.SwiGLUPacked}, "blocks.*.mlp of"),
    "map pooling": ({"global_pool": "map"}, "attn_pool of", "AttentionPoolLatent"),
    "half maximum": ({"global_pool": "avgmax"}, "global_pool = 'avgmax'"),
    "no pooling": ({"global_pool": ""}, "global_pool = ''"),
    "mean with the class token": (
        {"global_pool": "avg", "pool_include_prefix": True},
        "pool_include_prefix",
    ),
    "norm of attention": ({"scale_attn_norm": True}, "blocks.*.attn.norm of"),
    "norm of the MLP": ({"scale_mlp_norm": True}, "blocks.*.mlp.norm of"),
    "norm of patches": ({"embed_norm_layer": "layernorm"}, "patch_embed.norm of"),
    "no last norm": ({"final_norm": False}, "norms behind the blocks"),
    "oblong image": ({"img_size": (32, 16)}, "img_size = (32, 16)"),
    "oblong patches": ({"patch_size": (8, 4)}, "patch_embed.proj"),
    "dropout of the head": ({"drop_rate": 0.1}, "head_drop of 0.1"),
    "dropout of patches": ({"patch_drop_rate": 0.1}, "patch_drop of"),
    "another dropout": ({"proj_drop_rate": 0.1}, "several rates of dropout: 0.0, 0.1"),
    "norms behind branches": ({"block_fn": ResPostBlock}, "blocks.* of", "ResPostBlock"),
    "parallel": ({"block_fn": ParallelThingsBlock}, "ParallelThingsBlock"),
    "differential": ({"attn_layer": "diff"}, "blocks.*.attn of", "DiffAttention"),
    "two at once": ({"qk_norm": True, "drop_rate": 0.1, "global_pool": "map"}, "q_norm", "attn_po"),
}


def vit(**options):
    model = timm.models.VisionTransformer(**{**SIZES, "num_classes": 7, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("form", KNOWN)
def test_while_nothing_is_read_the_logits_are_timm_s(form):
    theirs = vit(**KNOWN[form])
    images = torch.randn(3, theirs.patch_embed.proj.in_channels, 32, 32)
    expected = theirs(images).detach()
    for options in ({"halt_threshold": 0}, {"num_tape_tokens": 0}, {"read_layers": ()}):
        ours = from_timm(theirs, **options)
        for model in (ours, ours.padded()):
            assert_close(model(images).logits, expected, 1e-5)
    choices = ours.config
    again = from_timm(
        theirs.state_dict(),
        num_heads=2,
        image_size=32,
        pooling=choices.pooling,
        activation=choices.activation,
        norm_eps=choices.norm_eps,
        read_layers=(),
    )
    assert_close(again(images).logits, expected, 1e-5)


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_computed_is_named(form):
    options, *parts = REFUSED[form]
    with refused("model", *parts):
        from_timm(vit(**options))


def test_gradients_are_timm_s():
    theirs = vit(init_values=0.3)
    ours, images = from_timm(theirs, halt_threshold=0), torch.randn(2, 3, 32, 32)
    for model in (theirs, ours):
        out = model(images)
        (out if model is theirs else out.logits).square().sum().backward()
    assert_close(ours.patch_embed.weight.grad, theirs.patch_embed.proj.weight.grad, 1e-4)
    assert_close(ours.position.grad, theirs.pos_embed.grad, 1e-4)
    for ours_of, theirs_of in zip(ours.encoder.layers, theirs.blocks, strict=True):
        assert_close(ours_of.self_attn.in_proj_weight.grad, theirs_of.attn.qkv.weight.grad, 1e-4)
        assert_close(ours_of.linear1.weight.grad, theirs_of.mlp.fc1.weight.grad, 1e-4)


def test_rates_mode_and_frozen_parameters_are_the_source_s():
    theirs = vit(drop_path_rate=0.2, proj_drop_rate=0.1, pos_drop_rate=0.1, attn_drop_rate=0.3)
    theirs.train().blocks[0].requires_grad_(False)
    ours = from_timm(theirs)
    config = ours.config
    assert (config.dropout, config.attention_dropout) == (0.1, 0.3)
    assert config.stochastic_depth == pytest.approx(0.2)
    assert ours.training and not any(
        p.requires_grad for p in ours.encoder.layers[0].norm1.parameters()
    )
    assert not ours.encoder.layers[0].self_attn.in_proj_weight.requires_grad
    assert ours.encoder.layers[1].linear1.weight.requires_grad
    assert ours.encoder.layers[0].tape_linear1.weight.requires_grad
    assert from_timm(theirs, dropout=0.0).config.dropout == 0.0


def test_the_epsilon_is_the_source_s():
    theirs = vit(norm_layer=lambda dim, **where: nn.LayerNorm(dim, eps=0.3, **where))
    ours, images = from_timm(theirs, read_layers=()), torch.randn(2, 3, 32, 32)
    assert ours.config.norm_eps == 0.3
    assert_close(ours(images).logits, theirs(images).detach(), 1e-5)
    theirs.blocks[1].norm2.eps = 0.4
    with refused("model", "several epsilons of norms: 0.3, 0.4"):
        from_timm(theirs)


def test_norms_without_weights_are_those_of_ones():
    theirs = vit(norm_layer=lambda dim, **w: nn.LayerNorm(dim, elementwise_affine=False, **w))
    ours, images = from_timm(theirs, read_layers=()), torch.randn(2, 3, 32, 32)
    assert_close(ours(images).logits, theirs(images).detach(), 1e-5)


def test_a_model_of_timm_s_registry_brings_its_preprocessing():
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3).eval()
    ours = from_timm(theirs, topk=2)
    assert ours.preprocessing.image_size == 32 and ours.preprocessing.channels == 3
    assert ours.preprocessing.mean == tuple(theirs.pretrained_cfg["mean"])
    assert ours.preprocessing.std == tuple(theirs.pretrained_cfg["std"])
    assert ours.class_names is None and ours.config.num_classes == 3
    assert from_timm(vit(), topk=2).preprocessing is None


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "resnet18"]
)
def test_other_architectures_of_timm_are_refused_by_their_class(name):
    theirs = timm.create_model(name)
    with refused("model", f"the class {type(theirs).__module__}"):
        from_timm(theirs)


def test_modules_that_do_more_are_refused():
    hooked = vit()
    hooked.blocks[1].attn.register_forward_hook(lambda *_: None)
    with refused("model", "blocks.1.attn with hooks"):
        from_timm(hooked)
    normed = vit()
    nn.utils.parametrizations.weight_norm(normed.blocks[2].mlp.fc1)
    with refused("model", "blocks.2.mlp.fc1 of class", "Parametrized"):
        from_timm(normed)
    scaled = vit()
    scaled.blocks[0].attn.scale *= 2
    with refused("model", "blocks.0.attn.scale"):
        from_timm(scaled)


def test_a_source_without_a_head_gets_a_new_one():
    theirs = vit(num_classes=0)
    with refused("num_classes", "no head"):
        from_timm(theirs)
    assert from_timm(theirs, num_classes=4).head.weight.shape == (4, 24)


def test_parts_that_do_nothing_and_buffers_are_known():
    theirs, images = vit(), torch.randn(2, 3, 32, 32)
    theirs.blocks[0].attn.proj_drop = theirs.head_drop = nn.Identity()
    position = theirs.pos_embed.detach()
    del theirs.pos_embed
    theirs.register_buffer("pos_embed", position)
    ours = from_timm(theirs, read_layers=())
    assert_close(ours(images).logits, theirs(images).detach(), 1e-5)
    assert not ours.position.requires_grad
    del theirs.pos_embed
    theirs.pos_embed = position
    with refused("model", "pos_embed that is neither a parameter nor a buffer"):
        from_timm(theirs)


def test_importing_the_package_imports_neither_timm_nor_torchvision():
    program = "import sys, adatape_kernels; print({'timm', 'torchvision'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.strip() == "set()", found.stderr


def test_a_block_that_is_there_twice():
    theirs, images = vit(), torch.randn(2, 3, 32, 32)
    theirs.blocks[2] = theirs.blocks[0]
    ours = from_timm(theirs, read_layers=())
    assert_close(ours(images).logits, theirs(images).detach(), 1e-5)


def test_the_source_stays_as_it_is():
    theirs = vit(init_values=0.1)
    before = copy.deepcopy(theirs.state_dict())
    ours = from_timm(theirs)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], t) for name, t in theirs.state_dict().items())
