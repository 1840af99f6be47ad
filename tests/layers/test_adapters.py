"""Submodules that are not plain: adapters, hooks and whatever else does more than its class."""

import timeit

import pytest
import torch
from checks import assert_close
from drop_in_cases import DIM, HEADS, HIDDEN, LINEAR, NORMS, TAPE_HIDDEN, batch, gradients, layer
from torch import nn
from torch.nn.utils import parametrize, prune

import adatape_kernels as ak
from adatape_kernels.layers import DualFFN, ElasticEncoderLayer
from adatape_kernels.layers.torch_modules import is_plain
from adatape_kernels.ops.op import record

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


@pytest.mark.parametrize(
    ("path", "calls"),
    [
        ("encoder.norm", 1),
        ("encoder.readers.0.bank_norm", 2),  # the bank, and the query
        ("encoder.readers.0.tape_mlp.0", 1),
        ("encoder.readers.0.tape_mlp.2", 1),
        ("pre_bank", 1),
        ("head", 1),
    ],
)
def test_other_parts_of_a_model_are_called(path, calls):
    options = dict(image_size=8, depth=1, num_classes=5, tape_mlp_dim=8)
    model = ak.models.adatape_vit("Ti/4", **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, 3, 8, 8)
    plain = model(images).logits
    replace(model, path, Seen)
    assert_close(model(images).logits, plain.detach(), 1e-5)
    assert len(model.get_submodule(path).rows) == calls


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
