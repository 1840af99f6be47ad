"""Full backward hooks on modules that take and return batches: adatape_kernels/layers."""

import collections
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import adatape_kernels as ak
from adatape_kernels import ElasticBatch
from adatape_kernels.layers.elastic_module import _CALLS

DIM = 8


def batch(requires_grad=True):
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    made = ElasticBatch.from_padded(torch.randn(3, 4, DIM), mask, torch.tensor([1, 0, 0]))
    return made.requires_grad_(requires_grad)


def reader(**options):
    made = ak.layers.TapeReader(DIM, num_tape_tokens=2, topk=2, halt_threshold=9.0, **options)
    return made.double().float()


def encoder():
    layers = [ak.layers.ElasticEncoderLayer(DIM, 2, 16, 4) for _ in range(2)]
    return ak.layers.ElasticEncoder(layers, DIM, {0: reader(), 1: reader(bank_size=9)})


def vit():
    sizes = {"dim": DIM, "num_heads": 2, "ffn_dim": 16, "num_tape_tokens": 2, "topk": 2}
    model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=5, **sizes)
    nn.init.normal_(model.head.weight)
    return model


def parity():
    sizes = {"dim": DIM, "depth": 1, "num_heads": 2, "ffn_dim": 16, "topk": 2, "seq_len": 6}
    model = ak.models.AdaTapeParity(ak.models.AdaTapeParityConfig(num_classes=2, **sizes))
    nn.init.normal_(model.head.weight)
    return model


def images(*shape):
    return (torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_(),)


def plain():
    torch.manual_seed(1)
    return (torch.randn(2, 3, DIM, requires_grad=True),)


def padded():
    return ((plain()[0], torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()),)


def jagged():
    parts = [torch.ones(2, DIM), torch.randn(3, DIM)]
    return (torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True),)


def bank():
    torch.manual_seed(2)
    return torch.randn(3, 9, DIM, requires_grad=True)


ATTENTION = (lambda: ak.layers.ElasticAttention(DIM, 2), 1)
LAYER = (lambda: ak.layers.ElasticEncoderLayer(DIM, 2, 16, 4), 1)
CASES = {  # the module, how many tensors of floating point it returns, and its arguments
    "attention": (*ATTENTION, lambda: (batch(),)),
    "feed-forward": (lambda: ak.layers.DualFFN(DIM, 16, 4), 1, lambda: (batch(),)),
    "layer": (*LAYER, lambda: (batch(),)),
    "layer, plain": (*LAYER, plain),
    "layer, padded": (*LAYER, padded),
    "layer, jagged": (*LAYER, jagged),
    "reader": (reader, 3, lambda: (batch(), bank())),
    "encoder": (encoder, 5, lambda: (batch(), bank())),
    "ViT": (vit, 4, lambda: images(2, 3, 8, 8)),
    "padded ViT": (lambda: vit().padded(), 4, lambda: images(2, 3, 8, 8)),
    "parity": (parity, 4, lambda: images(3, 6, 3)),
}


