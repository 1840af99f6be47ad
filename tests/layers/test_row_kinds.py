"""Layers on plain, padded and jagged tensors: adatape_kernels/layers/row_kinds.py."""

import numpy as np
import pytest
import torch
from checks import assert_same_bits, refused
from torch import nn

import adatape_kernels as ak
from adatape_kernels import ElasticBatch

DIM, BATCH, SEQLEN = 8, 3, 5
MASKS = {
    "left": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
    "holes": [[1, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 1, 1, 1, 0]],
    "an example without rows": [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]],
    "no rows": [[0] * SEQLEN] * BATCH,
}


def encoder(*readers, **options):
    layers = [ak.layers.ElasticEncoderLayer(DIM, 2, 16, 4) for _ in range(2)]
    return ak.layers.ElasticEncoder(layers, DIM, dict(readers), **options)


def reader(**options):
    options = {"halt_threshold": 1.2, "bank_size": 20, **options}
    return ak.layers.TapeReader(DIM, num_tape_tokens=4, topk=2, query="gap", **options)


LAYERS = {
    "attention": lambda: ak.layers.ElasticAttention(DIM, 2),
    "feed-forward": lambda: ak.layers.DualFFN(DIM, 16, 4),
    "layer": lambda: ak.layers.ElasticEncoderLayer(DIM, 2, 16, 4),
    "norms last": lambda: ak.layers.ElasticEncoderLayer(DIM, 2, 16, norm_first=False),
    "encoder": encoder,
    "rounded encoder": lambda: encoder(row_multiple=16),
}
READING = {
    "reader": reader,
    "encoder that reads": lambda: encoder((0, reader()), (1, reader(tape_mlp_dim=4))),
}
EVERY = {**LAYERS, **READING}


