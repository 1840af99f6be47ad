"""Choices of kernels, and kernels between graphs, under torch.compile and exporters."""

import warnings

import pytest
import torch
from derivative_cases import OFFSETS
from torch.fx.experimental.proxy_tensor import make_fx

import adatape_kernels as ak
from adatape_kernels.ops import elastic_attention, ffn_products
from adatape_kernels.ops.op import current_backend, record

Q = torch.linspace(-1, 1, 56).view(7, 2, 4)


def attend(q):
    return elastic_attention(q, q, q, *OFFSETS)


def inside(q):
    x = q * 2
    with ak.use_backend("eager"):
        x = attend(x)
    return x + 1


def with_a_fallback(q):
    with ak.use_backend("eager", fallback=["cpp"]):
        return attend(q)


@ak.use_backend("eager")
def decorated(q):
    return attend(q)


def by_a_decorator(q):
    return decorated(q * 2)


def by_hand(q):
    context = ak.use_backend("eager")
    context.__enter__()
    try:
        return attend(q)
    finally:
        context.__exit__(None, None, None)


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = ak.layers.ElasticAttention(8, 2)

    def forward(self, q):
        batch = ak.ElasticBatch.from_padded(q.reshape(1, 7, 8))
        with ak.use_backend("eager"):
            return self.attention(batch).data


CALLS = [inside, with_a_fallback, by_a_decorator, by_hand, Module()]


@pytest.mark.parametrize("function", CALLS, ids=lambda f: getattr(f, "__name__", "module"))
def test_a_choice_inside_a_compiled_function_is_honoured(function, fresh_compiler):
    with record() as ran:
        expected = function(Q)
    assert {each.backend for each in ran} == {"eager"}
    compiled = torch.compile(function, backend="aot_eager")
    for _ in range(2):
        with record() as ran:
            actual = compiled(Q)
        assert {each.backend for each in ran} == {"eager"}
        torch.testing.assert_close(actual, expected)
    assert current_backend() is None


@pytest.mark.parametrize("function", CALLS, ids=lambda f: getattr(f, "__name__", "module"))
def test_where_the_graph_must_not_end_compiling_fails(function, fresh_compiler):
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"use_backend|Chosen"):
        torch.compile(function, backend="aot_eager", fullgraph=True)(Q)
    assert current_backend() is None


def products(q):
    with ffn_products("grouped"):
        return q * 2


def test_so_it_is_with_the_products_of_dual_ffn(fresh_compiler):
    assert torch.equal(torch.compile(products, backend="aot_eager")(Q), 2 * Q)
    torch.compiler.reset()  # it remembers of a function that it is not to be compiled
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ffn_products"):
        torch.compile(products, backend="aot_eager", fullgraph=True)(Q)


@pytest.mark.parametrize(
    "trace",
    [
        lambda f: torch.export.export(f, (Q,), strict=False),
        lambda f: make_fx(f)(Q),
        lambda f: torch.jit.trace(f, (Q,)),
    ],
    ids=["export", "make_fx", "jit.trace"],
)
def test_a_traced_program_does_not_lose_a_choice_in_silence(trace):
    with pytest.raises(RuntimeError, match=r"^use_backend: expected a call that runs, got "):
        trace(Module())
    assert current_backend() is None


def test_a_step_with_its_backward_inside_does_not_trace_our_kernels(fresh_compiler):
    """The backward pass runs between graphs, where a Python frame of ours might be traced."""

    def step(q):
        attend(q).square().sum().backward()
        return q * 2

    leaf = Q.clone().requires_grad_()
    attend(leaf).square().sum().backward()
    expected, leaf.grad = leaf.grad, None
    counters = torch._dynamo.utils.counters
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(step, backend="aot_eager")(leaf)
    torch.testing.assert_close(leaf.grad, expected)
    assert not [reason for reason in counters["graph_break"] if "_any_requires_grad" in reason]


def test_with_a_capacity_a_model_is_one_graph_without_a_flag(fresh_compiler):
    model = ak.models.adatape_vit(
        *("Ti/4",),
        **{"image_size": 8, "depth": 1, "num_classes": 5, "dim": 16, "num_heads": 2},
        **{"ffn_dim": 16, "num_tape_tokens": 2, "topk": 2},
    )
    images = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = compiled(images, capacity=4).logits
    torch.testing.assert_close(actual, model(images).logits)