def tensors(value):
    """The tensors of floating point in a value, found by torch's own pytrees."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


def objective(result):
    """A number that every result weighs in, so that no gradient is zero or missing."""
    weights = torch.Generator().manual_seed(3)
    flat = [x.values() if x.is_nested else x for x in tensors(result)]
    return sum((x * torch.randn(x.shape, generator=weights)).sum() for x in flat)


def seeded(make):
    torch.manual_seed(0)
    return make()


def same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        a, e = (x.values() if x.is_nested else x for x in (a, e))
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_hooks_see_the_gradients_of_inputs_and_outputs(case):
    make, results, arguments = CASES[case]
    module, args, seen = seeded(make), arguments(), {}
    module.register_full_backward_pre_hook(lambda m, grad: seen.update(pre=grad))
    module.register_full_backward_hook(lambda m, gi, go: seen.update(inputs=gi, outputs=go))
    objective(module(*args)).backward()

    module, args = seeded(make), arguments()
    result = module(*args)
    # A result that another one was made of counts as what it is outside of the module.
    outside = [x.detach().requires_grad_() for x in tensors(result)]
    assert len(outside) == results
    wanted = torch.autograd.grad(objective(outside), outside)
    same(seen["outputs"], wanted)
    same(seen["pre"], wanted)
    same(seen["inputs"], torch.autograd.grad(objective(result), tensors(args)))


@pytest.mark.parametrize("case", CASES)
def test_gradients_that_hooks_return_go_on(case):
    make, _, arguments = CASES[case]
    args = tensors(arguments())
    gradients = []
    for factor, change in ((1, None), (3, None), (1, 0)):
        module, args = seeded(make), arguments()
        if factor != 1:
            module.register_full_backward_pre_hook(lambda m, grad: tuple(3 * g for g in grad))
        if change is not None:
            module.register_full_backward_hook(lambda m, gi, go: tuple(0 * g for g in gi))
        objective(module(*args)).backward()
        inputs = [x.grad for x in tensors(args)]
        weight = next(p.grad for p in module.parameters() if p.grad is not None)
        gradients.append(([i.values() if i.is_nested else i for i in inputs], weight))
    (plain_inputs, plain_weight), (tripled, tripled_weight), (none, weight) = gradients
    same(tripled, [3 * x for x in plain_inputs])
    same([tripled_weight, weight], [3 * plain_weight, plain_weight])
    assert any(x.any() for x in plain_inputs) and not any(x.any() for x in none)


def test_forward_hooks_see_and_replace_batches():
    module, seen = encoder(), []
    module.layers[0].register_forward_pre_hook(lambda m, args: seen.append(type(args[0])))
    module.layers[0].register_forward_hook(lambda m, args, out: out.with_data(0 * out.data))
    module.register_forward_hook(lambda m, args, kwargs, out: seen.append(out), with_kwargs=True)
    (y, reads), given = module(batch(), bank()), seen[1]
    assert seen[0] is ElasticBatch and given[0] is y and given[1] is reads
    other = module(batch().with_data(torch.zeros_like(batch().data)), bank())[0]
    assert other.data.shape == y.data.shape


def test_a_backward_hook_sees_what_forward_hooks_made():
    module, seen = ak.layers.DualFFN(DIM, 16), []
    module.register_forward_pre_hook(lambda m, args: args[0].with_data(2 * args[0].data))
    module.register_full_backward_hook(lambda m, gi, go: seen.extend((*gi, *go)))
    module.register_forward_hook(lambda m, args, out: out.with_data(out.data.clone()))
    x = batch()
    objective(module(x)).backward()
    torch.testing.assert_close(2 * seen[0], x.data.grad)
    assert seen[1].shape == x.data.shape


def test_the_order_of_hooks_and_their_removal():
    module, order = ak.layers.ElasticAttention(DIM, 2), []
    last = module.register_full_backward_hook(lambda *_: order.append("last"))
    module.register_full_backward_hook(lambda *_: order.append("first"), prepend=True)
    pre = module.register_full_backward_pre_hook(lambda *_: order.append("before"))
    for expected in (["before", "first", "last"], ["before", "first"], ["first"]):
        order.clear()
        objective(module(batch())).backward()
        assert order == expected
        (last if "last" in expected else pre).remove()
    again = copy.deepcopy(module)
    order.clear()
    objective(again(batch())).backward()
    assert order == ["first"]
    module.eval()
    with torch.no_grad():
        assert not module(batch()).data.requires_grad


def print_gradients(module, grad_input, grad_output):
    """A hook that pickle finds by its name."""


def test_a_module_with_hooks_is_pickled():
    module = ak.layers.DualFFN(DIM, 16)
    module.register_full_backward_hook(print_gradients)
    again = pickle.loads(pickle.dumps(module))
    objective(again(batch())).backward()
    assert again.linear1.weight.grad is not None


def test_a_call_that_fails_leaves_nothing_behind():
    module = encoder()
    for each in module.modules():
        if isinstance(each, ak.layers.ElasticModule):
            each.register_full_backward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="bank"):
        module(batch())
    assert not _CALLS.begun
    module(batch(), bank())
    assert not _CALLS.begun


def test_inputs_without_gradients_and_integers_are_skipped():
    module, seen = seeded(vit), []
    module.register_full_backward_hook(lambda m, gi, go: seen.append((gi, go)))
    with pytest.warns(UserWarning, match="no inputs require gradients"):
        module(images(2, 3, 8, 8)[0].detach()).logits.sum().backward()
    ((inputs, outputs),) = seen
    assert inputs == (None,) and torch.equal(outputs[0], torch.ones(2, 5))
    assert outputs[1:] == (None, None, None)


@pytest.mark.parametrize("options", [{}, {"debug": True}], ids=["checkpoint", "checkpoint, debug"])
def test_hooks_in_a_checkpoint(options):
    module, seen = seeded(LAYER[0]), []
    module.register_full_backward_hook(lambda m, gi, go: seen.append((gi, go)))
    x = batch()
    objective(checkpoint(module, x, use_reentrant=False, **options)).backward()
    ((inputs, _),) = seen
    torch.testing.assert_close(inputs[0], x.data.grad)
    assert not _CALLS.begun  # a checkpoint ends its second pass by an exception


def test_a_module_of_a_user_has_such_hooks():
    class Halved(ak.layers.ElasticModule):
        def forward(self, given, *, factor):
            rows = given["rows"].with_data(factor * given["rows"].data)
            return collections.OrderedDict(rows=[rows], name="half")

    module, seen, x = Halved(), [], batch()
    module.register_full_backward_hook(lambda m, gi, go: seen.extend((*gi, *go)))
    out = module({"rows": x}, factor=0.5)
    assert out["name"] == "half" and type(out) is collections.OrderedDict
    out["rows"][0].data.sum().backward()
    assert (seen[0] == 0.5).all() and (seen[1] == 1).all() and len(seen) == 2


def test_old_hooks_are_refused():
    with pytest.raises(RuntimeError, match="hook: expected register_full_backward_hook, got "):
        vit().register_backward_hook(print_gradients)


def test_hooks_of_a_compiled_module(fresh_compiler):
    module, seen = seeded(lambda: ak.layers.DualFFN(DIM, 16)), []
    module.register_full_backward_hook(lambda m, gi, go: seen.extend((*gi, *go)))
    compiled, x = torch.compile(module, backend="eager"), batch()
    y = compiled(x)
    objective(y).backward()
    torch.testing.assert_close(seen[0], x.data.grad)
    assert seen[1].shape == y.data.shape
