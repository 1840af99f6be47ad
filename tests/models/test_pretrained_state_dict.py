"""A ViT given as tensors by timm's names, beside the same ViT written out in plain torch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, refused
from torch import nn

import adatape_kernels as ak
from adatape_kernels.models import from_timm, from_torchvision

OP = ("elastic_attention_qkvpacked", "dual_ffn", "add_layer_norm")
DIM, DEPTH, HEADS, HIDDEN, CLASSES, PATCH, IMAGE = 24, 3, 4, 40, 7, 4, 16
UNREAD = ({"halt_threshold": 0.0}, {"num_tape_tokens": 0}, {"read_layers": ()})
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
FORMS = {
    "class token": {},
    "LayerScale": {"scale": True},
    "registers": {"registers": 3},
    "positions of patches alone": {"embed_prefix": False, "registers": 2},
    "no positions": {"positions": False},
    "no biases": {"biases": False},
    "norm before the blocks": {"pre_norm": True, "biases": False, "scale": True},
    "mean": {"cls": False, "pooling": "mean"},
    "mean, then norm": {"cls": False, "pooling": "mean", "fc_norm": True},
    "mean beside a class token": {"pooling": "mean", "fc_norm": True, "registers": 2},
    "mean beside a class token without positions": {"pooling": "mean", "embed_prefix": False},
    "max beside a class token": {"pooling": "max", "fc_norm": True},
    "class token, then norm": {"fc_norm": True},
}


def vit(
    *,
    cls=True,
    registers=0,
    scale=False,
    biases=True,
    fc_norm=False,
    pre_norm=False,
    positions=True,
    embed_prefix=True,
    pooling="token",
):
    """Return a state dict in timm's names, with values that are not small."""
    prefix, patches = cls + registers, (IMAGE // PATCH) ** 2
    linears = {"head": (CLASSES, DIM), "patch_embed.proj": (DIM, 3, PATCH, PATCH)}
    norms, scales = ["fc_norm" if fc_norm else "norm"] + ["norm_pre"] * pre_norm, []
    for i in range(DEPTH):
        for name, shape in (
            ("attn.qkv", (3 * DIM, DIM)),
            ("attn.proj", (DIM, DIM)),
            ("mlp.fc1", (HIDDEN, DIM)),
            ("mlp.fc2", (DIM, HIDDEN)),
        ):
            linears[f"blocks.{i}.{name}"] = shape
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
        scales += [f"blocks.{i}.ls1.gamma", f"blocks.{i}.ls2.gamma"]
    state = {f"{name}.weight": 0.3 * torch.randn(shape) for name, shape in linears.items()}
    if biases:
        state |= {f"{name}.bias": 0.3 * torch.randn(shape[0]) for name, shape in linears.items()}
    for name in norms:
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(DIM)
        state[f"{name}.bias"] = 0.3 * torch.randn(DIM)
    state |= {name: 0.3 * torch.randn(DIM) for name in scales if scale}
    if cls:
        state["cls_token"] = torch.randn(1, 1, DIM)
    if registers:
        state["reg_token"] = torch.randn(1, registers, DIM)
    if positions:
        state["pos_embed"] = torch.randn(1, patches + prefix * embed_prefix, DIM)
    return state


def computed(state, images, *, pooling="token", act=F.gelu, eps=1e-6):
    """The logits of a state dict of `vit`, one step after another."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    weight, bias = state["patch_embed.proj.weight"], state.get("patch_embed.proj.bias")
    x = F.conv2d(images, weight, bias, stride=PATCH).flatten(2).mT
    first = [state[n].expand(len(x), -1, -1) for n in ("cls_token", "reg_token") if n in state]
    prefix = sum(part.shape[1] for part in first)
    position = state.get("pos_embed", torch.zeros(1, 1, 1))
    if position.shape[1] == x.shape[1]:
        x = torch.cat([*first, x + position], 1)
    else:
        x = torch.cat([*first, x], 1) + position
    if "norm_pre.weight" in state:
        x = norm(x, "norm_pre")
    for i in range(DEPTH):
        block = f"blocks.{i}."
        q, k, v = linear(norm(x, f"{block}norm1"), f"{block}attn.qkv").chunk(3, 2)
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        attended = torch.softmax(q @ k.mT / (DIM // HEADS) ** 0.5, -1) @ v
        y = linear(attended.transpose(1, 2).flatten(2), f"{block}attn.proj")
        x = x + y * state.get(f"{block}ls1.gamma", 1)
        y = linear(act(linear(norm(x, f"{block}norm2"), f"{block}mlp.fc1")), f"{block}mlp.fc2")
        x = x + y * state.get(f"{block}ls2.gamma", 1)
    if "norm.weight" in state:
        x = norm(x, "norm")
    seen = x[:, prefix:]
    x = {"token": x[:, 0], "mean": seen.mean(1), "max": seen.amax(1)}[pooling]
    return linear(norm(x, "fc_norm") if "fc_norm.weight" in state else x, "head")


def assert_equal_logits(model, expected, images):
    for each in (model, model.padded()):
        assert_close(each(images).logits, expected, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_while_nothing_is_read_the_logits_are_the_source_s(form):
    given = FORMS[form]
    state, pooling = vit(**given), given.get("pooling", "token")
    images = torch.randn(5, 3, IMAGE, IMAGE)
    expected = computed(state, images, pooling=pooling)
    for options in UNREAD:
        model = from_timm(state, num_heads=HEADS, pooling=pooling, image_size=IMAGE, **options)
        assert_equal_logits(model, expected, images)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_epsilon_are_options(device, activation):
    state = {name: tensor.to(device) for name, tensor in vit(scale=True).items()}
    images = 0.1 * torch.randn(2, 3, IMAGE, IMAGE, device=device)
    expected = computed(state, images, act=ACTIVATIONS[activation], eps=0.3)
    options = {"num_heads": HEADS, "activation": activation, "norm_eps": 0.3, "read_layers": ()}
    logits = from_timm(state, **options)(images).logits
    assert_close(logits, expected, 1e-5)
    assert not torch.allclose(logits, computed(state, images), atol=1e-3)


def test_sizes_come_from_the_tensors_and_choices_from_the_options():
    config = from_timm(vit(registers=2), num_heads=HEADS, bank="learn", bank_size=30, topk=3).config
    expected = {
        "num_classes": CLASSES,
        "dim": DIM,
        "depth": DEPTH,
        "num_heads": HEADS,
        "ffn_dim": HIDDEN,
        "tape_ffn_dim": DIM,
        "image_size": IMAGE,
        "patch_size": PATCH,
        "bank_patch_size": PATCH // 2,
        "in_channels": 3,
        "activation": "gelu",
        "norm_eps": 1e-6,
        "num_registers": 2,
        "pooling": "token",
        "query": "token",
        "bank": "learn",
        "topk": 3,
    }
    assert dataclasses.asdict(config).items() >= expected.items()
    assert from_timm(vit(cls=False), num_heads=HEADS).config.query == "gap"


def test_a_converted_model_is_saved_and_loaded(tmp_path):
    options = FORMS["mean beside a class token"]
    model = from_timm(vit(**options), num_heads=HEADS, norm_eps=1e-3, topk=3, image_size=IMAGE)
    images = torch.randn(2, 3, IMAGE, IMAGE)
    ak.save(model, tmp_path)
    loaded = ak.load(tmp_path)
    assert loaded.config == model.config and loaded.config.norm_eps == 1e-3
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert model(images).tape_lens.min() > 0


def test_the_mean_without_registers_is_as_exact_as_the_dtype():
    state = {name: t.double() for name, t in vit(registers=3, pooling="mean").items()}
    model = from_timm(state, num_heads=HEADS, pooling="mean", topk=2)
    images = torch.randn(4, 3, IMAGE, IMAGE, dtype=torch.float64)
    assert_close(model(images).logits, model.padded()(images).logits, 1e-13)


@pytest.mark.parametrize("pooling", ["mean", "max", "token"])
@pytest.mark.parametrize("capacity", [None, 60])
def test_the_head_sees_the_tape_and_no_register(pooling, capacity):
    model = from_timm(vit(pooling=pooling, registers=2), num_heads=HEADS, pooling=pooling, topk=2)
    assert model.config.num_registers == 2 + (pooling != "token")
    images = torch.randn(4, 3, IMAGE, IMAGE)
    output, padded = model(images, capacity=capacity), model.padded()(images)
    assert output.tape_lens.min() > 0
    assert_close(output.logits, padded.logits, 1e-5)
    gradients = []
    for logits in (output.logits, padded.logits):
        gradients.append(torch.autograd.grad(logits.square().sum(), model.registers)[0])
    assert_close(*gradients, 1e-4)


def test_new_parameters_are_decided_by_the_seed():
    state, made = vit(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(from_timm(state, num_heads=HEADS).state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not torch.equal(made[0]["bank_embed.weight"], made[2]["bank_embed.weight"])
    assert torch.equal(made[0]["position"], made[2]["position"])


def test_parameters_are_copies_that_train_except_biases_that_are_not_there():
    state = vit(biases=False)
    model = from_timm(state, num_heads=HEADS)
    addresses = {tensor.data_ptr() for tensor in state.values()}
    assert not addresses & {p.data_ptr() for p in model.parameters()}
    assert not any(tensor.requires_grad for tensor in state.values())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"head.bias", "patch_embed.bias"} | {
        f"encoder.layers.{i}.{name}"
        for i in range(DEPTH)
        for name in ("linear1.bias", "linear2.bias", "self_attn.in_proj_bias")
    } | {f"encoder.layers.{i}.self_attn.out_proj.bias" for i in range(DEPTH)}
    labels, images = torch.tensor([0, 1]), torch.randn(2, 3, IMAGE, IMAGE)
    model.loss(model(images), labels).backward()
    assert model.bank_embed.weight.grad is not None and model.patch_embed.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_is_the_source_s(dtype):
    state = {name: tensor.to(dtype) for name, tensor in vit(scale=True).items()}
    model = from_timm(state, num_heads=HEADS, halt_threshold=0)
    assert {p.dtype for p in model.parameters()} == {dtype} and not model.training
    if dtype == torch.float64:
        images = torch.randn(2, 3, IMAGE, IMAGE, dtype=dtype)
        assert_close(model(images).logits, computed(state, images), 1e-12)


def test_a_new_head():
    state = vit()
    with refused("num_classes", "7", "new_head=True"):
        from_timm(state, num_heads=HEADS, num_classes=10)
    model = from_timm(state, num_heads=HEADS, num_classes=10, new_head=True)
    assert model.head.weight.shape == (10, DIM) and model.head.weight.count_nonzero() == 0
    assert model.head.weight.requires_grad and model.head.bias.requires_grad
    bare = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    with refused("num_classes", "no head"):
        from_timm(bare, num_heads=HEADS)
    assert from_timm(bare, num_heads=HEADS, num_classes=2).head.weight.shape == (2, DIM)


def changed(changes):
    state = vit() | changes
    return {name: tensor for name, tensor in state.items() if tensor is not None}


STRANGE = {
    "norms of queries": (
        {f"blocks.{i}.attn.q_norm.weight": torch.ones(6) for i in range(DEPTH)},
        ("blocks.*.attn.q_norm.weight none / (6,)",),
    ),
    "one block alone": (
        {"blocks.1.attn.q_norm.weight": torch.ones(6)},
        ("blocks.1.attn.q_norm.weight none / (6,)",),
    ),
    "distillation": (
        {"dist_token": torch.ones(1, 1, DIM), "head_dist.weight": torch.ones(CLASSES, DIM)},
        ("dist_token none / (1, 1, 24)", "head_dist.weight none / (7, 24)"),
    ),
    "RMSNorm": (
        {f"blocks.{i}.norm{n}.bias": None for i in range(DEPTH) for n in (1, 2)},
        ("blocks.*.norm1.bias (24,) / none", "blocks.*.norm2.bias (24,) / none"),
    ),
    "SwiGLU": (
        {f"blocks.{i}.mlp.fc2.weight": torch.ones(DIM, HIDDEN // 2) for i in range(DEPTH)},
        ("blocks.*.mlp.fc2.weight (24, 40) / (24, 20)",),
    ),
    "no norm": ({"norm.weight": None, "norm.bias": None}, ("norm.weight (24,) / none",)),
    "two norms": (
        {"fc_norm.weight": torch.ones(DIM), "fc_norm.bias": torch.ones(DIM)},
        ("norm.weight none / (24,)",),
    ),
    "a block is missing": (
        {name: None for name in vit() if name.startswith("blocks.1.")},
        ("blocks.1.norm1.weight (24,) / none", "more"),
    ),
    "oblong patches": (
        {"patch_embed.proj.weight": torch.ones(DIM, 3, 4, 2)},
        ("patch_embed.proj.weight (24, 3, 4, 4) / (24, 3, 4, 2)",),
    ),
    "two dtypes": ({"cls_token": torch.ones(1, 1, DIM).half()}, ("float16, torch.float32",)),
    "odd positions": ({"pos_embed": torch.ones(1, 23, DIM)}, ("23",)),
    "flat positions": ({"pos_embed": torch.ones(DIM)}, ("pos_embed (1, 1, 24) / (24,)",)),
    "another architecture": (
        {name: None for name in vit()} | {"conv1.weight": torch.ones(4, 3, 7, 7)},
        ("patch_embed.proj.weight", "conv1.weight (4, 3, 7, 7)"),
    ),
    "nothing": ({name: None for name in vit()}, ("none",)),
    "a number for a name": ({3: torch.ones(1)}, ("3 for a name",)),
    "two devices": ({"cls_token": torch.ones(1, 1, DIM, device="meta")}, ("cpu, meta",)),
    "a wrapped state dict": ({"state_dict": {}}, ("'state_dict' of dict",)),
    "integers": ({"cls_token": torch.ones(1, 1, DIM, dtype=torch.int64)}, ("int64",)),
}


@pytest.mark.parametrize("case", STRANGE)
def test_tensors_of_something_else_are_refused_in_one_line(case):
    changes, parts = STRANGE[case]
    name = "pos_embed" if case == "odd positions" else "model"
    with refused(name, *parts):
        from_timm(changed(changes), num_heads=HEADS)


@pytest.mark.parametrize(
    ("options", "name", "parts"),
    [
        ({}, "num_heads", ("as a state dict does not tell it",)),
        ({"num_heads": 5}, "num_heads", ("divisor",)),
        ({"num_heads": HEADS, "dim": 30}, "dim", ("24", "as in the source", "30")),
        ({"num_heads": HEADS, "depth": True}, "depth", ("3", "True")),
        ({"num_heads": HEADS, "image_size": 32}, "pos_embed", ("64 or 65", "17")),
        ({"num_heads": HEADS, "image_size": "16"}, "image_size", ("'16'",)),
        ({"num_heads": HEADS, "pre_norm": True}, "pre_norm", ("False",)),
        ({"num_heads": HEADS, "num_registers": 1}, "num_registers", ("0",)),
        ({"num_heads": HEADS, "heads": 3}, "options", ("heads",)),
        ({"num_heads": HEADS, "pooling": "median"}, "pooling", ("median",)),
    ],
)
def test_wrong_options_are_refused_by_name(options, name, parts):
    with refused(name, *parts):
        from_timm(vit(), **options)


def test_pooling_wants_a_class_token():
    with refused("pooling", "'mean'"):
        from_timm(vit(cls=False), num_heads=HEADS, pooling="token")
    with refused("image_size", "no positions"):
        from_timm(vit(positions=False), num_heads=HEADS)


@pytest.mark.parametrize("convert", [from_timm, from_torchvision])
def test_other_objects_are_refused(convert):
    with refused("model", "state dict", error=TypeError):
        convert("vit_base_patch16_224", num_heads=HEADS)
    with refused("model", "the class torch.nn.modules.linear.Linear"):
        convert(nn.Linear(3, 3))


def test_options_that_cannot_be_compared_are_refused_too():
    with refused("image_size"):
        from_timm(vit(), num_heads=HEADS, image_size=torch.ones(2))
    with refused("dim"):
        from_timm(vit(), num_heads=HEADS, dim=torch.ones(2))


def test_torchvision_s_names_are_sent_to_its_own_function():
    with refused("model", "names of timm", "torchvision's, which ak.models.from_torchvision takes"):
        from_timm({"conv_proj.weight": torch.zeros(8, 3, 4, 4)}, num_heads=HEADS)
