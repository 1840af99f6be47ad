"""The residual stream between two layers, to which the next norm adds in its own pass (SPEC 6)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.layers.torch_modules import add_norm, is_plain


class OpenSum(NamedTuple):
    """A batch to which the last branch is yet to be added.

    A layer that norms first ends with a sum, and the next one begins with the norm of it. An
    encoder hands both parts on, so that one op reads and writes each row once, and its backward
    adds the gradients of both, where autograd would do so in a pass of its own.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> from adatape_kernels.layers.open_sum import OpenSum
        >>> batch = ak.ElasticBatch.from_padded(torch.ones(1, 2, 4))
        >>> OpenSum(batch, torch.ones(2, 4)).closed().data.tolist()
        [[2.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]]
    """

    batch: ElasticBatch
    branch: Tensor | None
    """(rows, dim), or None where nothing is to be added."""

    def closed(self) -> ElasticBatch:
        """Return the batch of the sum."""
        batch, branch = self
        return batch if branch is None else batch.with_data(batch.data + branch)

    def normed(self, norm: nn.LayerNorm) -> tuple[ElasticBatch, Tensor]:
        """Return the batch of the sum, and the norm (rows, dim) of its rows.

        A plain norm is the op's, whether there is a branch or not, forward and backward. So who
        closes the sum beforehand, as a checkpoint or a hook between two layers makes the encoder
        do, has the same bits.

        Args:
            norm: a module, which is called if it is not plain.
        """
        batch, branch = self
        x = batch.data
        # The op's sum has the dtype of the stream, which a wider branch would change.
        if branch is not None and torch.promote_types(x.dtype, branch.dtype) != x.dtype:
            return OpenSum(self.closed(), None).normed(norm)
        if branch is None:
            if not is_plain(norm, nn.LayerNorm):
                return batch, norm(x)
            branch = _nothing_to_add(x)
        total, normed = add_norm(x, branch, norm)
        return batch.with_data(total), normed


def _nothing_to_add(x: Tensor) -> Tensor:
    """Return a branch (rows, dim) that changes no bit of `x`, all of whose rows are one in memory.

    It is of minus zeros, since a plus zero would turn minus zeros in `x` into its like.
    """
    return x.new_full((1, x.shape[1]), -0.0).expand(x.shape)
