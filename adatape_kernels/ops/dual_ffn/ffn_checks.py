"""What `dual_ffn` asks of the arguments of its public function."""

import torch
from torch import Tensor

from adatape_kernels.arguments import check_int, check_tensor, shown
from adatape_kernels.op_types import ACTIVATIONS, FFN


def check_activation(activation: str) -> None:
    """Raise ValueError if an activation's name is none of those that there are."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, got {shown(activation)}"
        )


def check_four(name: str, ffn: FFN) -> None:
    """Refuse what is not (w1, b1, w2, b2), all of them tensors."""
    if not isinstance(ffn, tuple | list):
        raise TypeError(f"{name}: expected (w1, b1, w2, b2), got {type(ffn).__name__}")
    if len(ffn) != 4:
        raise ValueError(f"{name}: expected (w1, b1, w2, b2), got {len(ffn)} of them")
    w1, b1, w2, b2 = ffn
    if (
        isinstance(w1, Tensor)
        and isinstance(b1, Tensor)
        and isinstance(w2, Tensor)
        and isinstance(b2, Tensor)
    ):
        return
    for field, given in zip(FFN._fields, ffn, strict=True):
        check_tensor(f"{name}.{field}", given)


def check_ffn(name: str, ffn: FFN, x: Tensor, gates: int) -> None:
    """Raise ValueError for parameters that do not fit x; `gates` is 2 for a GLU, else 1."""
    dim, dtype, device = x.shape[1], x.dtype, x.device
    hidden = ffn[0].shape[0] // gates if ffn[0].dim() else 0
    shapes = ((gates * hidden, dim), (gates * hidden,), (dim, hidden), (dim,))
    for field, shape, given in zip(FFN._fields, shapes, ffn, strict=True):
        if given.shape != shape or given.dtype != dtype or given.device != device:
            raise ValueError(
                f"{name}.{field}: expected {dtype} {shape} on {device} to "
                f"fit x, got {given.dtype} {tuple(given.shape)} on {given.device}"
            )


def checked_rows(name: str, count: int | Tensor, x: Tensor) -> int | Tensor:
    """Return a number of rows of x, on the host or on the device; refuse what is none."""
    if isinstance(count, Tensor):
        whole = not (count.is_floating_point() or count.is_complex() or count.dtype == torch.bool)
        if count.dim() != 0 or not whole or count.device != x.device:
            raise ValueError(
                f"{name}: expected an int or an integer scalar on {x.device}, "
                f"got {count.dtype} {tuple(count.shape)} on {count.device}"
            )
        return count
    number = check_int(name, count, lowest=None)
    if not 0 <= number <= x.shape[0]:
        raise ValueError(f"{name}: expected 0 to {x.shape[0]} (the rows of x), got {number}")
    return number
