"""Launches of the first product of `dual_ffn` with what follows it (triton_up_kernel.py)."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatape_kernels.ops.device_facts import KIB, DeviceFacts, facts_of
from adatape_kernels.ops.dual_ffn.parameters import Parameters
from adatape_kernels.ops.dual_ffn.triton_up_kernel import _dual_ffn_up_kernel
from adatape_kernels.ops.triton_runtime import INSTALLED, launch, num_blocks
from adatape_kernels.ops.triton_specialization import dense

if INSTALLED:
    from triton.tools.tensor_descriptor import TensorDescriptor

Pair = tuple[Tensor, Tensor]
"""What belongs to the input rows, and the same of the tape rows."""


class UpTiles(NamedTuple):
    """How the product is cut into tiles, and who takes them."""

    options: dict[str, int]
    """Those of the launch: the tile's shape, warps, stages, registers."""
    blocks: int
    """How many blocks of a multiprocessor walk the tiles."""
    descriptors: bool
    """Whether tensor descriptors bring the operands."""


def up_tiles(x: Tensor, w2: Sequence[Tensor], device: DeviceFacts) -> UpTiles:
    """Return the tiles for rows of x that meet these second weights on this device."""
    return tiles_of(x.dtype, tuple(w.shape for w in w2), device)


@functools.lru_cache(maxsize=256)
def tiles_of(dtype: torch.dtype, shapes: tuple[torch.Size, ...], device: DeviceFacts) -> UpTiles:
    """Return the tiles, by dtype, by device, and by whether 16 divides all widths.

    Otherwise each element of a row is read by itself, and wide tiles would spill registers.
    """
    divided = all(size % 16 == 0 for shape in shapes for size in shape)
    if dtype == torch.float32:
        block_m, num_warps = (64, 4) if divided else (32, 8)
        options = dict(BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=16, num_warps=num_warps, num_stages=3)
        return UpTiles(options, blocks=1, descriptors=False)
    # Where one block walks the tiles a thread may have all the registers that it can name. Unless
    # it is told so, ptxas spills a few to make room for a second block, which does not come.
    if not divided:
        options = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3)
        return UpTiles(dict(**options, maxnreg=255), blocks=1, descriptors=False)
    options = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3)
    if device.capability < (9, 0):
        return UpTiles(dict(**options, maxnreg=255), blocks=1, descriptors=False)
    if device.capability[0] != 9 or device.shared_memory_per_block < 227 * KIB:
        return UpTiles(dict(**options, maxnreg=255), blocks=1, descriptors=True)
    # Two blocks of 112 KiB and 256 times 128 registers fit a multiprocessor. Code for 10.0 would
    # spill in so few.
    return UpTiles(dict(**options, maxnreg=128), blocks=2, descriptors=True)


class UpForward(NamedTuple):
    """What the forward writes, of both kinds of rows."""

    hidden: Pair
    """Pre-activations, zero in unused rows."""
    act: Pair
    """Activations, undefined in unused rows."""


class UpBackward(NamedTuple):
    """What the backward writes, of both kinds of rows."""

    dhidden: Pair
    act: Pair
    db1: Pair


