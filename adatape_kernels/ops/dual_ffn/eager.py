"""`dual_ffn` by the reference, on every device and in every dtype."""

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
    x: Tensor,
    num_input_rows: int | None,
    max_tape_rows: int,
    bounds: Tensor | None,
    activation: Activation,
    *parameters: Tensor | None,
) -> None:
    """Refuse numbers of rows that x does not have; copies them to the host."""
    max_input_rows = len(x) if num_input_rows is None else num_input_rows
    inputs, tapes = _row_counts(max_input_rows, max_tape_rows, bounds)
    if bounds is not None:
        _, tape_ffn = as_ffns(parameters)
        given = inputs if num_input_rows is None else num_input_rows
        expected = inputs + tapes if tape_ffn is None else given
        if inputs != expected:
            raise ValueError(f"bounds: expected {expected} (num_input_rows) first, got {inputs}")
    if not (0 <= inputs <= max_input_rows and 0 <= tapes and inputs + tapes <= len(x)):
        raise ValueError(
            f"num_input_rows: expected 0 <= num_input_rows <= num_rows <= {len(x)} (the rows of "
            f"x), got {inputs} and {inputs + tapes}"
        )
    if tapes > max_tape_rows:
        raise ValueError(
            f"max_tape_rows: expected at least the {tapes} tape rows, got {max_tape_rows}"
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
    check_row_counts(x, num_input_rows, max_tape_rows, bounds, activation, *parameters)
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


@implementation(checks_values=True)
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
    check_row_counts(x, num_input_rows, len(tape_hidden), bounds, activation, *parameters)
    inputs, tapes = _row_counts(len(hidden), len(tape_hidden), bounds)
    input_ffn, tape_ffn = as_ffns(parameters)
    dx, dinput, dtape = reference.dual_ffn_bwd(
        dy, x, hidden[:inputs], tape_hidden[:tapes], input_ffn, tape_ffn, activation
    )
    return dx, *dinput, *(dtape or [x.new_empty(0) for _ in FFN._fields])
