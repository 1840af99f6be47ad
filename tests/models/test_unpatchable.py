"""What `ak.patch` and `ak.unpatch` refuse, and what a patched model refuses."""

import copy

import pytest
import torch
from checks import assert_close, refused
from torch import nn

import adatape_kernels as ak

pytest.importorskip("timm", reason="timm is not installed; `make newest` installs it")

import timm
from small_timm import vit
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock, VisionTransformer

REFUSED = {
    "parallel": ({"block_fn": ParallelThingsBlock}, "blocks.* of class", "ParallelThingsBlock"),
    "norms behind branches": ({"block_fn": ResPostBlock}, "blocks.* of class", "ResPostBlock"),
    "differential": ({"attn_layer": "diff"}, "blocks.*.attn of class", "DiffAttention"),
    "softmax": ({"act_layer": nn.Softmax}, "blocks.*.mlp.act of class", "Softmax"),
    "convolutions": (
        {"mlp_layer": timm.layers.ConvMlp},
        "blocks.*.mlp of class",
        "ConvMlp",
    ),
    "two at once": (
        {"attn_layer": "diff", "act_layer": nn.Softmax},
        "DiffAttention",
        "Softmax",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_computed_is_named_and_nothing_changes(form):
    options, *parts = REFUSED[form]
    model = vit(**options)
    assert_untouched(model, *parts)


def assert_untouched(model, *parts):
    classes = [type(module) for module in model.modules()]
    with refused("model", *parts):
        ak.patch(model)
    assert [type(module) for module in model.modules()] == classes


def test_one_block_that_differs_is_named():
    model = vit()
    model.blocks[1].norm2 = nn.BatchNorm1d(24)
    model.blocks[1].attn.forward = lambda x: x
    assert_untouched(model, "blocks.1.attn with a forward of its own", "blocks.1.norm2 of class")


@pytest.mark.parametrize(
    "name",
    ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "vit_srelpos_small_patch16_224"],
)
def test_another_architecture_is_named(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert_untouched(model, f"the class {type(model).__module__}.{type(model).__qualname__}")


def test_torchvision_s_vit_is_named():
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    assert_untouched(model, "the class torchvision.models.vision_transformer.VisionTransformer")


def test_patching_twice_and_unpatching_what_is_not_patched():
    model = ak.patch(vit())
    assert_untouched(model, "one that is; ak.unpatch gives it back")
    other = vit()
    other.blocks[1] = model.blocks[1]
    assert_untouched(other, "got blocks.1 that is; ak.unpatch")
    ak.unpatch(other)  # its block alone
    assert type(model.blocks[1]).__module__.startswith("timm.")
    ak.unpatch(model)
    for given in (model, model.blocks[0], vit()):
        with refused("model", "that ak.patch has patched", "timm.models.vision_transformer."):
            ak.unpatch(given)
    for function in (ak.patch, ak.unpatch):
        with pytest.raises(TypeError, match=r"^model: expected a module, got dict$"):
            function({})


def test_classes_that_something_else_changed_are_left_alone():
    model = ak.patch(vit())
    block = model.blocks[0]
    block.__class__ = type("Sharded", (type(block),), {})
    with refused("model", "blocks.0 of class", "Sharded"):
        ak.unpatch(model)
    assert type(model) is not VisionTransformer


class _OwnHead(VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        return 2 * super().forward_head(x, pre_logits=pre_logits)


def test_a_class_of_your_own_is_patched_and_takes_tensors():
    model, images = vit(cls=_OwnHead), torch.randn(2, 3, 32, 32)
    expected = model(images)
    ak.patch(model)
    assert_close(model(images), expected, 1e-5)
    assert_close(copy.deepcopy(model)(images), expected, 1e-5)
    with pytest.raises(TypeError, match=r"^x: expected a tensor, as _OwnHead has a forward_head"):
        model([*images])


def test_wrong_ragged_batches_are_named():
    model = ak.patch(vit(dynamic_img_size=False, global_pool="avg"))
    with refused("x", "images of (32, 32)", "dynamic_img_size=True", "got (16, 16)"):
        model([torch.randn(3, 32, 32), torch.randn(3, 16, 16)])
    with refused("x", "(3, height, width)", "got (1, 32, 32)"):
        model([torch.randn(1, 32, 32)])
    with refused("x", "(rows, 24)", "got (6, 7)"):
        model(ak.ElasticBatch.from_padded(torch.randn(2, 3, 7)))
    with refused("x", "1 or more tokens", "got 0"):
        model(ak.ElasticBatch.from_packed(torch.randn(2, 24), torch.tensor([0, 2, 2])))
    for wrong, got in (([], "no images"), (None, "None"), ({"x": 1}, "{'x': 1}"), (["a"], "str")):
        with pytest.raises(TypeError, match=r"^x: expected ") as found:
            model(wrong)
        assert str(found.value).endswith(got)
    with pytest.raises(TypeError, match=r"^x: expected a tensor for intermediates, got list$"):
        model.forward_intermediates([torch.randn(3, 32, 32)])
    model = ak.patch(vit(global_pool="prr"))
    with pytest.raises(TypeError, match=r"^x: expected a tensor for pooling by .*AttentionPoolPrr"):
        model([torch.randn(3, 32, 32)])
