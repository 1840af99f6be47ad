"""Submodules that are not plain: adapters, pruning, parametrisations, quantisation and hooks."""

import timeit

import pytest
import torch
from checks import assert_close
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

import adatape_kernels as ak
from adatape_kernels import ElasticBatch
from adatape_kernels.layers import DualFFN, ElasticAttention, ElasticEncoderLayer
from adatape_kernels.layers.torch_modules import is_plain
from adatape_kernels.ops.op import record

DIM, HEADS, HIDDEN, TAPE_HIDDEN = 24, 3, 40, 16
LINEAR = ["linear1", "linear2", "tape_linear1", "tape_linear2", "self_attn.out_proj"]
NORMS = ["norm1", "norm2"]
INPUTS, TAPES = 9, 5


class Seen(nn.Module):
    """Stands in a module's place, does what that does, and notes the rows that it is given."""

    def __init__(self, inside):
        super().__init__()
        self.inside, self.rows = inside, []

    def forward(self, x):
        self.rows.append(len(x))
        return self.inside(x)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class OwnNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x)


def layer(**options):
    made = ElasticEncoderLayer(DIM, HEADS, HIDDEN, TAPE_HIDDEN, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def batch(**like):
    x = torch.randn(3, 6, DIM, **like)
    mask = torch.arange(6) < torch.tensor([6, 3, 5]).unsqueeze(1)
    return ElasticBatch.from_padded(x, mask, tape_lens=torch.tensor([2, 0, 3]))


def replace(module, path, change):
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, change(module.get_submodule(path)))


def own_class(module):
    """An instance of a subclass that has a forward of its own, on the same parameters."""
    if isinstance(module, nn.Linear):
        own = OwnLinear(module.in_features, module.out_features)
    else:
        own = OwnNorm(module.normalized_shape, module.eps)
    own.load_state_dict(module.state_dict())
    return own


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def pre_hooked(module):
    module.register_forward_pre_hook(lambda *_: None)
    return module


def backward_hooked(module):
    module.register_full_backward_hook(lambda *_: None)
    return module


def backward_pre_hooked(module):
    module.register_full_backward_pre_hook(lambda *_: None)
    return module


def parametrised(module):
    parametrize.register_parametrization(module, "weight", nn.Identity())
    return module


def pruned(module):
    return prune.identity(module, "weight")


def patched(module):
    forward = module.forward
    module.forward = lambda x: forward(x)
    return module


def without_weight(module):
    """An attribute that is computed elsewhere, as some sharding leaves it."""
    weight = module.weight.detach()
    del module.weight
    module.weight = weight
    return module


IDENTITIES = [
    Seen,
    own_class,
    hooked,
    pre_hooked,
    backward_hooked,
    backward_pre_hooked,
    parametrised,
    pruned,
    patched,
    without_weight,
]


def gradients(module, x):
    data = x.data.detach().requires_grad_()
    y = module(x.with_data(data)).data
    (dx,) = torch.autograd.grad(y, data, torch.linspace(-1, 1, y.numel()).view_as(y))
    return y.detach(), dx


@pytest.mark.parametrize("path", [*LINEAR, *NORMS])
@pytest.mark.parametrize("change", IDENTITIES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_a_change_that_changes_nothing_changes_nothing(path, change, norm_first):
    module, x = layer(norm_first=norm_first), batch()
    plain = gradients(module, x)
    replace(module, path, change)
    for a, e in zip(gradients(module, x), plain, strict=True):
        assert_close(a, e, 1e-5)


@pytest.mark.parametrize("path", [*LINEAR, *NORMS])
@pytest.mark.parametrize("change", IDENTITIES, ids=lambda change: change.__name__)
def test_what_does_more_is_not_plain(path, change):
    module = layer()
    kind = nn.LayerNorm if path in NORMS else nn.Linear
    assert is_plain(module.get_submodule(path), kind)
    replace(module, path, change)
    assert not is_plain(module.get_submodule(path), kind)


@pytest.mark.parametrize("path", [*LINEAR, *NORMS])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_adapter_is_called_on_its_rows_and_changes_the_result(path, training):
    module, x = layer(dropout=0.1).train(training), batch()
    replace(module, path, Seen)
    seen = module.get_submodule(path)
    module(x)
    rows = {"linear": x.num_input_rows, "tape_l": len(x.data) - x.num_input_rows}
    assert (x.num_input_rows, len(x.data)) == (INPUTS, INPUTS + TAPES)
    assert seen.rows == [rows.get(path[:6], INPUTS + TAPES)]
    module.eval()
    before = module(x).data
    seen.inside.weight.data.mul_(2)
    assert not torch.allclose(module(x).data, before)


def test_hooks_see_and_change_what_passes():
    module, x, seen = layer(), batch(), []
    plain = module(x).data
    handles = [
        module.linear1.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]))),
        module.tape_linear2.register_forward_hook(lambda _, args, out: 2 * out),
        module.linear2.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    y = module(x).data
    assert not torch.allclose(y, plain)
    y.sum().backward()
    assert seen == [INPUTS, "backward"]
    for handle in handles:
        handle.remove()
    with record() as ran:
        assert torch.equal(module(x).data, plain)
    assert "dual_ffn" in {each.op for each in ran}