def forward(
    x: Tensor,
    max_rows: tuple[int, int],
    bounds: Tensor | None,
    activation: str,
    parameters: Parameters,
    *,
    sliced: bool,
) -> UpForward:
    """Multiply x by w1ᵀ, add b1 and take the activation.

    `sliced` says that max_rows are the numbers of rows of each kind, only the last of which, at the
    end of the buffer, may be unused.
    """
    x, (w1, b1, w2, _) = dense(x), pairs(parameters)
    inputs, tapes = max_rows
    hidden = x.new_empty(inputs, w1[0].shape[0]), x.new_empty(tapes, w1[1].shape[0])
    act = x.new_empty(inputs, w2[0].shape[1]), x.new_empty(tapes, w2[1].shape[1])
    tiles = up_tiles(x, w2, facts_of(x.device))
    descriptors = _no_descriptors
    if tiles.descriptors and len(x):
        block_m, block_n, block_k = _blocks(tiles)
        tape_w1 = w1[1].view(2, w1[1].shape[0] // 2, x.shape[1])
        descriptors = _descriptors(
            (x, [block_m, block_k]),
            (w1[0], [block_n, block_k]),
            (tape_w1, [2, block_n // 2, block_k]),
        )
    _launch(
        x,
        max_rows,
        bounds,
        tiles,
        w_ptrs=w1,
        b_ptrs=b1,
        hidden_ptrs=hidden,
        dhidden_ptrs=None,
        act_ptrs=act,
        **descriptors,
        ACTIVATION=activation,
        INPUTS=True,
        TAPES=True,
        BACKWARD=False,
        SLICED=sliced,
    )
    return UpForward(hidden, act)


def backward(
    dy: Tensor,
    hidden: Pair,
    bounds: Tensor | None,
    activation: str,
    parameters: Parameters,
    *,
    sliced: bool,
) -> UpBackward:
    """Multiply dy by w2 and take the gradients through the activation and b1.

    Unused rows of dhidden and of act are zero if `sliced`, as above, and else undefined.
    """
    dy, (_, _, w2, _) = dense(dy), pairs(parameters)
    max_rows = inputs, tapes = hidden[0].shape[0], hidden[1].shape[0]
    act = dy.new_empty(inputs, w2[0].shape[1]), dy.new_empty(tapes, w2[1].shape[1])
    dhidden = dy.new_empty(*hidden[0].shape), dy.new_empty(*hidden[1].shape)
    tiles = up_tiles(dy, w2, facts_of(dy.device))
    block_m, block_n, block_k = _blocks(tiles)
    # The sums of dhidden over the rows of each row of tiles, added up below in their order.
    db1 = _pair(
        h.new_empty(num_blocks(len(h), block_m), h.shape[1], dtype=torch.float32) for h in hidden
    )
    descriptors = _no_descriptors
    if tiles.descriptors and len(dy):
        w_block = [block_k, block_n]
        descriptors = _descriptors((dy, [block_m, block_k]), (w2[0], w_block), (w2[1], w_block))
    # Each kind by itself: for both at once the registers of two blocks do not suffice.
    for of_inputs in (True, False) if w2[1].shape[1] else (True,):
        _launch(
            dy,
            max_rows,
            bounds,
            tiles,
            w_ptrs=w2,
            b_ptrs=db1,
            hidden_ptrs=hidden,
            dhidden_ptrs=dhidden,
            act_ptrs=act,
            **descriptors,
            ACTIVATION=activation,
            INPUTS=of_inputs,
            TAPES=not of_inputs,
            BACKWARD=True,
            SLICED=sliced,
        )
    return UpBackward(dhidden, act, _pair(parts.sum(0).to(dy.dtype) for parts in db1))


def _launch(
    rows: Tensor,
    max_rows: tuple[int, int],
    bounds: Tensor | None,
    tiles: UpTiles,
    *,
    act_ptrs: Pair,
    **arguments: Any,
) -> None:
    if not len(rows):
        return
    max_input_rows, max_tape_rows = max_rows
    act, tape_act = act_ptrs
    launch(
        _dual_ffn_up_kernel,
        (tiles.blocks * facts_of(rows.device).multiprocessors,),
        in_ptr=rows,
        act_ptrs=act_ptrs,
        **arguments,
        bounds_ptr=bounds,
        rows=len(rows),
        max_input_rows=max_input_rows,
        max_tape_rows=max_tape_rows,
        dim=rows.shape[1],
        widths=(act.shape[1], tape_act.shape[1]),
        **tiles.options,
    )


_no_descriptors: dict[str, Any] = dict(in_desc=None, w_desc=None, tape_w_desc=None)


def _descriptors(*described: tuple[Tensor, list[int]]) -> dict[str, Any]:
    """Return the kernel's descriptors of these tensors, by these blocks; None of an empty one."""
    made = (TensorDescriptor.from_tensor(x, block) if x.numel() else None for x, block in described)
    return dict(zip(_no_descriptors, made, strict=True))


def _blocks(tiles: UpTiles) -> tuple[int, int, int]:
    options = tiles.options
    return options["BLOCK_M"], options["BLOCK_N"], options["BLOCK_K"]


def _pair(tensors: Any) -> Pair:
    of_inputs, of_tape = tensors
    return of_inputs, of_tape


def pairs(parameters: Parameters) -> list[Pair]:
    """Return w1, b1, w2 and b2 of both kinds; of no width where there is no tape feed-forward."""
    w1, b1, w2, b2, *tape_ffn = (dense(p) for p in parameters if p is not None)
    return list(zip((w1, b1, w2, b2), tape_ffn or (w1[:0], b1[:0], w2[:, :0], b2), strict=True))
