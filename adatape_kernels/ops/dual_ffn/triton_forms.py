"""`dual_ffn` in Triton: a call goes to one of two forms, "cublas" and "grouped" (products.py)."""

from typing import Any

from torch import Tensor

from adatape_kernels.ops.device_facts import DeviceFacts
from adatape_kernels.ops.dual_ffn import triton_cublas, triton_grouped
from adatape_kernels.ops.dual_ffn.products import chosen_products
from adatape_kernels.ops.triton_runtime import kernel


def _serves(num_input_rows: int | None) -> str | None:
    """State which calls are served: "cublas" cuts the rows, so the host must know where."""
    if chosen_products() == "cublas" and num_input_rows is None:
        return 'ffn_products("cublas") takes num_input_rows on the host only'
    return None


def _forward_limits(
    device: DeviceFacts, x: Tensor, num_input_rows: int | None, *rest: Any
) -> str | None:
    return _serves(num_input_rows)


def _backward_limits(
    device: DeviceFacts, dy: Any, x: Any, h: Any, t: Any, num_input_rows: int | None, *rest: Any
) -> str | None:
    return _serves(num_input_rows)


@kernel(_forward_limits)
def forward(
    x: Tensor,
    num_input_rows: int | None,
    max_tape_rows: int,
    bounds: Tensor | None,
    activation: str,
    *parameters: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and both pre-activations."""
    if num_input_rows is None:
        return triton_grouped.forward(x, len(x), max_tape_rows, bounds, activation, parameters)
    form = triton_grouped if chosen_products() == "grouped" else triton_cublas
    return form.forward(x, num_input_rows, max_tape_rows, bounds, activation, parameters)


@kernel(_backward_limits)
def backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    num_input_rows: int | None,
    bounds: Tensor | None,
    activation: str,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the gradients of x and of the parameters."""
    grouped = num_input_rows is None or chosen_products() == "grouped"
    form = triton_grouped if grouped else triton_cublas
    return form.backward(dy, x, hidden, tape_hidden, bounds, activation, parameters)
