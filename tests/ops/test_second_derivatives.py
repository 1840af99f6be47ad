"""Derivatives of derivatives, by create_graph=True: adatape_kernels/ops/second_derivative.py."""

import pytest
import torch
from checks import assert_close
from derivative_cases import NAMES, case, scalar
from torch.autograd import gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import adatape_kernels as ak
from adatape_kernels.ops.op import BACKENDS, explain, record


@pytest.mark.parametrize("name", NAMES)
def test_in_float64_they_pass_torch_s_check(name):
    function, args = case(name)
    leaves = tuple(arg.requires_grad_() for arg in args)
    assert gradgradcheck(function, leaves, check_batched_grad=True, check_fwd_over_rev=True)


def penalty(function, args):
    """Gradients of a function of the first gradients, by reverse mode twice."""
    leaves = [arg.clone().requires_grad_() for arg in args]
    value = scalar(function(*leaves))
    first = torch.autograd.grad(value, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return (*(g.detach() for g in first), *second)


def backends():
    reasons = explain("tape_select", "cpu", torch.float32)
    return [backend for backend in BACKENDS if reasons[backend] == "serves"]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_s_are_those_of_float64(name, backend):
    function, args = case(name, torch.float32)
    expected = penalty(function, [arg.double() for arg in args])
    with ak.use_backend(backend, fallback=() if backend == "eager" else "eager"):
        actual = penalty(function, args)
    for found, exact in zip(actual, expected, strict=True):
        assert_close(found, exact, 2e-4)


def test_the_first_gradient_is_the_same_with_and_without_a_graph_and_from_the_same_kernel():
    function, args = case("attention", torch.float32)
    grads = []
    for create_graph in (False, True):
        q = args[0].clone().requires_grad_()
        with record() as ran:
            (grad,) = torch.autograd.grad(
                scalar(function(q, *args[1:])), q, create_graph=create_graph
            )
        backend = explain("elastic_attention", "cpu", torch.float32)["cpp"]
        assert ran[-1] == ("elastic_attention_bwd", "cpp" if backend == "serves" else "eager")
        grads.append(grad)
    assert torch.equal(*grads)


def test_the_third_derivative_is_right_too():
    function, args = case("attention")
    direction = torch.randn_like(args[0])

    def along(t):
        return scalar(function(args[0] + t * direction, *args[1:]))

    def third(t):
        t = t.clone().requires_grad_()
        value = along(t)
        for _ in range(3):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
        return value

    zero, step = torch.zeros((), dtype=torch.float64), 1e-2
    value = [along(zero + i * step) for i in range(-3, 4)]
    expected = (
        value[0] - 8 * value[1] + 13 * value[2] - 13 * value[4] + 8 * value[5] - value[6]
    ) / (8 * step**3)
    assert_close(third(zero), expected, 1e-4)


def test_a_gradient_penalty_on_a_model_is_the_padded_model_s():
    model = ak.models.adatape_vit(
        *("Ti/4",),
        **{"image_size": 8, "depth": 2, "num_classes": 5, "dim": 16, "num_heads": 2},
        **{"ffn_dim": 16, "tape_ffn_dim": 8, "num_tape_tokens": 2, "topk": 2},
    ).double()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def gradients(run):
        leaf = images.clone().requires_grad_()
        output = run(leaf)
        loss = model.loss(output, torch.tensor([1, 3]))
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(
            loss + grad.square().sum(), list(model.parameters()), allow_unused=True
        )

    with sdpa_kernel(SDPBackend.MATH):  # the faster ones have no second derivative
        padded = gradients(model.padded())
    for actual, expected in zip(gradients(model), padded, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_close(actual, expected, 1e-9)


def test_a_gradient_recorded_by_a_compiled_graph_is_right_or_refused(fresh_compiler):
    function, args = case("attention", torch.float32)
    expected = penalty(function, args)
    with pytest.raises(RuntimeError, match="double backward"):
        penalty(torch.compile(function, fullgraph=True, backend="aot_eager"), args)
    actual = penalty(torch.compile(function, fullgraph=True, backend="eager"), args)
    for found, exact in zip(actual, expected, strict=True):
        assert_close(found, exact, 1e-5)


def test_an_op_without_a_second_derivative_says_so():
    """As an op that somebody adds may be: silence would be a wrong gradient."""
    from adatape_kernels.ops.op import operation

    backward = operation("add_layer_norm_bwd")
    derivative = backward._derivative
    given = vars(derivative).copy()
    derivative.set(None, None, None)
    try:
        x = torch.randn(2, 3, requires_grad=True)
        total, normed = ak.ops.add_layer_norm(x, x, torch.ones(3), torch.zeros(3))
        (grad,) = torch.autograd.grad(scalar((total, normed)), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"^add_layer_norm_bwd: expected "):
            grad.sum().backward()
    finally:
        vars(derivative).update(given)
