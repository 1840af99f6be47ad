"""Multi-head self-attention over elastic batches (SPEC 6)."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from adatape_kernels import ops, reference
from adatape_kernels.layers.conversion import (
    copy_parameters,
    differences_of_attention,
    refuse_unknown,
)
from adatape_kernels.layers.elastic_module import ElasticModule
from adatape_kernels.layers.layer_checks import check_rate, check_size
from adatape_kernels.layers.row_kinds import Rows, as_batch, in_kind


class ElasticAttention(ElasticModule):
    """Multi-head self-attention within each example, over its input rows and its tape rows.

    The parameters are named as in `torch.nn.MultiheadAttention`: in_proj_weight (3 · dim, dim),
    in_proj_bias (3 · dim,) and out_proj, a linear module from dim to dim.

    Args:
        dim: width of a token.
        num_heads: number of heads; each takes dim / num_heads features.
        dropout: probability with which training drops an attention weight.

    Raises:
        ValueError: dim or num_heads is less than 1, num_heads does not divide dim, or dropout is no
            probability.
        TypeError: an argument is of another type altogether.

    Source: SPEC 6.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> attention = ak.layers.ElasticAttention(dim=8, num_heads=2)
        >>> x = ak.ElasticBatch.from_padded(torch.randn(2, 3, 8))
        >>> attention(x).data.shape
        torch.Size([6, 8])
    """

    def __init__(self, dim: int, num_heads: int, *, dropout: float = 0.0):
        super().__init__()
        dim, num_heads = check_size("dim", dim), check_size("num_heads", num_heads)
        check_rate("dropout", dropout)
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}")
        self.dim = dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        for weight in (*self.in_proj_weight.detach().chunk(3), self.out_proj.weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.out_proj.bias)

    @classmethod
    def from_torch(cls, attention: nn.MultiheadAttention) -> "ElasticAttention":
        """Make a module that computes what torch's attention does, on copies of its parameters.

        The copy has the same dropout rate, dtype, device and mode, training or not. `batch_first`
        plays no part, since an elastic batch has neither order.

        Raises:
            ValueError: the attention has something that this module does not have, such as kdim or
                add_bias_kv, hooks or parametrisations; all of it is named.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            >>> ours, x = ak.layers.ElasticAttention.from_torch(theirs), torch.randn(3, 5, 8)
            >>> y, _ = ours(ak.ElasticBatch.from_padded(x)).to_padded()
            >>> torch.allclose(y, theirs(x, x, x)[0], atol=1e-6)
            True
        """
        refuse_unknown("attention", attention, differences_of_attention(attention))
        weight = attention.in_proj_weight
        with torch.device(weight.device):
            ours = cls(attention.embed_dim, attention.num_heads, dropout=attention.dropout)
        copy_parameters(attention, ours)
        return ours.train(attention.training)

    def forward(self, x: Rows) -> Rows:
        """Attend within each example.

        Args:
            x: an ElasticBatch, a Tensor (batch, seqlen, dim), a pair (Tensor, mask) or a jagged
                Tensor, of the parameters' dtype; a mask is True where a row is valid.

        Returns:
            The same kind, layout and shape; unused rows and padding are zero.

        Raises:
            TypeError: x is none of these.
            ValueError: a mask does not match, or a jagged tensor is not a contiguous one.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> attention = ak.layers.ElasticAttention(8, 2)
            >>> mask = torch.tensor([[True, True, True], [True, False, False]])
            >>> x = ak.ElasticBatch.from_padded(torch.randn(2, 3, 8), mask)
            >>> attention(x).lens.tolist()
            [3, 1]
        """
        batch = as_batch(x, self.dim)
        rows, dim = batch.data.shape
        qkv = F.linear(batch.data, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.view(rows, 3, self.num_heads, dim // self.num_heads)
        if self.training and self.dropout > 0:
            q, k, v = qkv.unbind(1)
            out, _ = reference.elastic_attention(
                q, k, v, batch.cu_inputs, batch.cu_tapes, dropout=self.dropout
            )
        else:
            out = ops.elastic_attention_qkvpacked(
                qkv, batch.cu_inputs, batch.cu_tapes, max_rows=batch.max_rows
            )
        y = batch.with_data(batch.clear_unused(self.out_proj(out.view(rows, dim))))
        return in_kind(y, x, batch)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        """Return the width of a token and the number of heads, as a printed module shows them.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.layers.ElasticAttention(8, 2).extra_repr()
            'dim=8, num_heads=2'
        """
        return f"dim={self.dim}, num_heads={self.num_heads}"
