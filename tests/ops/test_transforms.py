"""Forward mode and the transforms of torch.func: adatape_kernels/ops/fast_autograd.py."""

import pytest
import torch
from checks import assert_close
from derivative_cases import CASES, NAMES, case, scalar
from torch.autograd import forward_ad, gradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import adatape_kernels as ak
from adatape_kernels.ops import fast_autograd, tape_gather
from adatape_kernels.ops.attach_derivative import attach
from adatape_kernels.ops.op import BACKENDS, explain, record

SMALL = ("select", "gather, capacity", "read, capacity", "attention", "norm")


needs_single_level = pytest.mark.skipif(
    not fast_autograd.SINGLE_LEVEL, reason="this torch applies autograd functions in C++"
)


@pytest.mark.skipif(fast_autograd.SINGLE_LEVEL, reason="this torch has torch.func for our ops")
def test_a_transform_is_refused_by_name_where_torch_cannot_apply_it():
    x, ones = torch.ones(3, 4), torch.ones(4)

    def normed(x):
        _, out = ak.ops.add_layer_norm(x, x, ones, ones)
        return out.sum()

    with pytest.raises(NotImplementedError, match=r"add_layer_norm: expected .*, got"):
        torch.func.grad(normed)(x)


def backends():
    reasons = explain("tape_select", "cpu", torch.float32)
    return [backend for backend in BACKENDS if reasons[backend] == "serves"]


@pytest.mark.parametrize("name", NAMES)
def test_tangents_pass_torch_s_check(name):
    function, args = case(name)
    leaves = tuple(arg.requires_grad_() for arg in args)
    assert gradcheck(
        function,
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@needs_single_level
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_has_tangents_beside_its_own_results(name, backend):
    function, args = case(name, torch.float32)
    tangents = tuple(torch.randn_like(arg) for arg in args)
    wide = [[x.double() for x in given] for given in (args, tangents)]
    _, exact = jvp(function, *map(tuple, wide))
    with ak.use_backend(backend, fallback=() if backend == "eager" else "eager"):
        plain = function(*args)
        with record() as ran:
            primals, by_jvp = jvp(function, args, tangents)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(args, tangents, strict=True)]
            results = function(*duals)
            results = results if isinstance(results, tuple) else (results,)
            by_dual = [forward_ad.unpack_dual(result).tangent for result in results]
    assert {each.backend for each in ran} <= {backend, "eager"}
    if not isinstance(plain, tuple):
        plain, primals, by_jvp, exact = (plain,), (primals,), (by_jvp,), (exact,)
    for i, expected in enumerate(exact):
        assert torch.equal(primals[i], plain[i])
        assert_close(by_jvp[i], expected, 1e-4)
        assert_close(by_dual[i], expected, 1e-4)


def test_a_level_without_dual_tensors_changes_nothing():
    function, args = case("attention", torch.float32)
    q = args[0].clone().requires_grad_()
    expected = torch.autograd.grad(scalar(function(q, *args[1:])), q)
    with forward_ad.dual_level():
        assert torch.equal(torch.autograd.grad(scalar(function(q, *args[1:])), q)[0], expected[0])


@needs_single_level
@pytest.mark.parametrize("name", NAMES)
def test_grad_and_vjp_are_autograd_s_own(name):
    function, args = case(name, torch.float32)
    leaves = [arg.clone().requires_grad_() for arg in args]
    expected = torch.autograd.grad(scalar(function(*leaves)), leaves)
    numbers = tuple(range(len(args)))
    actual = grad(lambda *given: scalar(function(*given)), numbers)(*args)
    _, pull = vjp(lambda *given: scalar(function(*given)), *args)
    for found, pulled, exact in zip(actual, pull(torch.ones(())), expected, strict=True):
        if name.startswith("read"):
            # A transform takes the gradients of the two ops that a read calls, and adds them up,
            # which rounds once more than autograd's one op for both.
            assert_close(found, exact, 2e-7)
            assert_close(pulled, exact, 2e-7)
        else:
            assert torch.equal(found, exact) and torch.equal(pulled, exact)


@needs_single_level
@pytest.mark.parametrize("name", SMALL)
def test_jacobians_and_hessians_agree_in_every_order(name):
    function, (first, *rest) = case(name)

    def of_first(given):
        return scalar(function(given, *rest))

    exact = torch.autograd.functional.hessian(of_first, first)
    assert exact.abs().max() > 0
    for found in (
        hessian(of_first),
        jacrev(jacrev(of_first)),
        jacrev(jacfwd(of_first)),
        jacfwd(jacfwd(of_first)),
    ):
        assert_close(found(first), exact, 1e-9)
    assert_close(jacfwd(of_first)(first), jacrev(of_first)(first), 1e-9)
    direction = torch.randn_like(first)
    _, along = jvp(grad(of_first), (first,), (direction,))
    product = torch.tensordot(exact, direction, first.dim())
    assert_close(along, product, 1e-9)
    _, pull = vjp(grad(of_first), first)
    assert_close(pull(direction)[0], product, 1e-9)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("gather", "read")])
