"""`torch.compile` with no flag makes one graph of what reads a tape, whose length nobody knows."""

import warnings

import pytest
import torch
from checks import assert_close
from torch._dynamo.utils import counters

import adatape_kernels as ak
from adatape_kernels.layers import TapeReader
from adatape_kernels.models import AdaTapeParity, AdaTapeParityConfig, adatape_vit

BATCH, DIM, BANK = 3, 8, 20
SIZES = {"num_classes": 5, "dim": 16, "depth": 1, "num_heads": 2, "ffn_dim": 16}
READING = {"num_tape_tokens": 4, "topk": 2, "halt_threshold": 0.7, "tape_ffn_dim": 8}
MODELS = {
    "vit": {"depth": 2},
    "vit, two reads of a learned bank": {
        "bank": "learn",
        "bank_size": 40,
        "depth": 2,
        "read_layers": (0, 1),
    },
    "vit, mean": {"pooling": "mean", "query": "gap"},
    "vit, max": {"pooling": "max", "query": "gap"},
    "vit, projection": {"tape_mlp_dim": 8, "tape_ffn_dim": 0},
    "parity": {"depth": 2},
    "parity, two reads": {"depth": 2, "read_layers": (0, 1)},
}
ONE_WAY = {
    "vit, mean": False,
    "vit, max": True,
    "vit, projection": True,
    "parity, two reads": False,
}
"""Models that are compiled one way only, since what they add to "vit" and "parity" does not depend
on it; and whether that is for training."""


def build(name, changes):
    options = SIZES | READING | changes
    if name.startswith("parity"):
        model = AdaTapeParity(AdaTapeParityConfig(seq_len=12, **options))
    else:
        model = adatape_vit("Ti/4", image_size=8, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs_of(model):
    shape = (12, 3) if isinstance(model, AdaTapeParity) else (3, 8, 8)
    return [scale * torch.randn(BATCH, *shape) for scale in (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)]


def one_graph(function, calls, backend="aot_eager"):
    """Return what a compiled function returns: one graph, made once, and nothing to warn of."""
    counters.clear()
    compiled = torch.compile(function, backend=backend)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n, call in enumerate(calls):
            with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
                results.append(compiled(*call))
    assert not counters["graph_break"], counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    return results


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("name", "training"),
    [
        pytest.param(name, training, id=f"{name}-{'train' if training else 'eval'}")
        for name in MODELS
        for training in (False, True)
        if ONE_WAY.get(name, training) == training
    ],
)
def test_a_model(name, training, fresh_compiler):
    model = build(name, MODELS[name]).train(training)
    calls = inputs_of(model)
    with torch.set_grad_enabled(training):
        outputs = one_graph(model, [(inputs,) for inputs in calls])
        lengths = set()
        for inputs, output in zip(calls, outputs, strict=True):
            expected = model(inputs)
            lengths.add(int(expected.tape_lens.sum()))
            assert torch.equal(output.tape_lens, expected.tape_lens)
            assert_close(output.logits, expected.logits.detach(), 1e-5)
            if training:
                assert_same_gradients(model, output, expected)
    assert len(lengths) > 1, "every call has read the same number of tape tokens"


def assert_same_gradients(model, output, expected):
    labels, parameters = torch.arange(BATCH), list(model.parameters())
    actual, wanted = (
        torch.autograd.grad(model.loss(out, labels), parameters, allow_unused=True)
        for out in (output, expected)
    )
    for ours, theirs in zip(actual, wanted, strict=True):
        if theirs is not None:
            assert_close(ours, theirs, 1e-4)


@pytest.mark.compiles
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_model_by_torch_s_own_compiler(training, fresh_compiler):
    model = build("vit", {}).train(training)
    inputs = inputs_of(model)[2]
    with torch.set_grad_enabled(training):
        (output,) = one_graph(model, [(inputs,)], backend="inductor")
        expected = model(inputs)
        assert_close(output.logits, expected.logits.detach(), 1e-4)
        if training:
            assert_same_gradients(model, output, expected)


def test_what_torch_explains(fresh_compiler):
    model = build("vit", {}).eval()
    with torch.no_grad():
        explained = torch._dynamo.explain(model)(inputs_of(model)[0])
    assert explained.graph_count == 1 and explained.graph_break_count == 0


