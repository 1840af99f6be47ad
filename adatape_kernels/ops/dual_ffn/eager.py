"""`dual_ffn` by the reference, on every device and in every dtype."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from adatape_kernels import reference
from adatape_kernels.op_types import FFN, Activation
from adatape_kernels.ops.dual_ffn.parameters import as_ffns
from adatape_kernels.ops.implementation import implementation


def _row_counts(inputs: int, tapes: int, bounds: Tensor | None) -> tuple[int, int]:
    """Return the numbers of input and tape rows; reads the device where it holds them."""
    if bounds is None:
        return inputs, tapes
    middle, end = bounds.tolist()
    return middle, end - middle


def check_row_counts(
    x: Tensor, num_input_rows: int | None, max_tape_rows: int, bounds: Tensor | None, *rest: Any
) -> None:
    """Refuse numbers of rows that x does not have; copies them to the host."""
    max_input_rows = len(x) if num_input_rows is None else num_input_rows
    inputs, tapes = _row_counts(max_input_rows, max_tape_rows, bounds)
    if not (0 <= inputs <= max_input_rows and 0 <= tapes and inputs + tapes <= len(x)):
        raise ValueError(
            f"num_input_rows: expected 0 <= num_input_rows <= num_rows <= {len(x)} (the rows of "
            f"x), got {inputs} and {inputs + tapes}"
        )


@implementation(checks_values=True)
def forward(
    x: Tensor,
    num_input_rows: int | None,
    max_tape_rows: int,
    bounds: Tensor | None,
    activation: Activation,
    *parameters: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the reference over the rows that are used; unused rows of the pre-activations are 0."""
    check_row_counts(x, num_input_rows, max_tape_rows, bounds)
    max_input_rows = len(x) if num_input_rows is None else num_input_rows
    inputs, tapes = _row_counts(max_input_rows, max_tape_rows, bounds)
    input_ffn, tape_ffn = as_ffns(parameters)
    y, hidden, tape_hidden = reference.dual_ffn(
        x, inputs, input_ffn, tape_ffn, num_rows=inputs + tapes, activation=activation
    )
    return (
        y,
        F.pad(hidden, (0, 0, 0, max_input_rows - inputs)),
        F.pad(tape_hidden, (0, 0, 0, max_tape_rows - tapes)),
    )


@implementation()
def backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    num_input_rows: int | None,
    bounds: Tensor | None,
    activation: Activation,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    """Run the reference over the rows that are used."""
    inputs, tapes = _row_counts(len(hidden), len(tape_hidden), bounds)
    input_ffn, tape_ffn = as_ffns(parameters)
    dx, dinput, dtape = reference.dual_ffn_bwd(
        dy, x, hidden[:inputs], tape_hidden[:tapes], input_ffn, tape_ffn, activation
    )
    return dx, *dinput, *(dtape or [x.new_empty(0) for _ in FFN._fields])