def made(name):
    torch.manual_seed(0)
    layer = EVERY[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def rows():
    torch.manual_seed(1)
    return torch.randn(BATCH, SEQLEN, DIM, requires_grad=True)


def mask_of(name):
    return torch.tensor(MASKS[name]).bool()


def applied(layer, x, **options):
    """The rows that a layer returns, and what was read, if anything."""
    result = layer(x, **options)
    several = isinstance(layer, ak.layers.ElasticEncoder | ak.layers.TapeReader)
    return result if several else (result, ())


def jagged_of(padded, mask):
    parts = [example[valid] for example, valid in zip(padded.detach(), mask, strict=True)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


def gradients(out, inputs, layer):
    """Of a sum with weights, in the inputs and in every parameter."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    leaves = [inputs, *layer.parameters()]
    return torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)


def same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert_same_bits(a, e)


@pytest.mark.parametrize("name", EVERY)
def test_a_plain_tensor_is_a_batch_of_input_rows(name):
    layer, x, again = made(name), rows(), rows()
    out, read = applied(layer, x)
    expected, wanted = applied(layer, ElasticBatch.from_padded(again))
    padded, mask = expected.to_padded()
    assert mask.all() or name in READING
    assert type(out) is torch.Tensor and (name in READING or out.shape == x.shape)
    assert_same_bits(out, padded)
    same(gradients(out, x, layer), gradients(padded, again, layer))
    assert type(read) is type(wanted)
    if name == "reader":
        same(read, wanted)
        assert mask.sum(1).sub(SEQLEN).tolist() == read.counts.tolist()


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_padded_pair_keeps_its_places(name, pattern):
    layer, x, again, mask = made(name), rows(), rows(), mask_of(pattern)
    (out, out_mask), _ = applied(layer, (x, mask))
    expected, _ = applied(layer, ElasticBatch.from_padded(again, mask))
    packed, _ = expected.to_packed()
    assert out.shape == x.shape and out_mask is mask
    assert_same_bits(out[mask], packed)
    assert not out[~mask].any()
    same(gradients(out[mask], x, layer), gradients(packed, again, layer))


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("name", READING)
def test_a_padded_pair_that_reads_is_what_to_padded_gives(name, pattern):
    layer, x, again, mask = made(name), rows(), rows(), mask_of(pattern)
    (out, out_mask), _ = applied(layer, (x, mask))
    expected, _ = applied(layer, ElasticBatch.from_padded(again, mask))
    padded, wanted_mask = expected.to_padded()
    assert_same_bits(out, padded)
    assert torch.equal(out_mask, wanted_mask)
    same(gradients(out, x, layer), gradients(padded, again, layer))


@pytest.mark.parametrize("name", EVERY)
def test_a_jagged_tensor_comes_out_jagged(name):
    layer, mask = made(name), mask_of("an example without rows")
    x, again = jagged_of(rows(), mask), jagged_of(rows(), mask)
    out, _ = applied(layer, x)
    expected, _ = applied(layer, ElasticBatch.from_nested(again))
    wanted = expected.to_nested()
    assert out.layout == torch.jagged and torch.equal(out.offsets(), wanted.offsets())
    assert_same_bits(out.values(), wanted.values())
    actual = gradients(out.values(), x, layer)
    wanted = gradients(wanted.values(), again, layer)
    same([actual[0].values(), *actual[1:]], [wanted[0].values(), *wanted[1:]])
    if name in LAYERS:
        assert (out + x).shape == x.shape  # one ragged dimension


@pytest.mark.parametrize("name", READING)
def test_with_a_capacity_the_shape_is_known_beforehand(name):
    layer, mask = made(name), mask_of("left")
    longest = SEQLEN + (8 if name == "encoder that reads" else 4)
    for x in (rows(), (rows(), mask)):
        out, _ = applied(layer, x, capacity=40)
        roomy = out if isinstance(x, torch.Tensor) else out[0]
        exact, _ = applied(layer, x)
        exact = exact if isinstance(x, torch.Tensor) else exact[0]
        assert roomy.shape == (BATCH, longest, DIM)
        torch.testing.assert_close(roomy[:, : exact.shape[1]], exact)
        assert not roomy[:, exact.shape[1] :].any()


@pytest.mark.parametrize("shape", [(0, 3, DIM), (2, 0, DIM), (0, 0, DIM), (1, 1, DIM)])
@pytest.mark.parametrize("name", LAYERS)
def test_small_plain_tensors(name, shape):
    assert applied(made(name), torch.ones(shape))[0].shape == shape


def test_strides_do_not_matter():
    layer, x = made("layer"), rows().detach()
    for other in (x.mT.contiguous().mT, x.repeat_interleave(2, 2)[..., ::2]):
        assert not other.is_contiguous()
        assert_same_bits(layer(other), layer(x))
    assert_same_bits(layer(x[:1].expand(BATCH, -1, -1))[2], layer(x[:1])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    layer, x = made("layer").to(dtype), rows().to(dtype)
    assert_same_bits(layer(x), layer(ElasticBatch.from_padded(x)).data.view_as(x))
    (padded, _) = layer((x, mask_of("holes")))
    assert padded.dtype == dtype


def test_under_autocast():
    layer, x, mask = made("encoder"), rows(), mask_of("holes")
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(ElasticBatch.from_padded(x))[0].data.view_as(x)
        assert_same_bits(layer(x)[0], expected)
        padded, _ = layer((x, mask))[0]
        wanted = layer(ElasticBatch.from_padded(x, mask))[0]
        assert_same_bits(padded[mask], wanted.data)


def test_a_stack_of_torch_takes_pairs():
    stack = nn.Sequential(made("layer"), made("attention"))
    padded, mask = stack((rows(), mask_of("left")))
    assert padded.shape == (BATCH, SEQLEN, DIM) and mask is not None


@pytest.mark.parametrize(("name", "options"), [("attention", {}), ("reader", {"capacity": 40})])
def test_plain_tensors_in_one_graph(fresh_compiler, name, options):
    layer = made(name)
    compiled = torch.compile(
        lambda x: applied(layer, x, **options)[0], fullgraph=True, backend="eager", dynamic=True
    )
    for shape in ((2, 5, DIM), (3, 4, DIM)):
        x = torch.randn(shape, requires_grad=True)
        y = compiled(x)
        assert_same_bits(y, applied(layer, x, **options)[0])
        y.sum().backward()
        assert x.grad.shape == shape


def test_an_exported_encoder_takes_any_batch_of_plain_tensors():
    layer = made("encoder")
    dynamic = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(layer, (rows(),), dynamic_shapes=(dynamic,)).module()
    other = torch.ones(7, SEQLEN, DIM)
    torch.testing.assert_close(program(other)[0], layer(other)[0])


X, MASK = torch.zeros(BATCH, SEQLEN, DIM), mask_of("left")
NESTED = torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged)
WRONG = {
    "a list": [X[0], X[1]],
    "numpy": X.numpy(),
    "nothing": None,
    "a word": "rows",
    "two dimensions": X[0],
    "four dimensions": X[None],
    "integers": X.long(),
    "complex": X.to(torch.complex64),
    "sparse": X.to_sparse(),
    "a triple": (X, MASK, MASK),
    "no mask": (X, None),
    "a pair of lists": ([X], [MASK]),
    "a mask of numpy": (X, np.ones((BATCH, SEQLEN), bool)),
    "a batch and a mask": (ElasticBatch.from_padded(X), MASK),
    "a jagged one and a mask": (NESTED, MASK),
    "jagged integers": NESTED.long(),
}
WRONG_VALUES = {
    "a mask of numbers": ((X, MASK.float()), "x[1]"),
    "a mask of another shape": ((X, MASK[:, 1:]), "x[1]"),
    "a mask with a dimension more": ((X, MASK[..., None]), "x[1]"),
    "a sparse mask": ((X, MASK.to_sparse()), "x[1]"),
    "a mask elsewhere": ((X, MASK.to("meta")), "x[1]"),
    "a transposed jagged one": (NESTED.transpose(1, 2), "x"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", EVERY)
def test_what_is_no_kind_of_rows_is_refused(name, wrong):
    with refused("x", "an ElasticBatch", "pair (Tensor, mask)", error=TypeError):
        made(name)(WRONG[wrong])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_the_other_layout_are_refused():
    with refused("x", "nested Tensor of layout torch.strided", error=TypeError):
        made("layer")(torch.nested.nested_tensor([X[0], X[1, :2]]))


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_masks_and_jagged_tensors_that_do_not_match_are_refused(wrong):
    given, argument = WRONG_VALUES[wrong]
    with refused(argument):
        made("layer")(given)
