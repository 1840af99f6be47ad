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
    return tiles_of(x.dtype, tuple([w.shape for w in w2]), device)


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


class Pairs(NamedTuple):
    """The parameters, in pairs, as kernels take them: dense."""

    w1: Pair
    b1: Pair
    w2: Pair
    b2: Pair


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
    parameters: Pairs,
    *,
    sliced: bool,
) -> UpForward:
    """Multiply x by w1ᵀ, add b1 and take the activation.

    `sliced` says that max_rows are the numbers of rows of each kind, only the last of which, at the
    end of the buffer, may be unused.
    """
    x, (w1, b1, w2, _) = dense(x), parameters
    (own_w1, tape_w1), (own_w2, tape_w2), (inputs, tapes) = w1, w2, max_rows
    (rows, dim), own_columns, tape_columns = x.shape, own_w1.shape[0], tape_w1.shape[0]
    widths = own_w2.shape[1], tape_w2.shape[1]
    hidden = x.new_empty(inputs, own_columns), x.new_empty(tapes, tape_columns)
    act = x.new_empty(inputs, widths[0]), x.new_empty(tapes, widths[1])
    facts = facts_of(x.device)
    tiles = up_tiles(x, w2, facts)
    in_desc = w_desc = tape_w_desc = None
    if tiles.descriptors and rows:
        block_m, block_n, block_k = _blocks(tiles)
        half = tape_columns // 2
        in_desc = _descriptor(x, [rows, dim], [block_m, block_k])
        w_desc = _descriptor(own_w1, [own_columns, dim], [block_n, block_k])
        tape_w_desc = _descriptor(tape_w1, [2, half, dim], [2, block_n // 2, block_k])
    launch(
        _dual_ffn_up_kernel,
        (_num_programs(rows, tiles, facts),),
        in_ptr=x,
        w_ptrs=w1,
        b_ptrs=b1,
        hidden_ptrs=hidden,
        dhidden_ptrs=None,
        act_ptrs=act,
        in_desc=in_desc,
        w_desc=w_desc,
        tape_w_desc=tape_w_desc,
        bounds_ptr=bounds,
        rows=rows,
        max_input_rows=inputs,
        max_tape_rows=tapes,
        dim=dim,
        widths=widths,
        ACTIVATION=activation,
        INPUTS=True,
        TAPES=True,
        BACKWARD=False,
        SLICED=sliced,
        **tiles.options,
    )
    return UpForward(hidden, act)


def backward(
    dy: Tensor,
    hidden: Pair,
    bounds: Tensor | None,
    activation: str,
    parameters: Pairs,
    *,
    sliced: bool,
) -> UpBackward:
    """Multiply dy by w2 and take the gradients through the activation and b1.

    Unused rows of dhidden and of act are zero if `sliced`, as above, and else undefined.
    """
    dy, w2 = dense(dy), parameters.w2
    (inputs, columns), (tapes, tape_columns) = hidden[0].shape, hidden[1].shape
    (rows, dim), width, tape_width = dy.shape, w2[0].shape[1], w2[1].shape[1]
    act = dy.new_empty(inputs, width), dy.new_empty(tapes, tape_width)
    dhidden = dy.new_empty(inputs, columns), dy.new_empty(tapes, tape_columns)
    facts = facts_of(dy.device)
    tiles = up_tiles(dy, w2, facts)
    block_m, block_n, block_k = _blocks(tiles)
    # The sums of dhidden over the rows of each row of tiles, added up below in their order.
    db1 = (
        dy.new_empty(num_blocks(inputs, block_m), columns, dtype=torch.float32),
        dy.new_empty(num_blocks(tapes, block_m), tape_columns, dtype=torch.float32),
    )
    in_desc = w_desc = tape_w_desc = None
    if tiles.descriptors and rows:
        in_desc = _descriptor(dy, [rows, dim], [block_m, block_k])
        w_desc = _descriptor(w2[0], [dim, width], [block_k, block_n])
        tape_w_desc = _descriptor(w2[1], [dim, tape_width], [block_k, block_n])
    # Each kind by itself: for both at once the registers of two blocks do not suffice.
    for of_inputs in (True, False) if tape_width else (True,):
        launch(
            _dual_ffn_up_kernel,
            (_num_programs(rows, tiles, facts),),
            in_ptr=dy,
            w_ptrs=w2,
            b_ptrs=db1,
            hidden_ptrs=hidden,
            dhidden_ptrs=dhidden,
            act_ptrs=act,
            in_desc=in_desc,
            w_desc=w_desc,
            tape_w_desc=tape_w_desc,
            bounds_ptr=bounds,
            rows=rows,
            max_input_rows=inputs,
            max_tape_rows=tapes,
            dim=dim,
            widths=(width, tape_width),
            ACTIVATION=activation,
            INPUTS=of_inputs,
            TAPES=not of_inputs,
            BACKWARD=True,
            SLICED=sliced,
            **tiles.options,
        )
    own_sum, tape_sum = (parts.sum(0).to(dy.dtype) for parts in db1)
    return UpBackward(dhidden, act, (own_sum, tape_sum))


def _num_programs(rows: int, tiles: UpTiles, facts: DeviceFacts) -> int:
    """Return how many programs walk the tiles; none if there are no rows."""
    return tiles.blocks * facts.multiprocessors if rows else 0


def _descriptor(x: Tensor, shape: list[int], block: list[int]) -> Any:
    """Return a kernel's descriptor of a dense tensor, seen in this shape; None of an empty one.

    Triton's constructor would check that blocks are powers of two, and rows are dense and begin at
    multiples of 16 bytes. This holds of all tiles that take descriptors, and checking it for each
    of three operands would take as long on the host as all else that is done for a launch.
    """
    if 0 in shape:
        return None
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.block_shape = x, shape, block
    rows, columns = shape[-2:]
    descriptor.strides = [columns, 1] if len(shape) == 2 else [rows * columns, columns, 1]
    return descriptor


def _blocks(tiles: UpTiles) -> tuple[int, int, int]:
    options = tiles.options
    return options["BLOCK_M"], options["BLOCK_N"], options["BLOCK_K"]


def pairs(parameters: Parameters) -> Pairs:
    """Return w1, b1, w2 and b2 of both kinds; of no width where there is no tape feed-forward."""
    w1, b1, w2, b2, *tape_ffn = [dense(p) for p in parameters if p is not None]
    tape_w1, tape_b1, tape_w2, tape_b2 = tape_ffn or (w1[:0], b1[:0], w2[:, :0], b2)
    return Pairs((w1, tape_w1), (b1, tape_b1), (w2, tape_w2), (b2, tape_b2))
