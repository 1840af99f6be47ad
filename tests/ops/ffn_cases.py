"""Calls of `dual_ffn` for its tests, and what they compare."""

import torch

from adatape_kernels import reference
from adatape_kernels.ops import FFN, FFN_PRODUCTS, ffn_products
from adatape_kernels.ops.op import meta, operation


def ffn(dim, hidden, gates, *, device, dtype=torch.float32):
    shapes = (gates * hidden, dim), (gates * hidden,), (dim, hidden), (dim,)
    return FFN(*(torch.randn(s, device=device).to(dtype) / s[-1] ** 0.5 for s in shapes))


def inputs(rows, *, device, dim=6, hidden=8, tape_hidden=5, dtype=torch.float32):
    """x, both parameter sets, and a gradient of the output."""
    like = dict(device=device, dtype=dtype)
    x, dy = (torch.randn(rows, dim, device=device).to(dtype) for _ in range(2))
    return x, ffn(dim, hidden, 1, **like), ffn(dim, tape_hidden, 2, **like), dy


def gradients(run, x, num_input_rows, input_ffn, tape_ffn, dy, num_rows=None):
    """y, dx, and the gradients of every parameter."""
    x = x.detach().requires_grad_()
    input_ffn = FFN(*(p.detach().requires_grad_() for p in input_ffn))
    tape_ffn = tape_ffn and FFN(*(p.detach().requires_grad_() for p in tape_ffn))
    y = run(x, num_input_rows, input_ffn, tape_ffn, num_rows=num_rows)
    grads = torch.autograd.grad(y, [x, *input_ffn, *(tape_ffn or ())], dy)
    return [y.detach(), *grads]


def by_reference(*args, **options):
    return reference.dual_ffn(*args, **options)[0]


def double(*values):
    return [
        x and FFN(*(p.double() for p in x)) if isinstance(x, FFN | None) else x.double()
        for x in values
    ]


def not_served(
    device,
    backend,
    products=FFN_PRODUCTS[0],
    counts="ints",
    on_device=False,
    two=True,
    dtype=torch.float32,
    **parameters,
):
    """For `absent_if`: why a backend does not serve the calls that a test's parameters make."""
    if backend != "triton" and products != FFN_PRODUCTS[0]:
        return "a form of the Triton backend"
    # With one feed-forward all rows are input rows, whose bound the host knows.
    on_host = not two or not (on_device is True or str(counts).endswith("scalars"))
    if backend is None or on_host:
        return None
    parameters = (meta(*shape, dtype=dtype) for shape in ((8, 6), (8,), (6, 8), (6,)) * 2)
    bounds = meta(2, dtype=torch.int64)
    with ffn_products(products):
        args = meta(9, 6, dtype=dtype), None, 9, bounds, "gelu_tanh", *parameters
        return operation("dual_ffn").refusal(backend, args, device)


def other_form_has_it(device, backend, products=FFN_PRODUCTS[0], dtype=torch.float32, **parameters):
    """For `absent_if`: in Triton's interpreter, which is slow, one form of the products a dtype.

    For tests of the activations, which are the same functions in both forms.
    """
    form = FFN_PRODUCTS[dtype == torch.float32]
    if device == "cpu" and backend == "triton" and products != form:
        return f"{form} has this dtype"
    return None
