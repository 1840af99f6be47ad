"""Feed-forwards that differ between input rows and tape rows (SPEC 6)."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adatape_kernels import ops
from adatape_kernels.activations import activate
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.layers.elastic_module import ElasticModule
from adatape_kernels.layers.layer_checks import check_batch, check_rate, check_size
from adatape_kernels.layers.row_kinds import Rows, as_batch, in_kind
from adatape_kernels.layers.spare_rows import keeps_code_by_rows, rounded_rows, with_zero_rows
from adatape_kernels.layers.torch_modules import bias_of, is_plain, xavier_linear
from adatape_kernels.op_types import FFN, Activation
from adatape_kernels.ops.dual_ffn import check_activation


class DualFFN(ElasticModule):
    """A feed-forward for input rows and a GLU feed-forward for tape rows.

    One op computes both, as long as the linear modules are plain. A linear module that was replaced
    (an adapter, a quantised one), or that has hooks or parametrisations, is called instead, on the
    rows that it is there for.

    Args:
        dim: width of a token.
        ffn_dim: hidden width for input rows; the modules linear1 and linear2.
        tape_ffn_dim: hidden width for tape rows; the modules tape_linear1 and tape_linear2. With 0
            tape rows pass the feed-forward of input rows, and these two modules do not exist.
        dropout: probability with which training drops an activation.
        activation: that of input rows: "gelu_tanh", "gelu" (the exact form) or "relu".

    Raises:
        ValueError: a width is too small, dropout is no probability, or the activation is none of
            these.
        TypeError: an argument is of another type altogether.

    Source: SPEC 6.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> x = ak.ElasticBatch.from_padded(torch.randn(2, 3, 8), tape_lens=torch.tensor([1, 0]))
        >>> ffn = ak.layers.DualFFN(dim=8, ffn_dim=16, tape_ffn_dim=4)
        >>> ffn(x).data.shape
        torch.Size([6, 8])
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        tape_ffn_dim: int = 0,
        *,
        dropout: float = 0.0,
        activation: Activation = "gelu_tanh",
    ):
        super().__init__()
        dim, ffn_dim = check_size("dim", dim), check_size("ffn_dim", ffn_dim)
        tape_ffn_dim = check_size("tape_ffn_dim", tape_ffn_dim, 0)
        check_rate("dropout", dropout)
        check_activation(activation)
        self.dropout = dropout
        self.activation: Activation = activation
        self.dim = dim
        self.linear1, self.linear2 = xavier_linear(dim, ffn_dim), xavier_linear(ffn_dim, dim)
        if tape_ffn_dim:
            self.tape_linear1 = xavier_linear(dim, 2 * tape_ffn_dim)
            self.tape_linear2 = xavier_linear(tape_ffn_dim, dim)
        self.has_tape_ffn = tape_ffn_dim > 0

    @property
    def input_ffn(self) -> FFN:
        """The weights and biases for input rows, in the form that `ops.dual_ffn` takes.

        They are those of plain modules; a module that does more is to be called.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.layers.DualFFN(dim=8, ffn_dim=16).input_ffn.w1.shape
            torch.Size([16, 8])
        """
        return _ffn(self.linear1, self.linear2)

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
        return _ffn(self.tape_linear1, self.tape_linear2)

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
        check_batch(x)
        input_ffn, tape_ffn = self._plain_ffns()
        if input_ffn is None or (self.training and self.dropout > 0):
            return x.with_data(self._by_modules(x))
        if tape_ffn is not None and x.exact and x.min_inputs < x.max_inputs:
            if keeps_code_by_rows(x.data):
                return x.with_data(self._with_spare_rows(x, input_ffn, tape_ffn))
        y = ops.dual_ffn(
            x.data,
            x.num_input_rows,
            input_ffn,
            tape_ffn,
            num_rows=x.num_used_rows,
            activation=self.activation,
        )
        return x.with_data(y)

    def _with_spare_rows(self, x: ElasticBatch, input_ffn: FFN, tape_ffn: FFN) -> Tensor:
        """Return what the op does, computed with spare rows of either kind."""
        inputs, tape = x.data.split([x.num_input_rows, x.data.shape[0] - x.num_input_rows])
        more_inputs = with_zero_rows(inputs, rounded_rows(len(inputs)))
        more_tape = with_zero_rows(tape, rounded_rows(len(tape)))
        rows, num_inputs = torch.cat([more_inputs, more_tape]), len(more_inputs)
        y = ops.dual_ffn(rows, num_inputs, input_ffn, tape_ffn, activation=self.activation)
        of_inputs, of_tape = y.split([num_inputs, len(more_tape)])
        return torch.cat([of_inputs[: len(inputs)], of_tape[: len(tape)]])

    def _plain_ffns(self) -> tuple[FFN | None, FFN | None]:
        """Return `input_ffn` and `tape_ffn`; both are None if a linear module is not plain."""
        input_ffn, tape_ffn = _plain_ffn(self.linear1, self.linear2), None
        if self.has_tape_ffn:
            tape_ffn = _plain_ffn(self.tape_linear1, self.tape_linear2)
            if tape_ffn is None:
                return None, None
        return input_ffn, tape_ffn

    def _by_modules(self, x: ElasticBatch) -> Tensor:
        """Return what the op does, by calling each module, in training with dropout."""
        rows = x.clear_unused(x.data)
        inputs = rows[: x.num_input_rows] if self.has_tape_ffn else rows
        y = self.linear2(self._dropped_act(activate(self.linear1(inputs), self.activation)))
        if self.has_tape_ffn:
            tape = F.glu(self.tape_linear1(rows[x.num_input_rows :]))
            y = torch.cat([y, self.tape_linear2(self._dropped_act(tape))])
        return x.clear_unused(y)

    def _dropped_act(self, act: Tensor) -> Tensor:
        return F.dropout(act, self.dropout, self.training)

    def forward(self, x: Rows) -> Rows:
        """Apply the feed-forwards.

        Args:
            x: an ElasticBatch; or a Tensor (batch, seqlen, dim), a pair (Tensor, mask) or a jagged
                Tensor, all of whose rows are input rows; of the parameters' dtype. A mask is True
                where a row is valid.

        Returns:
            The same kind, layout and shape; unused rows and padding are zero.

        Raises:
            TypeError: x is none of these.
            ValueError: a mask does not match, or a jagged tensor is not a contiguous one.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> ffn = ak.layers.DualFFN(dim=8, ffn_dim=16)
            >>> ffn(ak.ElasticBatch.from_padded(torch.zeros(1, 2, 8))).data.abs().sum().item()
            0.0
        """
        batch = as_batch(x, self.dim)
        return in_kind(self.feed_forward(batch), x, batch)

    if TYPE_CHECKING:
        __call__ = forward


def _ffn(first: nn.Linear, second: nn.Linear) -> FFN:
    return FFN(first.weight, bias_of(first), second.weight, bias_of(second))


def _plain_ffn(first: nn.Linear, second: nn.Linear) -> FFN | None:
    plain = is_plain(first, nn.Linear) and is_plain(second, nn.Linear)
    return _ffn(first, second) if plain else None
