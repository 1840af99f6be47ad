"""`dual_ffn` in Triton: a call goes to one of three forms (products.py)."""

from types import ModuleType
from typing import Any

from torch import Tensor

from adatape_kernels.ops.device_facts import DeviceFacts
from adatape_kernels.ops.dual_ffn import triton_cublas, triton_epilogue, triton_grouped
from adatape_kernels.ops.dual_ffn.parameters import Parameters
from adatape_kernels.ops.dual_ffn.products import chosen_products, note_form
from adatape_kernels.ops.dual_ffn.triton_epilogue import SavedBytes
from adatape_kernels.ops.triton_runtime import kernel


def _serves(num_input_rows: int | None) -> str | None:
    """State which calls are served: torch's products cut the rows, so the host must know where."""
    form = chosen_products()
    if form in ("cublas", "epilogue") and num_input_rows is None:
        return f'ffn_products("{form}") takes num_input_rows on the host only'
    return None


def _forward_limits(
    device: DeviceFacts, x: Tensor, num_input_rows: int | None, *rest: Any
) -> str | None:
    return _serves(num_input_rows)


def _backward_limits(
    device: DeviceFacts, dy: Any, x: Any, h: Any, t: Any, num_input_rows: int | None, *rest: Any
) -> str | None:
    return _serves(num_input_rows)


def _form(
    x: Tensor, num_input_rows: int | None, parameters: Parameters, saved: SavedBytes
) -> ModuleType:
    """Return the form that serves a call, and note it."""
    name = "grouped" if num_input_rows is None else chosen_products()
    if name is None:
        name = "epilogue" if triton_epilogue.pays(x, parameters, saved) else "cublas"
    note_form(name)
    return _FORMS[name]


_FORMS = {"cublas": triton_cublas, "epilogue": triton_epilogue, "grouped": triton_grouped}


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
    form = _form(x, num_input_rows, parameters, SavedBytes.FORWARD)
    max_input_rows = x.shape[0] if num_input_rows is None else num_input_rows
    return form.forward(x, max_input_rows, max_tape_rows, bounds, activation, parameters)


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
    form = _form(x, num_input_rows, parameters, SavedBytes.BACKWARD)
    return form.backward(dy, x, hidden, tape_hidden, bounds, activation, parameters)