def test_vmap_is_a_loop(name):
    function, args = case(name, torch.float32)
    stacked = [torch.stack([arg, 2 * arg, -arg]) for arg in args]
    actual = vmap(function)(*stacked)
    each = [function(*(arg[i] for arg in stacked)) for i in range(3)]
    if isinstance(actual, torch.Tensor):
        actual, each = (actual,), [(one,) for one in each]
    for found, parts in zip(actual, zip(*each, strict=True), strict=True):
        assert torch.equal(found, torch.stack(parts))


def test_vmap_over_tapes_of_different_lengths_asks_for_a_capacity():
    bank, indices = torch.randn(5, 4), torch.zeros(2, 1, 3, 1, dtype=torch.int32)
    counts = torch.tensor([[1], [3]], dtype=torch.int32)

    def gather(indices, counts, capacity=None):
        weights = torch.ones(1, 3, 1)
        return tape_gather(bank, indices, weights, counts, capacity=capacity)[0]

    with pytest.raises(NotImplementedError, match=r"^tape_gather: expected .* capacity, got "):
        vmap(gather)(indices, counts)
    assert vmap(lambda i, c: gather(i, c, 3))(indices, counts).shape == (2, 3, 4)


def test_vmap_over_nothing_is_refused():
    x = torch.randn(0, 4, 3)
    with pytest.raises(NotImplementedError, match=r"^add_layer_norm: expected .* got none"):
        vmap(lambda x: ak.ops.add_layer_norm(x, x, torch.ones(3), torch.ones(3)))(x)


@needs_single_level
def test_per_sample_gradients_of_a_padded_batch():
    layer = ak.layers.ElasticEncoderLayer(8, 2, 16, 4)
    parameters = dict(layer.named_parameters())
    padded = torch.randn(3, 4, 8)

    def loss(parameters, one):
        batch = ak.ElasticBatch.from_padded(one.unsqueeze(0))
        return functional_call(layer, parameters, (batch,)).data.square().sum()

    actual = vmap(grad(loss), (None, 0))(parameters, padded)
    for i, one in enumerate(padded):
        expected = grad(loss)(parameters, one)
        for name, exact in expected.items():
            assert_close(actual[name][i], exact, 1e-5)


@needs_single_level
def test_per_sample_gradients_of_a_model_with_a_capacity():
    model = ak.models.adatape_vit(
        *("Ti/4",),
        **{"image_size": 8, "depth": 1, "num_classes": 5, "dim": 16, "num_heads": 2},
        **{"ffn_dim": 16, "tape_ffn_dim": 8, "num_tape_tokens": 2, "topk": 2},
    )
    torch.nn.init.normal_(model.head.weight)
    parameters = dict(model.named_parameters())
    images, labels = torch.randn(3, 3, 8, 8), torch.tensor([1, 0, 4])

    def loss(parameters, image, label):
        output = functional_call(model, parameters, (image.unsqueeze(0),), {"capacity": 4})
        return model.loss(output, label.unsqueeze(0))

    actual = vmap(grad(loss), (None, 0, 0))(parameters, images, labels)
    for i in range(3):
        expected = grad(loss)(parameters, images[i], labels[i])
        for name, exact in expected.items():
            assert_close(actual[name][i], exact, 1e-4)


def test_where_torch_lacks_the_private_names_forward_mode_is_refused():
    library = torch.library.Library("adatape_square", "DEF")
    library.define("square(Tensor x) -> Tensor")
    library.impl("square", lambda x: x * x, "CompositeExplicitAutograd")

    def backward(ctx, dy):
        return 2 * ctx.saved_tensors[0] * dy

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    attach(library, "square", None, backward, setup_context, public=True)
    square, x = torch.ops.adatape_square.square, torch.randn(3, requires_grad=True)
    square(x).sum().backward()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones(3))
        with pytest.raises(NotImplementedError, match=r"^square: expected .* got a dual level"):
            square(dual)
    library._destroy()


def test_all_ops_have_a_case():
    called = {"select", "gather", "read", "attention", "ffn", "norm"} | {"compact", "accumulate"}
    assert called == {name.partition(",")[0] for name in CASES}
