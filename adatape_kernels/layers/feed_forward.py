"""Feed-forwards that differ between input rows and tape rows (SPEC 6)."""

from typing import TYPE_CHECKING

from torch import nn

from adatape_kernels import ops, reference
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.layers.torch_modules import xavier_linear
from adatape_kernels.reference import FFN


class DualFFN(nn.Module):
    """A GELU feed-forward for input rows and a GLU feed-forward for tape rows.

    Args:
        dim: width of a token.
        ffn_dim: hidden width for input rows; the modules linear1 and linear2.
        tape_ffn_dim: hidden width for tape rows; the modules tape_linear1 and tape_linear2. With 0
            tape rows pass the feed-forward of input rows, and these two modules do not exist.
        dropout: probability with which training drops an activation.

    Source: SPEC 6.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> x = ak.ElasticBatch.from_padded(torch.randn(2, 3, 8), tape_lens=torch.tensor([1, 0]))
        >>> ffn = ak.layers.DualFFN(dim=8, ffn_dim=16, tape_ffn_dim=4)
        >>> ffn(x).data.shape
        torch.Size([6, 8])
    """

    def __init__(self, dim: int, ffn_dim: int, tape_ffn_dim: int = 0, *, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.linear1, self.linear2 = xavier_linear(dim, ffn_dim), xavier_linear(ffn_dim, dim)
        if tape_ffn_dim:
            self.tape_linear1 = xavier_linear(dim, 2 * tape_ffn_dim)
            self.tape_linear2 = xavier_linear(tape_ffn_dim, dim)
        self.has_tape_ffn = tape_ffn_dim > 0

    @property
    def input_ffn(self) -> FFN:
        """The weights and biases for input rows, in the form that `ops.dual_ffn` takes.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.layers.DualFFN(dim=8, ffn_dim=16).input_ffn.w1.shape
            torch.Size([16, 8])
        """
        return FFN(self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias)

    @property
    def tape_ffn(self) -> FFN | None:
        """The weights and biases for tape rows; None when tape rows share those of input rows.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.layers.DualFFN(dim=8, ffn_dim=16, tape_ffn_dim=4).tape_ffn.w1.shape
            torch.Size([8, 8])
            >>> ak.layers.DualFFN(dim=8, ffn_dim=16).tape_ffn is None
            True
        """
        if not self.has_tape_ffn:
            return None
        first, second = self.tape_linear1, self.tape_linear2
        return FFN(first.weight, first.bias, second.weight, second.bias)

    def feed_forward(self, x: ElasticBatch) -> ElasticBatch:
        """Apply the feed-forwards alone, without what a subclass puts around them.

        Args:
            x: rows (rows, dim) of the parameters' dtype.

        Returns:
            A batch of the same layout and shape, whose unused rows are zero.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> layer = ak.layers.ElasticEncoderLayer(dim=8, num_heads=2, ffn_dim=16)
            >>> x = ak.ElasticBatch.from_padded(torch.randn(2, 3, 8))
            >>> layer.feed_forward(x).data.shape  # neither attention, nor norms, nor residuals
            torch.Size([6, 8])
        """
        if self.training and self.dropout > 0:
            end = None if x.num_used_rows is None else int(x.num_used_rows)
            y, _, _ = reference.dual_ffn(
                x.data,
                x.num_input_rows,
                self.input_ffn,
                self.tape_ffn,
                num_rows=end,
                dropout=self.dropout,
            )
        else:
            y = ops.dual_ffn(
                x.data, x.num_input_rows, self.input_ffn, self.tape_ffn, num_rows=x.num_used_rows
            )
        return x.with_data(y)

    def forward(self, x: ElasticBatch) -> ElasticBatch:
        """Apply the feed-forwards.

        Args:
            x: rows (rows, dim) of the parameters' dtype.

        Returns:
            A batch of the same layout and shape, whose unused rows are zero.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> ffn = ak.layers.DualFFN(dim=8, ffn_dim=16)
            >>> ffn(ak.ElasticBatch.from_padded(torch.zeros(1, 2, 8))).data.abs().sum().item()
            0.0
        """
        return self.feed_forward(x)

    if TYPE_CHECKING:
        __call__ = forward
