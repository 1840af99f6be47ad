"""The eight parameters of `dual_ffn` as its schema has them: one after another, tape ones last."""

from typing import cast

from torch import Tensor

from adatape_kernels.op_types import FFN

Parameters = tuple[Tensor | None, ...]


def as_ffns(parameters: Parameters) -> tuple[FFN, FFN | None]:
    """Return those for input rows and, if there are any, those for tape rows."""
    given = cast(tuple[Tensor, ...], parameters)
    own, of_tape = given[:4], given[4:]
    return FFN(*own), None if any(p is None for p in of_tape) else FFN(*of_tape)
