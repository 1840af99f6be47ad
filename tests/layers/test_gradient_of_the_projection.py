"""A layer's backward writes the gradient of queries, keys and values once, and never copies it."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import adatape_kernels as ak

OP = "elastic_attention_qkvpacked"
DIM, HEADS = 24, 3
COPIES = {"stack", "cat", "clone", "copy_", "_to_copy", "index_put", "select_backward", "add"}


class CreatedTensors(TorchDispatchMode):
    """Collects, of all ops that run, the names, and the bytes of the results that are no views."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if not func.is_view:
            given = results if isinstance(results, tuple) else (results,)
            self.bytes += sum(x.nbytes for x in given if isinstance(x, torch.Tensor))
        return results


def batch(device):
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=device)
    return ak.ElasticBatch.from_padded(torch.randn(2, 5, DIM, device=device), mask)


def in_backward(layer, x):
    y = layer(x).data.square().sum()
    with CreatedTensors() as created:
        y.backward()
    return created


def stacked(qkv, *offsets, **options):
    """What the layer would call without the op."""
    return ak.ops.elastic_attention(*qkv.unbind(1), *offsets, **options)


def test_nothing_of_it_is_stacked_or_copied(device, monkeypatch):
    layer, x = ak.layers.ElasticAttention(DIM, HEADS).to(device), batch(device)
    ours = in_backward(layer, x)
    assert ours.names.count("elastic_attention_qkvpacked_bwd") == 1
    assert not COPIES & {*ours.names}
    gradients = [p.grad for p in layer.parameters()]

    layer.zero_grad()
    monkeypatch.setattr(ak.ops, "elastic_attention_qkvpacked", stacked)
    theirs = in_backward(layer, x)
    assert theirs.names.count("stack") == 1
    assert theirs.bytes - ours.bytes == x.data.shape[0] * 3 * DIM * 4
    for a, e in zip(gradients, layer.parameters(), strict=True):
        torch.testing.assert_close(a, e.grad, rtol=0, atol=0)


@pytest.mark.compiles
@pytest.mark.backends("eager", "cpp")
def test_nor_in_a_traced_backward(device, fresh_compiler):
    graphs = []

    def keep(graph, inputs):
        graphs.append({getattr(n.target, "__name__", "") for n in graph.graph.nodes})
        return graph

    layer = ak.layers.ElasticAttention(DIM, HEADS).to(device)
    compiler = aot_autograd(fw_compiler=lambda graph, inputs: graph, bw_compiler=keep)
    torch.compile(layer, backend=compiler, fullgraph=True)(batch(device)).data.sum().backward()
    (backward,) = graphs
    assert any("elastic_attention_qkvpacked_bwd" in name for name in backward)
    assert not [name for name in backward if name.split(".")[0] in COPIES]