def test_without_a_tape_feed_forward_every_row_passes_the_input_one():
    module = ElasticEncoderLayer(DIM, HEADS, HIDDEN)
    module.linear1 = Seen(module.linear1)
    module(batch())
    assert module.linear1.rows == [INPUTS + TAPES]


def test_in_capacity_mode_unused_rows_come_as_zeros_and_stay_zero():
    module, x = layer(), batch()
    tape, offsets = torch.full((9, DIM), torch.nan), torch.tensor([0, 1, 1, 3], dtype=torch.int32)
    tape[:3] = 1
    roomy = x.append_tape(tape, offsets, max_tapes=2, exact=False)
    used = len(x.data) + 3
    plain = module.feed_forward(roomy).data
    given = []
    module.tape_linear1.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    y = module.feed_forward(roomy).data
    assert_close(y, plain.detach(), 1e-5)
    assert y[:used].isfinite().all() and not y[used:].any()
    assert not given[0][used - INPUTS :].any()


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


def test_a_module_that_was_compiled_by_itself_is_called(fresh_compiler):
    module, x = layer(), batch()
    plain = module(x).data.detach()
    module.linear1.compile(backend="eager")
    module.norm2.compile(backend="eager")
    assert not is_plain(module.linear1, nn.Linear) and not is_plain(module.norm2, nn.LayerNorm)
    assert_close(module(x).data, plain, 1e-5)


def test_a_weight_that_wraps_other_tensors_is_not_taken():
    class Wrapper(torch.Tensor):
        def __tensor_flatten__(self):
            return [], None

    linear = nn.Linear(3, 3)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Wrapper))
    assert not is_plain(linear, nn.Linear)


def test_missing_biases_stay_on_the_kernels():
    module, x = layer(), batch()
    zero = layer()
    zero.load_state_dict(module.state_dict())
    for path in (*LINEAR, *NORMS):
        module.get_submodule(path).bias = None
        zero.get_submodule(path).bias.data.zero_()
    with record() as ran:
        y = module(x).data
    assert {"dual_ffn", "add_layer_norm"} <= {each.op for each in ran}
    assert_close(y, zero(x).data.detach(), 1e-6)


def test_the_padded_model_calls_them_too():
    model = ak.models.adatape_vit("Ti/4", image_size=8, depth=2, num_classes=5)
    nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 8, 8)
    for encoder_layer in model.encoder.layers:
        encoder_layer.linear1.register_forward_hook(lambda _, args, out: 2 * out)
        encoder_layer.tape_linear2 = Seen(encoder_layer.tape_linear2)
        encoder_layer.norm2.register_forward_pre_hook(lambda _, args: (3 * args[0],))
    elastic, padded = model(images), model.padded()(images)
    assert all(len(each.tape_linear2.rows) == 2 for each in model.encoder.layers)
    assert_close(elastic.logits, padded.logits.detach(), 1e-4)


def test_compiled_layers_still_call_adapters(fresh_compiler):
    module, x = layer(), batch()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    plain = module(x).data.detach()
    assert_close(compiled(x).data, plain, 1e-5)
    module.linear1 = nn.Sequential(module.linear1, nn.Linear(HIDDEN, HIDDEN))
    y = compiled(x).data
    assert not torch.allclose(y, plain)
    assert_close(y, module(x).data.detach(), 1e-5)


def test_the_check_is_cheap():
    module = DualFFN(DIM, HIDDEN, TAPE_HIDDEN)
    linear = [module.get_submodule(path) for path in LINEAR[:4]]
    norm = nn.LayerNorm(DIM)

    def check():
        return all(is_plain(m, nn.Linear) for m in linear) and is_plain(norm, nn.LayerNorm)

    assert min(timeit.repeat(check, number=1000, repeat=20)) / 1000 < 20e-6
    assert check()


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