@pytest.mark.compiles
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_reader_that_reads_none_one_and_many(training, fresh_compiler):
    reader = TapeReader(DIM, num_tape_tokens=4, topk=2, halt_threshold=99.0).train(training)

    def read(data, bank, bank_lens):
        x, selection = reader(ak.ElasticBatch.from_padded(data), bank, bank_lens=bank_lens)
        x, _ = reader(x, bank)
        return x.data, x.cu_tapes, selection.ponder, x.pool("mean"), x.pool("max")

    calls = [
        (torch.randn(BATCH, 5, DIM), torch.randn(BATCH, BANK, DIM), torch.tensor(lens))
        for lens in ([BANK, 5, 0], [0, 2, 0], [0, 0, 0], [BANK] * 3)
    ]
    with torch.set_grad_enabled(training):
        for call, results in zip(calls, one_graph(read, calls), strict=True):
            for actual, expected in zip(results, read(*call), strict=True):
                assert_close(actual, expected.detach(), 1e-5)


def attended(query, bank):
    tape, offsets, selection = ak.ops.tape_read(
        query, bank, num_tape_tokens=4, topk=2, halt_threshold=0.7
    )
    batch = ak.ElasticBatch.from_padded(query.unsqueeze(1))
    batch = batch.append_tape(tape, offsets, max_tapes=4)
    heads = batch.data.view(-1, 2, DIM // 2)
    out = ak.ops.elastic_attention(heads, heads, heads, batch.cu_inputs, batch.cu_tapes)
    return out.flatten(1), selection.ponder


def gathered(query, bank):
    read = ak.ops.tape_select(query, bank, num_tape_tokens=4, topk=2, halt_threshold=0.7)
    tape, _ = ak.ops.tape_gather(bank, read.indices, read.weights, read.counts)
    return (tape.relu() @ tape.new_ones(DIM, 2)).softmax(1), tape.sum(0)


QUERIES = [(scale * torch.randn(BATCH, DIM), torch.randn(BANK, DIM)) for scale in (0.1, 1.0, 9.0)]


@pytest.mark.compiles
@pytest.mark.parametrize("function", [attended, gathered], ids=lambda f: f.__name__)
def test_a_function_around_the_ops(function, fresh_compiler):
    calls = [(query.clone().requires_grad_(), bank) for query, bank in QUERIES]
    for call, results in zip(calls, one_graph(function, calls), strict=True):
        wanted = function(*call)
        for actual, expected in zip(results, wanted, strict=True):
            assert_close(actual, expected.detach(), 1e-5)
        ours, theirs = (
            torch.autograd.grad(sum(r.square().sum() for r in given), call[0])[0]
            for given in (results, wanted)
        )
        assert_close(ours, theirs, 1e-4)


def branching(query, bank):
    out, _ = attended(query, bank)
    return out + 1 if out.shape[0] > BATCH + 4 else out - 1


def padded(query, bank):
    tape, offsets, _ = ak.ops.tape_read(query, bank, num_tape_tokens=4, topk=2, halt_threshold=0.7)
    batch = ak.ElasticBatch.from_padded(query.unsqueeze(1))
    return batch.append_tape(tape, offsets, max_tapes=4).to_padded()[0]


@pytest.mark.compiles
@pytest.mark.parametrize("function", [branching, padded], ids=lambda f: f.__name__)
def test_what_needs_the_length_ends_the_graph(function, fresh_compiler):
    compiled = torch.compile(function, backend="aot_eager")
    with torch.no_grad():
        for call in QUERIES:
            assert_close(compiled(*call), function(*call), 1e-5)


@pytest.mark.compiles
def test_a_torch_without_the_private_name_ends_the_graph(monkeypatch, fresh_compiler):
    monkeypatch.delattr(torch._library.fake_impl, "allocate_size")
    counters.clear()
    compiled = torch.compile(gathered, backend="aot_eager")
    with torch.no_grad():
        for actual, expected in zip(compiled(*QUERIES[0]), gathered(*QUERIES[0]), strict=True):
            assert_close(actual, expected, 1e-5)
    assert counters["graph_break"]
