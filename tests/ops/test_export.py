"""torch.export over each op and the model: the graph holds our ops and gives their results."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from adatape_kernels import ops
from adatape_kernels.models import adatape_vit
from adatape_kernels.ops import FFN


class Calls(nn.Module):
    """A module around a function, which is all that torch.export takes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def exported(function, example, others, dims):
    """Export with the example's shapes, `dims` of them free; the others must give the same."""
    program = torch.export.export(Calls(function), example, dynamic_shapes=(dims,))
    for args in (example, *others):
        found, expected = program.module()(*args), function(*args)
        assert len(found) == len(expected)
        for ours, eager in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=0, atol=0)
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def read(query, bank):
    tape, offsets, selection = ops.tape_read(
        query, bank, num_tape_tokens=3, topk=2, halt_threshold=1.0, capacity=20
    )
    return tape, offsets, *selection


def select_and_gather(query, bank):
    selection = ops.tape_select(query, bank, num_tape_tokens=3, topk=2, halt_threshold=1.0)
    tape, offsets = ops.tape_gather(bank, *selection[:3], capacity=20)
    return tape, offsets, *selection


@pytest.mark.parametrize("function", [read, select_and_gather])
def test_reading(function):
    def inputs(batch):
        return torch.randn(batch, 8), torch.randn(batch, 11, 8)

    batch = Dim("batch")
    targets = exported(function, inputs(4), [inputs(2), inputs(5)], ({0: batch}, {0: batch}))
    names = ("tape_read",) if function is read else ("tape_select", "tape_gather")
    assert {f"adatape.{name}.default" for name in names} <= targets


def test_attention():
    def inputs(*lens):
        q, k, v = torch.randn(3, 2 * sum(lens), 2, 8).unbind(0)
        cu_inputs = torch.tensor([0, *lens]).cumsum(0).int()
        return q, k, v, cu_inputs, cu_inputs + cu_inputs[-1]

    def attend(*args):
        return (ops.elastic_attention(*args),)

    rows, bounds = {0: Dim("rows")}, {0: Dim("bounds")}
    dims = rows, rows, rows, bounds, bounds
    targets = exported(attend, inputs(3, 4, 2), [inputs(5, 1), inputs(2, 2, 2, 2)], dims)
    assert "adatape.elastic_attention.default" in targets


def test_feed_forwards_and_norm():
    def ffn(wide, narrow):
        return FFN(*(torch.randn(s) for s in ((wide, 8), (wide,), (8, narrow), (8,))))

    one, two, weight = ffn(16, 16), ffn(24, 12), torch.randn(8)

    def layer(x):
        # On a CPU the public function is no op of ours.
        total, normed, *_ = torch.ops.adatape.add_layer_norm(x, x, weight, weight, 1e-6)
        return total, ops.dual_ffn(normed, 2, one, two)

    inputs = [(torch.randn(rows, 8),) for rows in (7, 4, 12)]
    targets = exported(layer, inputs[0], inputs[1:], ({0: Dim("rows", min=4)},))
    assert {"adatape.dual_ffn.default", "adatape.add_layer_norm.default"} <= targets


def test_model():
    torch.manual_seed(0)
    model = adatape_vit("Ti/16", image_size=32, depth=2, num_classes=10, num_tape_tokens=3, topk=2)
    nn.init.normal_(model.head.weight)

    def logits(images):
        output = model(images, capacity=30)
        return output.logits, output.tape_lens, output.ponder

    images = [(torch.randn(batch, 3, 32, 32),) for batch in (4, 2, 7)]
    targets = exported(logits, images[0], images[1:], ({0: Dim("batch", min=2)},))
    attention = "adatape.elastic_attention_qkvpacked.default"
    assert {"adatape.tape_read.default", attention} <= targets
