"""Saved tensors that are dropped, moved or counted on their way: checkpoints and hooks."""

import functools

import pytest
import torch
from derivative_cases import NAMES, case, scalar
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils import _pytree
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import adatape_kernels as ak
from adatape_kernels.ops.op import BACKENDS, explain

KEPT = [
    torch.ops.adatape.dual_ffn.default,
    torch.ops.adatape.elastic_attention_qkvpacked.default,
]
MODES = {
    "whole": {},
    "keeping ops": {"context_fn": functools.partial(create_selective_checkpoint_contexts, KEPT)},
    "keeping nothing": {
        "context_fn": functools.partial(
            create_selective_checkpoint_contexts,
            lambda *args, **kwargs: CheckpointPolicy.MUST_RECOMPUTE,
        )
    },
}


def backends():
    reasons = explain("tape_select", "cpu", torch.float32)
    return [backend for backend in BACKENDS if reasons[backend] == "serves"]


def gradients(run, args):
    leaves = [arg.clone().requires_grad_() for arg in args]
    return torch.autograd.grad(scalar(run(*leaves)), leaves)


def assert_equal(actual, expected):
    for found, exact in zip(actual, expected, strict=True):
        assert torch.equal(found, exact)


@pytest.fixture(params=backends())
def backend(request):
    fallback = () if request.param == "eager" else "eager"
    with ak.use_backend(request.param, fallback=fallback):
        yield request.param


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_gives_an_op_s_gradients(name, mode, backend):
    function, args = case(name, torch.float32)

    def run(*given):
        return checkpoint(function, *given, use_reentrant=False, **MODES[mode])

    assert_equal(gradients(run, args), gradients(function, args))


@pytest.mark.parametrize("name", NAMES)
def test_every_saved_tensor_is_unpacked_once(name, backend):
    function, args = case(name, torch.float32)
    expected, unpacked = gradients(function, args), []

    def pack(tensor):
        unpacked.append(0)
        return len(unpacked) - 1, tensor.clone()

    def unpack(packed):
        unpacked[packed[0]] += 1
        return packed[1]

    def run(*given):
        with saved_tensors_hooks(pack, unpack):
            return function(*given)

    assert_equal(gradients(run, args), expected)
    assert unpacked and max(unpacked) == 1
    with save_on_cpu():
        saved = gradients(function, args)
    assert_equal(saved, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_graph_gives_the_same_twice(name, backend):
    function, args = case(name, torch.float32)
    leaves = [arg.clone().requires_grad_() for arg in args]
    value = scalar(function(*leaves))
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    assert_equal(torch.autograd.grad(value, leaves, retain_graph=True), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, leaves)
        torch.autograd.grad(value, leaves)


def batch_of(data):
    offsets = (torch.tensor([0, 2, 4]), torch.tensor([4, 5, 6]))
    return ak.ElasticBatch.from_offsets(data, *(o.to(torch.int32) for o in offsets))


@pytest.fixture
def layer():
    return ak.layers.ElasticEncoderLayer(8, 2, 16, 4)


def layer_gradients(layer, run):
    data = torch.linspace(-1, 1, 48).view(6, 8).requires_grad_()
    return torch.autograd.grad(scalar(run(data)), [data, *layer.parameters()])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_s_gradients_over_a_batch(layer, mode, compiled, fresh_compiler):
    expected = layer_gradients(layer, lambda data: layer(batch_of(data)).data)

    def block(batch):
        return checkpoint(layer, batch, use_reentrant=False, **MODES[mode])

    if compiled:
        block = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_equal(layer_gradients(layer, lambda data: block(batch_of(data)).data), expected)


def test_a_reentrant_checkpoint_over_a_batch_is_refused(layer):
    data = torch.randn(6, 8, requires_grad=True)
    uses = (
        (lambda x: layer(x), batch_of(data)),
        (lambda x: layer(x[0]), [batch_of(data)]),
        (lambda x: layer(x["x"]), {"x": batch_of(data)}),
        (lambda x: x.pool("mean"), batch_of(data)),
        (lambda x: x.to_padded(), batch_of(data)),
        (
            lambda x: x.append_tape(
                torch.zeros(1, 8), torch.tensor([0, 1, 1], dtype=torch.int32), max_tapes=1
            ),
            batch_of(data),
        ),
    )
    message = r"^use_reentrant: expected False, .* got True$"
    for use, given in uses:
        with pytest.raises(RuntimeError, match=message):
            checkpoint(use, given, use_reentrant=True)


def test_a_reentrant_checkpoint_over_its_tensor_is_right(layer):
    data = torch.randn(6, 8, requires_grad=True)

    def gradients(run):
        layer.zero_grad()
        data.grad = None
        scalar(run(data)).backward()
        return [t.grad for t in (data, *layer.parameters())]

    expected = gradients(lambda d: layer(batch_of(d)).data)
    assert_equal(
        gradients(
            lambda data: checkpoint(lambda d: layer(batch_of(d)).data, data, use_reentrant=True)
        ),
        expected,
    )


def test_without_autograd_a_batch_that_requires_gradients_is_welcome(layer):
    batch = batch_of(torch.randn(6, 8, requires_grad=True))
    with torch.no_grad():
        assert not layer(batch).data.requires_grad
    batch = batch_of(torch.randn(6, 8))
    checkpoint(lambda x: layer(x).data, batch, use_reentrant=True)


def test_a_batch_is_a_pytree_node():
    batch = batch_of(torch.randn(6, 8))
    leaves, spec = _pytree.tree_flatten(batch)
    assert leaves[0] is batch.data and leaves[1] is batch.cu_inputs
    again = _pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, ak.ElasticBatch) and again.max_rows == batch.max_rows
    doubled = _pytree.tree_map_only(torch.Tensor, lambda t: t.double(), batch)
    assert doubled.data.dtype == torch.float64
