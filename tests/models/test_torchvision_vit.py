"""`from_torchvision` beside torchvision's own VisionTransformer."""

import functools

import pytest
import torch
from checks import assert_close, refused
from torch import nn

from adatape_kernels.models import from_torchvision

pytest.importorskip("torchvision", reason="torchvision is not installed; `make newest` installs it")

from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer


def vit(**options):
    sizes = {"num_layers": 3, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 40, "num_classes": 7}
    model = VisionTransformer(32, 8, **{**sizes, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_while_nothing_is_read_the_logits_are_torchvision_s(eps):
    theirs = vit(norm_layer=functools.partial(nn.LayerNorm, eps=eps))
    images = torch.randn(3, 3, 32, 32)
    expected = theirs(images).detach()
    for options in ({"halt_threshold": 0}, {"num_tape_tokens": 0}, {"read_layers": ()}):
        ours = from_torchvision(theirs, **options)
        for model in (ours, ours.padded()):
            assert_close(model(images).logits, expected, 1e-5)
    again = from_torchvision(theirs.state_dict(), num_heads=2, norm_eps=eps, halt_threshold=0)
    assert_close(again(images).logits, expected, 1e-5)


def test_choices_are_the_source_s():
    theirs = vit(dropout=0.1, attention_dropout=0.2).train()
    theirs.encoder.layers[0].requires_grad_(False)
    ours = from_torchvision(theirs, bank="learn", bank_size=20)
    config = ours.config
    assert (config.dropout, config.attention_dropout, config.num_heads) == (0.1, 0.2, 2)
    assert (config.image_size, config.patch_size, config.activation) == (32, 8, "gelu")
    assert ours.training and not ours.encoder.layers[0].linear1.weight.requires_grad
    assert ours.preprocessing is None


def test_early_names_of_parameters_are_known():
    theirs = vit()
    state = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for name, tensor in theirs.state_dict().items()
    }
    images = torch.randn(1, 3, 32, 32)
    ours = from_torchvision(state, num_heads=2, halt_threshold=0)
    assert_close(ours(images).logits, theirs(images).detach(), 1e-5)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"representation_size": 12}, "heads of pre_logits, act, head"),
        ({"conv_stem_configs": [ConvStemConfig(8, 8, 8)]}, "conv_proj of class"),
        ({"norm_layer": nn.RMSNorm}, "encoder.layers.*.ln_1 of class torch.nn.modules.norm"),
    ],
)
def test_what_is_not_computed_is_named(options, part):
    with refused("model", part):
        from_torchvision(vit(**options))


def test_changed_parts_are_named_all_at_once():
    theirs = vit()
    theirs.encoder.layers[1].mlp[1] = nn.SiLU()
    theirs.heads.register_forward_hook(lambda *_: None)
    with refused("model", "encoder.layers.1.mlp.1 of", "SiLU", "heads with hooks"):
        from_torchvision(theirs)
    theirs = vit()
    theirs.encoder.layers[2].ln_1.eps = 0.1
    theirs.encoder.layers[2].dropout.p = 0.5
    theirs.encoder.layers[0].mlp[1].approximate = "tanh"
    with refused("model", "several epsilons", "several rates of dropout", "form of GELU"):
        from_torchvision(theirs)


def test_other_heads():
    theirs, images = vit(), torch.randn(2, 3, 32, 32)
    theirs.heads = nn.Linear(24, 5)
    ours = from_torchvision(theirs, halt_threshold=0)
    assert_close(ours(images).logits, theirs(images).detach(), 1e-5)
    for head in (nn.Identity(), nn.Sequential()):
        theirs.heads = head
        with refused("num_classes", "no head"):
            from_torchvision(theirs)
        assert from_torchvision(theirs, num_classes=4).config.num_classes == 4
    theirs.heads = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 5))
    with refused("model", "heads of 0, 1"):
        from_torchvision(theirs)
