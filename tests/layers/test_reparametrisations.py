"""Pruning, parametrisations, quantisation, sharding and LoRA: weights that are made of others."""

import pytest
import torch
from checks import assert_close
from drop_in_cases import DIM, HEADS, LINEAR, NORMS, batch, gradients, layer
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import adatape_kernels as ak
from adatape_kernels import ElasticBatch
from adatape_kernels.layers import ElasticAttention
from adatape_kernels.layers.torch_modules import is_plain


@pytest.mark.parametrize("path", LINEAR[:4])
def test_pruning_trains(path):
    """The pruned weight is made anew in each forward; what was pruned stays zero."""
    module, x = layer(), batch()
    linear = module.get_submodule(path)
    prune.l1_unstructured(linear, "weight", amount=0.5)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(3):
        before = linear.weight_orig.detach().clone()
        optimiser.zero_grad()
        module(x).data.square().mean().backward()
        optimiser.step()
        assert not torch.equal(linear.weight_orig, before)
        module(x)
        assert (linear.weight == 0).sum() >= linear.weight.numel() // 2


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias"])
@pytest.mark.parametrize("way", ["prune", "parametrize"])
def test_the_projections_of_attention_can_be_pruned_and_parametrised(name, way):
    module, x = layer(), batch()
    attention = module.self_attn
    if way == "prune":
        prune.random_unstructured(attention, name, amount=0.5)
        original = f"self_attn.{name}_orig"
    else:
        parametrize.register_parametrization(attention, name, nn.Softplus())
        original = f"self_attn.parametrizations.{name}.original"
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
    results = []
    for _ in range(3):
        optimiser.zero_grad()
        y = module(x).data
        y.square().mean().backward()
        assert module.get_parameter(original).grad.any()
        optimiser.step()
        results.append(y.detach())
    assert not torch.equal(results[0], results[1])
    value = getattr(module.self_attn, name).detach()
    plain = ElasticAttention(DIM, HEADS)
    plain.out_proj.load_state_dict(module.self_attn.out_proj.state_dict())
    for field in ("in_proj_weight", "in_proj_bias"):
        module(x)
        value = getattr(module.self_attn, field).detach()
        plain.register_parameter(field, nn.Parameter(value))
    assert_close(module.self_attn(x).data, plain(x).data.detach(), 1e-5)


@pytest.mark.parametrize(
    "parametrisation",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        pytest.param(
            nn.utils.weight_norm,
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
        ),
        nn.utils.spectral_norm,
    ],
    ids=lambda p: f"{p.__module__.rpartition('.')[2]}.{p.__name__}",
)
@pytest.mark.parametrize("path", LINEAR[:4])
def test_parametrisations_train(parametrisation, path):
    module, x = layer(), batch()
    linear = parametrisation(module.get_submodule(path))
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        module(x).data.square().mean().backward()
        optimiser.step()
    module.eval()
    y = module.feed_forward(x).data
    plain = layer().eval()
    for name in LINEAR[:4]:
        given = module.get_submodule(name)
        plain.get_submodule(name).weight.data.copy_(given.weight)
        plain.get_submodule(name).bias.data.copy_(given.bias)
    assert linear is module.get_submodule(path)
    assert_close(y, plain.feed_forward(x).data.detach(), 1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("tape_lens", [(2, 0, 3), (0, 0, 0)], ids=["tape", "no tape"])
def test_quantize_dynamic(tape_lens):
    if not torch.backends.quantized.supported_engines:
        pytest.skip("this torch has no quantised engine")
    module = layer().eval()
    x = ElasticBatch.from_padded(torch.randn(3, 6, DIM), tape_lens=torch.tensor(tape_lens))
    quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(quantised.linear1, nn.Linear)
    exact, y = module(x).data, quantised(x).data
    error = (y - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.05


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_linear_modules_can_be_sharded_one_by_one(tmp_path):
    from torch.distributed.fsdp import fully_shard

    module, x = layer(), batch()
    plain = gradients(module, x)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for path in (*LINEAR, *NORMS):
            fully_shard(module.get_submodule(path), mesh=mesh)
        assert not is_plain(module.linear1, nn.Linear)
        for a, e in zip(gradients(module, x), plain, strict=True):
            assert_close(a, e, 1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_lora_on_a_model():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = ak.models.adatape_vit("Ti/4", image_size=8, depth=2, num_classes=5)
    nn.init.normal_(model.head.weight, std=0.1)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = model(images).logits.detach()
    config = peft.LoraConfig(r=4, target_modules=["linear1", "linear2", "out_proj"])
    adapted = peft.get_peft_model(model, config)
    assert_close(adapted(images).logits, plain, 1e-5)  # an adapter starts as the identity
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * 2 and all("lora_" in name for name in trained)
    optimiser = torch.optim.AdamW(trained.values(), lr=0.02)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = model.loss(adapted(images), labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad.any() for p in trained.values())
    adapted.eval()
    tuned = adapted(images).logits.detach()
    assert not torch.allclose(tuned, plain, atol=1e-2)
    assert_close(model.padded()(images).logits, tuned, 1e-4)
    merged = adapted.merge_and_unload()
    assert type(merged.encoder.layers[0].linear1) is nn.Linear
    assert_close(merged(images).logits, tuned, 1e-4)
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, before[n])}
    linear = ("linear1.weight", "linear2.weight", "out_proj.weight")
    assert changed and all(name.endswith(linear) for name in changed)
