"""A layer of the Transformer encoder over elastic batches (SPEC 6)."""

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adatape_kernels.arguments import check_flag, check_int, check_number
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.layers.conversion import (
    activation_name,
    copy_parameters,
    differences_of_layer,
    dropout_rate,
    refuse_unknown,
)
from adatape_kernels.layers.feed_forward import DualFFN
from adatape_kernels.layers.layer_checks import check_rate
from adatape_kernels.layers.open_sum import OpenSum
from adatape_kernels.layers.row_kinds import Rows, as_batch, in_kind
from adatape_kernels.layers.self_attention import ElasticAttention
from adatape_kernels.layers.torch_modules import NORM_EPS, add_norm, is_bare, is_plain
from adatape_kernels.op_types import Activation


class ElasticEncoderLayer(DualFFN):
    """An encoder layer: x + Attention(LN(x)), then x + DualFFN(LN(x)).

    Its parameters are named as in `torch.nn.TransformerEncoderLayer` (self_attn, linear1, linear2,
    norm1, norm2), which is why it extends DualFFN rather than holding one; tape_linear1 and
    tape_linear2 come on top. A state dict says nothing about activation, epsilon and the order of
    norms, in which torch's defaults differ from ours: `from_torch` takes these over as well. As in
    torch, a submodule that was replaced or has hooks or parametrisations is called.

    Args:
        dim: width of a token.
        num_heads: number of attention heads, a divisor of dim.
        ffn_dim: hidden width of the feed-forward for input rows.
        tape_ffn_dim: hidden width of the feed-forward for tape rows; 0 shares that of input rows.
        dropout: probability with which training drops an activation or an output of a branch.
        attention_dropout: probability with which training drops an attention weight.
        stochastic_depth: probability with which training drops a whole branch of an example.
        rescale_kept: whether training divides the branches that stochastic depth keeps by the
            probability of being kept.
        norm_eps: epsilon of both LayerNorms.
        activation: that of the feed-forward for input rows: "gelu_tanh", "gelu" or "relu".
        norm_first: False puts the norms behind the sums: LN(x + Attention(x)), then
            LN(x + DualFFN(x)).

    Raises:
        ValueError: num_heads does not divide dim, a size is too small, a rate is no probability,
            or the activation is unknown.
        TypeError: an argument is of another type altogether.

    Source: SPEC 6.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> layer = ak.layers.ElasticEncoderLayer(dim=8, num_heads=2, ffn_dim=16, tape_ffn_dim=4)
        >>> x = ak.ElasticBatch.from_padded(torch.randn(2, 3, 8))
        >>> layer(x).data.shape
        torch.Size([6, 8])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        tape_ffn_dim: int = 0,
        *,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        rescale_kept: bool = True,
        norm_eps: float = NORM_EPS,
        activation: Activation = "gelu_tanh",
        norm_first: bool = True,
    ):
        dim = check_int("dim", dim, 1)
        super().__init__(dim, ffn_dim, tape_ffn_dim, dropout=dropout, activation=activation)
        check_rate("attention_dropout", attention_dropout)
        check_rate("stochastic_depth", stochastic_depth, less_than_one=True)
        check_number("norm_eps", norm_eps, 0)
        check_flag("norm_first", norm_first)
        check_flag("rescale_kept", rescale_kept)
        self.dropout1 = self.dropout2 = dropout
        self.dim = dim
        self.self_attn = ElasticAttention(dim, num_heads, dropout=attention_dropout)
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.stochastic_depth = stochastic_depth
        self.rescale_kept = rescale_kept
        self.norm_first = norm_first

    @classmethod
    def from_torch(
        cls,
        layer: nn.TransformerEncoderLayer,
        tape_ffn_dim: int = 0,
        *,
        stochastic_depth: float = 0.0,
    ) -> "ElasticEncoderLayer":
        """Make a layer that computes what torch's does, on copies of its parameters.

        The copy has the same activation, epsilons, order of norms, dropout rates, dtype, device and
        mode, training or not. `batch_first` plays no part.

        Args:
            layer: torch's layer.
            tape_ffn_dim, stochastic_depth: as in the constructor; torch's layer has neither.

        Raises:
            ValueError: the layer has something that this one does not have, such as an activation
                of its own, hooks or parametrisations; all of it is named.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> theirs = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
            >>> ours, x = ak.layers.ElasticEncoderLayer.from_torch(theirs), torch.randn(3, 5, 8)
            >>> y, _ = ours(ak.ElasticBatch.from_padded(x)).to_padded()
            >>> torch.allclose(y, theirs(x), atol=1e-5)
            True
        """
        refuse_unknown("layer", layer, differences_of_layer(layer))
        weight = layer.linear1.weight
        activation = activation_name(layer.activation)
        assert activation is not None
        with torch.device(weight.device):
            ours = cls(
                layer.self_attn.embed_dim,
                layer.self_attn.num_heads,
                layer.linear1.out_features,
                tape_ffn_dim,
                dropout=dropout_rate(layer.dropout),
                attention_dropout=layer.self_attn.dropout,
                stochastic_depth=stochastic_depth,
                activation=activation,
                norm_first=layer.norm_first,
            ).to(weight.dtype)
        ours.dropout1, ours.dropout2 = dropout_rate(layer.dropout1), dropout_rate(layer.dropout2)
        ours.norm1.eps, ours.norm2.eps = layer.norm1.eps, layer.norm2.eps
        copy_parameters(layer, ours)
        ours.train(layer.training)
        ours.self_attn.train(layer.self_attn.training)
        return ours

    def forward(self, x: Rows) -> Rows:
        """Apply the layer.

        Args:
            x: an ElasticBatch, a Tensor (batch, seqlen, dim), a pair (Tensor, mask) or a jagged
                Tensor, of the parameters' dtype; a mask is True where a row is valid, which is the
                opposite of torch's src_key_padding_mask.

        Returns:
            The same kind, layout and shape.

        Raises:
            TypeError: x is none of these.
            ValueError: a mask does not match, or a jagged tensor is not a contiguous one.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> layer = ak.layers.ElasticEncoderLayer(dim=8, num_heads=2, ffn_dim=16)
            >>> theirs = torch.nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)
            >>> layer.load_state_dict(theirs.state_dict())
            <All keys matched successfully>
            >>> layer(torch.randn(2, 3, 8)).shape
            torch.Size([2, 3, 8])
        """
        if isinstance(x, OpenSum):  # from an encoder that asked `continues_sums`
            return cast(Rows, self._continued(x))
        batch = as_batch(x, self.dim)
        return in_kind(self._applied(batch), x, batch)

    if TYPE_CHECKING:
        __call__ = forward

    def takes_spare_rows(self) -> bool:
        """Return whether rows that belong to no example may be computed beside the others.

        They may where nobody else sees them: the layer and its parts are these classes and torch's
        own, without hooks.

        Example:
            >>> import adatape_kernels as ak
            >>> layer = ak.layers.ElasticEncoderLayer(dim=8, num_heads=2, ffn_dim=16)
            >>> handle = layer.norm1.register_forward_hook(lambda module, args, result: None)
            >>> layer.takes_spare_rows()
            False
        """
        attention, (input_ffn, _) = self.self_attn, self._plain_ffns()
        return (
            type(self) is ElasticEncoderLayer
            and is_bare(self)
            and type(attention) is ElasticAttention
            and is_bare(attention)
            and is_plain(attention.out_proj, nn.Linear)
            and is_plain(self.norm1, nn.LayerNorm)
            and is_plain(self.norm2, nn.LayerNorm)
            and input_ffn is not None
        )

    def _applied(self, x: ElasticBatch) -> ElasticBatch:
        """Return both branches added, with their norms before or behind them."""
        if not self.norm_first:
            x = self._add_and_norm(x, self.self_attn(x), self.dropout1, self.norm1)
            return self._add_and_norm(x, self.feed_forward(x), self.dropout2, self.norm2)
        return self._continued(OpenSum(x, None)).closed()

    def _continued(self, x: OpenSum) -> OpenSum:
        """Return the stream with the first branch added, and the second one."""
        batch, normed = x.normed(self.norm1)
        attended = self.self_attn(batch.with_data(normed))
        branch = self._dropped(batch, attended, self.dropout1)
        data, normed = add_norm(batch.data, branch, self.norm2)
        fed_forward = self.feed_forward(batch.with_data(normed))
        return OpenSum(batch.with_data(data), self._dropped(batch, fed_forward, self.dropout2))

    def _add_and_norm(
        self, x: ElasticBatch, branch: ElasticBatch, rate: float, norm: nn.LayerNorm
    ) -> ElasticBatch:
        """Return norm(x + branch), which leaves unused rows zero."""
        _, normed = add_norm(x.data, self._dropped(x, branch, rate), norm)
        return x.with_data(x.clear_unused(normed))

    def _dropped(self, x: ElasticBatch, branch: ElasticBatch, rate: float) -> Tensor:
        """Return the branch's rows (rows, dim), in training after dropout and stochastic depth."""
        out = F.dropout(branch.data, rate, self.training)
        if self.training and self.stochastic_depth > 0:
            # The last entry is for unused rows, which belong to no example.
            keep = out.new_empty(x.batch + 1).bernoulli_(1 - self.stochastic_depth)
            scale = keep / (1 - self.stochastic_depth) if self.rescale_kept else keep
            out = out * scale[x.example_of_rows()].unsqueeze(1)
        return out


def continues_sums(layer: nn.Module) -> bool:
    """Return whether a layer may be called with an `OpenSum`, and returns one.

    It may where nobody else sees what it is called with and returns, and it norms first.

    Args:
        layer: any module.
    """
    return type(layer) is ElasticEncoderLayer and is_bare(layer) and layer.norm_first
