"""The form "epilogue" of `dual_ffn`: the activation ends the first product, torch does the others.

hidden = x · w1ᵀ + b1,  act = act(hidden)        in one launch for both kinds of rows
y = act · w2ᵀ + b2                               torch's, for each kind
dhidden = act'(hidden) ⊙ (dy · w2),  act, db1    in one launch for each
dx = dhidden · w1,  dw1, dw2, db2                torch's, for each kind
"""

import enum
import functools

import torch
from torch import Tensor

from adatape_kernels.ops.device_facts import DeviceFacts, facts_of
from adatape_kernels.ops.dual_ffn import triton_up
from adatape_kernels.ops.dual_ffn.parameters import Parameters
from adatape_kernels.ops.dual_ffn.triton_cublas import slices, unused_rows
from adatape_kernels.ops.dual_ffn.triton_up import pairs, tiles_of
from adatape_kernels.ops.triton_specialization import dense

_MEMORY_SHARE = 0.87
"""The share of its memory's rate that a pass over the activations reaches."""
_SLOWER = 0.7
"""How much longer our product takes than torch's, in units of the chip's time for it; assumed.

It is 1 / s - 1 / t for the shares s and t of the chip's rate that they reach. Torch's reached 0.54
on an H200 where dim is 384 (benchmarks/results/nvidia-h200.csv, less the pass over 310 MB); ours
has to reach 0.39 then.
"""
_FLOPS_PER_BYTE = 206
"""The products' rate by the memory's, of an H200; that of an H100 is 295."""


class SavedBytes(enum.IntEnum):
    """Bytes of memory's traffic that the form saves an element of the activations, at 2 bytes."""

    FORWARD = 4
    """The pass that reads the pre-activation and writes the activation; here the product does."""
    BACKWARD = 8
    """The pass that reads two matrices and writes two."""


def pays(x: Tensor, parameters: Parameters, saved: SavedBytes) -> bool:
    """Return whether the form should take less time than "cublas".

    What it saves, and what its slower product loses, grow alike with rows and with the width of
    the activations, so that dim decides: the loss is 2 · dim · _SLOWER FLOPs an element. Tiles are
    the same, 128 × 128, and so is their tail. With few rows a launch a kind of rows is saved too.
    One block a multiprocessor cannot store while it multiplies: then nothing is saved.
    """
    shapes = tuple(w2.shape for w2 in parameters[2::4] if w2 is not None)
    return pays_on(facts_of(x.device), x.dtype, shapes, saved)


@functools.lru_cache(maxsize=256)
def pays_on(
    device: DeviceFacts, dtype: torch.dtype, w2: tuple[torch.Size, ...], saved: SavedBytes
) -> bool:
    """Return the same for second weights (dim, width) of these shapes on a device."""
    if tiles_of(dtype, w2, device).blocks == 1:
        return False  # so it is on all GPUs but those of compute capability 9.0
    saved_flops = saved * _FLOPS_PER_BYTE / _MEMORY_SHARE
    return 2 * w2[0][0] * _SLOWER <= saved_flops


def forward(
    x: Tensor,
    max_input_rows: int,
    max_tape_rows: int,
    bounds: Tensor | None,
    activation: str,
    parameters: Parameters,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the first product, and call torch's for each kind; returns y and pre-activations."""
    bounds = None if bounds is None else bounds.contiguous()
    max_rows = (max_input_rows, max_tape_rows)
    hidden, act = triton_up.forward(x, max_rows, bounds, activation, pairs(parameters), sliced=True)
    y = x.new_empty(*x.shape)
    for part, a in zip(slices(*max_rows, bounds, activation, parameters), act, strict=False):
        torch.addmm(part.ffn.b2, a, part.ffn.w2.mT, out=y[part.rows])
        if part.bounds is not None:
            y[part.rows].masked_fill_(unused_rows(part.rows, part.bounds), 0)
    y[max_input_rows + max_tape_rows :] = 0
    return y, *hidden


def backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    bounds: Tensor | None,
    activation: str,
    parameters: Parameters,
) -> tuple[Tensor, ...]:
    """Launch the first product's gradient, and call torch's products for each kind."""
    bounds = None if bounds is None else bounds.contiguous()
    hiddens = dense(hidden), dense(tape_hidden)
    ups = triton_up.backward(dy, hiddens, bounds, activation, pairs(parameters), sliced=True)
    dx = x.new_empty(*x.shape)
    grads: list[Tensor] = []
    max_rows = hidden.shape[0], tape_hidden.shape[0]
    parts = slices(*max_rows, bounds, activation, parameters)
    for part, dhidden, act, db1 in zip(parts, *ups, strict=False):
        dy_rows, x_rows = dy[part.rows], x[part.rows]
        if part.bounds is not None:
            # A product would multiply what stands there by zero, and NaN stays NaN.
            unused = unused_rows(part.rows, part.bounds)
            dy_rows, x_rows = dy_rows.masked_fill(unused, 0), x_rows.masked_fill(unused, 0)
        torch.mm(dhidden, part.ffn.w1, out=dx[part.rows])
        grads += dhidden.mT @ x_rows, db1, dy_rows.mT @ act, dy_rows.sum(0)
    dx[sum(max_rows) :] = 0
    return dx, *grads, *(x.new_empty(0) for _ in range(8 - len(grads)))
