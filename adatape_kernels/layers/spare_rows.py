"""Spare rows, by which bfloat16 products on a CPU meet few numbers of rows.

torch has oneDNN compute them, which compiles code for each number of rows that a product has and
keeps some of it, while nearly every ragged batch has a number of its own. Spare rows belong to no
example and stand behind all others. They are computed like these, instead of being cleared, which
would take a pass over the batch: attention reads none of them, no result contains one, and so the
gradient that reaches them is zero.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.layers.torch_modules import is_bare, is_plain

PARTS = 64
"""At most one spare row comes to so many rows of a large batch."""
LEAST_MULTIPLE = 16
"""What the number of rows of a small batch is made a multiple of."""


def rounded_rows(rows: int) -> int:
    """Return the number of rows, at least as many as are given, that a batch is computed with.

    It is a multiple of 16 up to 2,047 rows, of 32 up to 4,095, and so on, so that there are 64
    different ones between a number and its double, and at most a 64th of a large batch is spare.

    Args:
        rows: 0 or more, of which 0 stays 0.
    """
    multiple = max(LEAST_MULTIPLE, 1 << max(0, (rows // PARTS).bit_length() - 1))
    return -(-rows // multiple) * multiple


def keeps_code_by_rows(x: Tensor) -> bool:
    """Return whether a product of these rows is one for which oneDNN keeps code.

    It is not within a graph of torch's compiler, whose numbers of rows need not be known.

    Args:
        x: (rows, dim), the left operand, before autocast gives it another dtype.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    dtype = x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return dtype == torch.bfloat16 and isinstance(x.shape[0], int)


def has_one_length(batch: ElasticBatch) -> bool:
    """Return whether all examples have as many rows, so that their number alone says how many."""
    return batch.max_tapes == 0 and batch.min_inputs == batch.max_inputs


def with_zero_rows(x: Tensor, rows: int) -> Tensor:
    """Return `x` (rows, dim) with zeros behind, up to a number of rows.

    The gradient of `x` is a view of that of the result. That of `F.pad` would be a copy.
    """
    missing = rows - x.shape[0]
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def with_spare_rows(batch: ElasticBatch) -> ElasticBatch:
    """Return an exact batch with spare rows, which its layout does not know of.

    Args:
        batch: any batch; in capacity mode its number of rows is fixed already, and it is returned.
    """
    if not batch.exact:
        return batch
    return batch.with_data(with_zero_rows(batch.data, rounded_rows(batch.data.shape[0])))


def without_spare_rows(batch: ElasticBatch, rows: int) -> ElasticBatch:
    """Return a batch of its first rows, which are all but the spare ones."""
    return batch if batch.data.shape[0] == rows else batch.with_data(batch.data[:rows])


def computed_with_spare_rows(
    apply: Callable[[ElasticBatch], ElasticBatch], batch: ElasticBatch
) -> ElasticBatch:
    """Return what a function of a batch makes of it, computed with spare rows.

    Args:
        apply: computes each row of its result from those of the same example.
        batch: any batch.
    """
    return without_spare_rows(apply(with_spare_rows(batch)), batch.data.shape[0])


def called_with_spare_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a module makes of rows, computed with spare rows if all parts are torch's own.

    Args:
        module: a linear module, a GLU, or a sequence of them; any other is called with `x` alone.
        x: (rows, features).
    """
    if not keeps_code_by_rows(x) or not _computes_each_row(module):
        return module(x)
    return module(with_zero_rows(x, rounded_rows(x.shape[0])))[: x.shape[0]]


def _computes_each_row(module: nn.Module) -> bool:
    if type(module) is nn.Sequential:
        return is_bare(module) and all(map(_computes_each_row, module))
    return is_plain(module, nn.Linear) or (type(module) is nn.GLU and is_bare(module))
