"""`ak.patch` and `ak.unpatch` beside timm's own ViTs."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from checks import assert_close, refused
from torch import nn

import adatape_kernels as ak
from adatape_kernels.ops.op import record

pytest.importorskip("timm", reason="timm is not installed; `make newest` installs it")

from small_timm import vit
from timm.layers import SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

FORMS = {
    "class token": {},
    "LayerScale, positions of patches alone": {"init_values": 0.1, "no_embed_class": True},
    "registers": {"reg_tokens": 3, "global_pool": "avg"},
    "mean of all": {"global_pool": "avg", "pool_include_prefix": True, "fc_norm": False},
    "no class token": {"global_pool": "max", "class_token": False},
    "half maximum": {"global_pool": "avgmax"},
    "pooling by attention": {"global_pool": "map"},
    "norm before the blocks": {"pre_norm": True, "norm_layer": nn.LayerNorm},
    "norms of all kinds": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "RMSNorm": {"norm_layer": "rmsnorm", "qk_norm": True},
    "norms without weights": {
        "norm_layer": lambda dim, **where: nn.LayerNorm(dim, elementwise_affine=False, **where)
    },
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "ReLU": {"act_layer": "relu"},
    "tanh": {"act_layer": "gelu_tanh"},
    "timm's GELU": {"act_layer": "gelu"},
    "another activation": {"act_layer": "quick_gelu"},
    "another MLP": {"mlp_layer": SwiGLU},
    "no head": {"num_classes": 0},
    "distilled": {"cls": VisionTransformerDistilled},
}
SEVERAL = [torch.Size(size) for size in ((3, 32, 32), (3, 16, 40), (3, 8, 8), (3, 32, 32))]


def gradients(model, out):
    model.zero_grad()
    out.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_and_images_of_several_sizes_give_what_timm_gives(form):
    model = vit(**FORMS[form])
    images = torch.randn(2, 3, 32, 32)
    several = [torch.randn(size) for size in SEVERAL]
    logits, features = model(images), model.forward_features(images)
    alone = torch.cat([model(image.unsqueeze(0)) for image in several])
    of_logits, of_alone = gradients(model, logits), gradients(model, alone)

    assert ak.patch(model) is model
    with record() as ran:
        ours = model(images)
    packed = "" if FORMS[form].get("qk_norm") else "_qkvpacked"
    assert {f"elastic_attention{packed}"} <= {each.op for each in ran}
    assert_close(ours, logits.detach(), 1e-5)
    assert_close(model.forward_features(images), features.detach(), 1e-5)
    assert_same_gradients(gradients(model, ours), of_logits)
    ours = model(several)
    assert_close(ours, alone.detach(), 1e-5)
    assert_same_gradients(gradients(model, ours), of_alone)


def test_the_model_takes_embedded_tokens():
    model = vit(global_pool="avg", reg_tokens=2)
    images = torch.randn(3, 3, 32, 32)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    expected, features = model(images), model.forward_features(images)
    ak.patch(model)
    x = ak.ElasticBatch.from_padded(tokens)
    assert_close(model(x), expected, 1e-5)
    assert_close(model.forward_features(x).to_padded()[0], features, 1e-5)
    assert_close(model.forward_head(model.forward_features(x)), expected, 1e-5)
    assert_close(model.pool(x), model.pool(tokens), 1e-5)
    # Tape rows are rows like others, and unused rows stay zero.
    tape = ak.ElasticBatch.from_padded(tokens, tape_lens=torch.tensor([0, 2, 5]))
    assert_close(model(tape.round_rows(64)), expected, 1e-5)
    assert model.forward_features(tape.round_rows(64)).data[-1].abs().max() == 0


def test_without_pooling_a_ragged_batch_comes_out():
    model = ak.patch(vit(global_pool="", num_classes=5))
    several = [torch.randn(size) for size in SEVERAL]
    out = model(several)
    assert out.lens.tolist() == [17, 11, 2, 17]
    assert_close(out.data[17:28], model(several[1].unsqueeze(0))[0], 1e-5)


def test_a_block_alone_is_patched():
    block = vit().blocks[0]
    x = torch.randn(2, 7, 24)
    expected = block(x)
    ak.patch(block)
    assert_close(block(x), expected, 1e-5)
    assert_close(block(ak.ElasticBatch.from_padded(x)).to_padded()[0], expected, 1e-5)
    assert type(ak.unpatch(block)).__module__.startswith("timm.")


def test_nothing_but_classes_changes():
    model = vit(qk_norm=True, init_values=0.1)
    model.mark = "mine"
    handle = model.blocks[0].attn.register_forward_hook(lambda *_: None)
    before = dict(model.named_modules())
    classes = {name: type(module) for name, module in before.items()}
    fields = {name: dict(module.__dict__) for name, module in before.items()}
    parameters = {n: id(p) for n, p in model.state_dict(keep_vars=True).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    ak.patch(model)
    assert isinstance(model, VisionTransformer)
    assert all(isinstance(module, classes[n]) for n, module in model.named_modules())
    assert {n: id(p) for n, p in model.state_dict(keep_vars=True).items()} == parameters
    model.load_state_dict(vit(qk_norm=True, init_values=0.1).state_dict())
    weight = model.blocks[0].mlp.fc1.weight.detach().clone()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert (model.blocks[0].mlp.fc1.weight != weight).any()

    assert ak.unpatch(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    for name, module in model.named_modules():
        assert module is before[name] and module.__dict__ == fields[name]
    assert handle.id in model.blocks[0].attn._forward_hooks


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
        lambda model: _loaded(model),
    ],
    ids=["deepcopy", "pickle", "oldest pickle", "torch.save"],
)
def test_copies_are_patched(copied):
    model = ak.patch(vit())
    images = [torch.randn(size) for size in SEVERAL]
    other = copied(model)
    assert type(other) is type(model) and other.blocks[0].attn is not model.blocks[0].attn
    assert torch.equal(other(images), model(images))
    assert type(ak.unpatch(other)) is VisionTransformer


def _loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "options",
    [
        {"drop_path_rate": 0.5},
        {"proj_drop_rate": 0.3},
        {"attn_drop_rate": 0.3},
        {"drop_rate": 0.3, "pos_drop_rate": 0.2, "patch_drop_rate": 0.3},
    ],
    ids=lambda options: " ".join(options),
)
def test_training_draws_what_timm_draws(options):
    model, images = vit(**options).train(), torch.randn(4, 3, 32, 32)
    torch.manual_seed(3)
    expected = model(images)
    ak.patch(model)
    for given in (images, [*images]):
        torch.manual_seed(3)
        assert_close(model(given), expected, 1e-5)


def test_masks_are_timm_s():
    model, images = vit(), torch.randn(2, 3, 32, 32)
    mask = torch.rand(17, 17) > 0.3
    mask.fill_diagonal_(True)
    calls = {"attn_mask": mask}, {"is_causal": True}
    expected = [model(images, **call) for call in calls]
    ak.patch(model)
    for call, logits in zip(calls, expected, strict=True):
        assert_close(model(images, **call), logits, 1e-5)
        with refused("x", "a mask", "ragged"):
            model([*images], **call)
        with refused("x", "a mask", "ElasticBatch"):
            model.blocks[0](ak.ElasticBatch.from_padded(torch.randn(2, 17, 24)), **call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes(dtype, autocast):
    if autocast and dtype == torch.float64:
        pytest.skip("autocast makes lower precision")
    model, images = vit(qk_norm=True, init_values=0.1), torch.randn(2, 3, 32, 32)
    exact = copy.deepcopy(model).double()(images.double())
    if autocast:
        context = torch.autocast("cpu", dtype)
    else:
        context, model, images = contextlib.nullcontext(), model.to(dtype), images.to(dtype)
    with context:
        expected = model(images)
        ak.patch(model)
        for given in (images, [*images]):
            out = model(given)
            assert out.dtype == expected.dtype
            error = (out.double() - exact).abs().max()
            eps = torch.finfo(dtype).eps
            assert (
                error <= 2 * (expected.double() - exact).abs().max() + 4 * eps * exact.abs().max()
            )


@pytest.mark.parametrize("compiled", [torch.compile, "whole", "block"])
def test_compiling(compiled, fresh_compiler):
    model, images = vit(depth=1, init_values=0.1), torch.randn(2, 3, 32, 32)
    expected = model(images)
    run = model
    if compiled == "whole":  # compiled in place and run, and patched then
        model.compile(fullgraph=True, backend="aot_eager")
    elif compiled == "block":
        model.blocks[0].compile(fullgraph=True, backend="aot_eager")
    model(images)
    ak.patch(model)
    if compiled is torch.compile:
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
    with record() as ran:
        assert_close(run(images), expected, 1e-5)
    assert len([each for each in ran if each.op == "elastic_attention_qkvpacked"]) == 1
    if compiled is torch.compile:
        gradients(model, run(images))
    ak.unpatch(model)
    with record() as ran:
        assert_close(model(images), expected, 1e-5)
    assert not [*ran]


def test_an_export_takes_batches_of_any_size():
    model, images = ak.patch(vit(depth=1)), torch.randn(3, 3, 32, 32)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
    assert_close(program.module()(images), model(images), 1e-5)


def test_checkpointing():
    model, images = ak.patch(vit(drop_path_rate=0.2).train()), torch.randn(2, 3, 32, 32)
    for given in (images, [*images]):
        found = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            torch.manual_seed(5)
            found.append(gradients(model, model(given)))
        assert_same_gradients(*found)


def test_hooks_see_and_change_what_they_did():
    model, images, seen = vit(), torch.randn(2, 3, 32, 32), []
    block = model.blocks[0]
    block.attn.register_forward_hook(lambda m, given, out: seen.append((*out.shape, "attn")))
    block.mlp.act.register_forward_hook(lambda m, given, out: seen.append((*out.shape, "act")))
    block.norm2.register_forward_hook(lambda m, given, out: out * 2)
    block.mlp.fc2.register_forward_hook(lambda m, given, out: out + 1)
    model.blocks[1].mlp.register_forward_pre_hook(lambda m, given: (given[0] * 1.5,))
    model.blocks[1].attn.proj.register_forward_hook(lambda m, given, out: out + 0.1)
    model.blocks[1].register_forward_hook(lambda m, given, out: out * 1.1)
    expected, shapes = model(images), [*seen]
    seen.clear()
    ak.patch(model)
    assert_close(model(images), expected, 1e-5)
    assert seen == shapes


def test_attention_weights_are_shown_to_a_hook():
    model, images, seen = ak.patch(vit()), torch.randn(2, 3, 32, 32), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, given, out: seen.append(out))
    model(images)
    assert [tuple(each.shape) for each in seen] == [(2, 2, 17, 17)] * 2
    assert_close(seen[0].sum(-1), torch.ones(2, 2, 17), 1e-5)
    with refused("x", "hooks on attn_drop", "an ElasticBatch"):
        model([*images])


def test_a_factor_of_scores_that_was_changed_counts_where_timm_reads_it():
    model, images = vit(), torch.randn(2, 3, 32, 32)
    for block in model.blocks:
        block.attn.scale, block.attn.fused_attn = 0.9, False
    expected = model(images)
    ak.patch(model)
    assert_close(model(images), expected, 1e-5)
    assert_close(model([*images]), expected, 1e-5)


def test_replaced_modules_are_called():
    model, images = vit(), torch.randn(2, 3, 32, 32)
    ak.patch(model)
    block = model.blocks[0]
    block.mlp.fc1 = nn.Sequential(block.mlp.fc1, nn.ReLU())
    block.attn.qkv = nn.Sequential(block.attn.qkv, nn.Tanh())
    nn.utils.parametrizations.weight_norm(block.mlp.fc2)
    ours, several = model(images), model([*images])
    expected = ak.unpatch(model)(images)
    assert_close(ours, expected, 1e-5)
    assert_close(several, expected, 1e-5)
