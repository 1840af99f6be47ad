"""Checks of what layers are made of and called with."""

from typing import Any

from torch import Tensor

from adatape_kernels.arguments import check_int, check_number, check_tensor
from adatape_kernels.elastic import ElasticBatch

# Rows are numbered by int32, and products of several sizes should not leave torch's 64 bits.
_MOST_SIZE = (1 << 31) - 1


def check_size(name: str, value: Any, lowest: int = 1) -> int:
    """Return a number of rows, features or heads as an int; refuse what is none.

    Args:
        name: the argument's name in an error.
        value: anything.
        lowest: the smallest that it may be.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is less than `lowest`, or more than int32 counts.
    """
    return check_int(name, value, lowest, _MOST_SIZE)


def check_rate(name: str, value: Any, *, less_than_one: bool = False) -> None:
    """Refuse what is no probability.

    Args:
        name: the argument's name in an error.
        value: anything.
        less_than_one: whether 1 is refused, since what is kept is divided by how much that is.

    Raises:
        TypeError: it is no number.
        ValueError: it is less than 0 or more than 1, or 1 where that is refused.
    """
    check_number(name, value, 0, 1)
    if less_than_one and value == 1:
        raise ValueError(f"{name}: expected less than 1, got {value}")


def check_batch(x: Any) -> None:
    """Refuse what is no elastic batch.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(x, ElasticBatch):
        raise TypeError(f"x: expected an ElasticBatch, got {type(x).__name__}")


def checked_bank(bank: Tensor | None, query: Tensor) -> Tensor:
    """Return the bank, which has to fit the query.

    Raises:
        TypeError: the bank is no tensor.
        ValueError: there is no bank, or its shape does not fit the query's.
    """
    if bank is None:
        raise ValueError("bank: expected a tensor, as this reader has no bank, got None")
    check_tensor("bank", bank)
    fits = bank.dim() in (2, 3) and bank.shape[-1] == query.shape[1]
    if not fits or (bank.dim() == 3 and bank.shape[0] != query.shape[0]):
        raise ValueError(
            f"bank: expected ([{query.shape[0]},] bank_size, {query.shape[1]}), "
            f"got {tuple(bank.shape)}"
        )
    return bank
