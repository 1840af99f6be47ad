"""Drop-in modules over `ElasticBatch`: the tape reader, attention, feed-forwards and the encoder.

Parameters keep the names of the torch modules that these replace, so that a state dict of
`torch.nn.TransformerEncoderLayer` (norm_first=True, GELU in its tanh form) loads.

The ops have no dropout inside. A layer that trains with dropout on attention weights or activations
takes the eager reference for that product; dropout on a branch's output costs no such detour.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adatape_kernels import ops, reference
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.reference import FFN, LossType, TapeSelection

QueryType = Literal["token", "gap"]

NORM_EPS = 1e-6


class ElasticAttention(nn.Module):
    """Multi-head self-attention within each example, over its input and tape rows (SPEC 6).

    Parameters as in `torch.nn.MultiheadAttention`: in_proj_weight (3 · dim, dim), in_proj_bias,
    out_proj.

    Raises:
        ValueError: num_heads does not divide dim.
    """

    def __init__(self, dim: int, num_heads: int, *, dropout: float = 0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        for weight in (*self.in_proj_weight.detach().chunk(3), self.out_proj.weight):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: ElasticBatch) -> ElasticBatch:
        """Return a batch of the same layout; unused rows are zero."""
        rows, dim = x.data.shape
        qkv = F.linear(x.data, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(rows, 3, self.num_heads, dim // self.num_heads).unbind(1)
        if self.training and self.dropout > 0:
            out, _ = reference.elastic_attention(
                q, k, v, x.cu_inputs, x.cu_tapes, dropout=self.dropout
            )
        else:
            out = ops.elastic_attention(q, k, v, x.cu_inputs, x.cu_tapes, max_rows=x.max_rows)
        return x.with_data(x.clear_unused(self.out_proj(out.view(rows, dim))))


class DualFFN(nn.Module):
    """A GELU feed-forward for input rows and a GLU one for tape rows (SPEC 6).

    Args:
        dim: width of a token.
        ffn_dim: hidden width for input rows (linear1, linear2).
        tape_ffn_dim: hidden width for tape rows (tape_linear1, tape_linear2); 0 sends them
            through the input rows' feed-forward.
        dropout: rate on the activations.
    """

    def __init__(self, dim: int, ffn_dim: int, tape_ffn_dim: int = 0, *, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.linear1, self.linear2 = _xavier(dim, ffn_dim), _xavier(ffn_dim, dim)
        if tape_ffn_dim:
            self.tape_linear1 = _xavier(dim, 2 * tape_ffn_dim)
            self.tape_linear2 = _xavier(tape_ffn_dim, dim)
        self.has_tape_ffn = tape_ffn_dim > 0

    @property
    def input_ffn(self) -> FFN:
        """The parameters for input rows."""
        return FFN(self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias)

    @property
    def tape_ffn(self) -> FFN | None:
        """The parameters for tape rows, None when they share those of input rows."""
        if not self.has_tape_ffn:
            return None
        first, second = self.tape_linear1, self.tape_linear2
        return FFN(first.weight, first.bias, second.weight, second.bias)

    def feed_forward(self, x: ElasticBatch) -> ElasticBatch:
        """Apply the feed-forwards alone, without what a subclass puts around them."""
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
        """Return a batch of the same layout; unused rows are zero."""
        return self.feed_forward(x)


class ElasticEncoderLayer(DualFFN):
    """x + Attention(LN(x)), then x + DualFFN(LN(x)) (SPEC 6).

    Its parameters are named as in `torch.nn.TransformerEncoderLayer` (self_attn, linear1, linear2,
    norm1, norm2), which is why it extends DualFFN rather than holding one; tape_linear1 and
    tape_linear2 come on top.

    Args:
        dim, num_heads, ffn_dim, tape_ffn_dim: as above.
        dropout: rate on the activations and on each branch's output.
        attention_dropout: rate on the attention weights.
        stochastic_depth: probability with which training drops a branch of an example.
        norm_eps: epsilon of both LayerNorms.
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
        norm_eps: float = NORM_EPS,
    ):
        super().__init__(dim, ffn_dim, tape_ffn_dim, dropout=dropout)
        self.self_attn = ElasticAttention(dim, num_heads, dropout=attention_dropout)
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.stochastic_depth = stochastic_depth

    def forward(self, x: ElasticBatch) -> ElasticBatch:
        """Return a batch of the same layout."""
        branch = self._dropped(x, self.self_attn(x.with_data(self.norm1(x.data))))
        norm = self.norm2
        data, normed = ops.add_layer_norm(x.data, branch, norm.weight, norm.bias, norm.eps)
        return x.with_data(data + self._dropped(x, self.feed_forward(x.with_data(normed))))

    def _dropped(self, x: ElasticBatch, branch: ElasticBatch) -> Tensor:
        """Return what a branch adds to x: in training less what dropout takes."""
        out = F.dropout(branch.data, self.dropout, self.training)
        if self.training and self.stochastic_depth > 0:
            keep = out.new_empty(x.batch + 1).bernoulli_(1 - self.stochastic_depth)
            scale = keep / (1 - self.stochastic_depth)
            out = out * scale[x.example_of_rows()].unsqueeze(1)
        return out


class TapeReader(nn.Module):
    """Read a tape from a bank and append it to each example (SPEC 2 to 5).

    Args:
        dim: width of a token.
        num_tape_tokens: most tape tokens that one read appends to an example.
        topk: bank tokens merged into one tape token.
        halt_threshold: an example reads on while its halting score is below this.
        bank_size: tokens of a learnable bank (`tape_tokens`); 0 when the caller brings banks.
        key_split: the key of a bank token is its first dim // key_split features.
        query: the class token ("token") or the mean over the example's rows ("gap").
        average_query, loss_type: as in `ops.tape_select`.
        tape_mlp_dim: hidden width of a GLU feed-forward (`tape_mlp`) that tape tokens pass before
            they are appended; 0 for none.
        query_noise: in training, standard deviation of the noise added to the query.
        bank_dropout: in training, probability with which a bank token cannot be read.

    Raises:
        ValueError: query is neither "token" nor "gap", or key_split exceeds dim.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_tape_tokens: int,
        topk: int,
        halt_threshold: float,
        bank_size: int = 0,
        key_split: int = 1,
        query: QueryType = "token",
        average_query: bool = True,
        loss_type: LossType = "entropy",
        tape_mlp_dim: int = 0,
        query_noise: float = 0.0,
        bank_dropout: float = 0.0,
    ):
        super().__init__()
        if query not in ("token", "gap"):
            raise ValueError(f"query: expected 'token' or 'gap', got {query!r}")
        if not 1 <= key_split <= dim:
            raise ValueError(f"key_split: expected 1 to dim = {dim}, got {key_split}")
        self.num_tape_tokens = num_tape_tokens
        self.topk = topk
        self.halt_threshold = halt_threshold
        self.key_dim = dim // key_split
        self.query = query
        self.average_query = average_query
        self.loss_type = loss_type
        self.query_noise = query_noise
        self.bank_dropout = bank_dropout
        self.bank_norm = nn.LayerNorm(dim, NORM_EPS)
        self.tape_tokens: nn.Parameter | None = None
        if bank_size:
            self.tape_tokens = nn.Parameter(torch.empty(bank_size, dim))
            nn.init.normal_(self.tape_tokens, std=0.02)
        self.tape_mlp = (
            nn.Sequential(_xavier(dim, 2 * tape_mlp_dim), nn.GLU(), _xavier(tape_mlp_dim, dim))
            if tape_mlp_dim
            else None
        )

    def forward(
        self,
        x: ElasticBatch,
        bank: Tensor | None = None,
        *,
        bank_lens: Tensor | None = None,
        capacity: int | None = None,
    ) -> tuple[ElasticBatch, TapeSelection]:
        """Append this read's tape tokens.

        Args:
            x: the batch, on the residual stream as it is.
            bank: (batch, bank_size, dim) or (bank_size, dim) tokens, before any norm; None for
                the learnable bank.
            bank_lens: (batch,) integers, valid tokens of each example's bank; None for all.
            capacity: tape rows to reserve (capacity mode); None for exactly those read, which
                copies one number to the host.

        Returns:
            The batch with its tape, and what was read.

        Raises:
            ValueError: no bank, or as in `ops.tape_select` and `ops.tape_gather`.
        """
        values, query, read_mask = self.normalised(bank, x.pool(_POOLING[self.query]))
        tape, offsets, selection = ops.tape_read(
            query[:, : self.key_dim],
            values,
            num_tape_tokens=self.num_tape_tokens,
            topk=self.topk,
            halt_threshold=self.halt_threshold,
            average_query=self.average_query,
            loss_type=self.loss_type,
            read_mask=read_mask,
            bank_lens=bank_lens,
            capacity=capacity,
        )
        tape = tape.to(x.data.dtype)
        if self.tape_mlp is not None:
            tape = self.tape_mlp(tape)
        x = x.append_tape(tape, offsets, max_tapes=self.num_tape_tokens, exact=capacity is None)
        if self.tape_mlp is not None:
            x = x.with_data(x.clear_unused(x.data))
        return x, selection

    def normalised(
        self, bank: Tensor | None, query: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the normalised bank, the normalised query (batch, dim) and this read's mask."""
        bank = self.tape_tokens if bank is None else bank
        if bank is None:
            raise ValueError("bank: expected a tensor, as this reader has no bank, got None")
        if bank.dim() not in (2, 3) or (bank.dim() == 3 and bank.shape[0] != query.shape[0]):
            raise ValueError(
                f"bank: expected ([{query.shape[0]},] bank_size, {query.shape[1]}), "
                f"got {tuple(bank.shape)}"
            )
        if self.training and self.query_noise > 0:
            query = query + self.query_noise * torch.randn_like(query)
        read_mask = None
        if self.training and self.bank_dropout > 0:
            chance = torch.rand(query.shape[0], bank.shape[-2], device=query.device)
            read_mask = chance < self.bank_dropout
        values, query = self.bank_norm(bank), self.bank_norm(query)
        return values, query.to(values.dtype), read_mask


_POOLING: dict[str, Literal["token", "mean"]] = {"token": "token", "gap": "mean"}


class ElasticEncoder(nn.Module):
    """A stack of encoder layers, some of which are preceded by a read, and a final LayerNorm.

    Args:
        layers: the layers, in order.
        readers: the reader that runs before layer l, by l.
        dim: width of a token.

    Raises:
        ValueError: a reader's layer does not exist.
    """

    def __init__(
        self,
        layers: Iterable[ElasticEncoderLayer],
        dim: int,
        readers: Mapping[int, TapeReader] | None = None,
        *,
        norm_eps: float = NORM_EPS,
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        readers = readers or {}
        for layer in readers:
            if not 0 <= layer < len(self.layers):
                raise ValueError(
                    f"readers: expected layers from 0 to {len(self.layers) - 1}, got {layer}"
                )
        self.readers = nn.ModuleDict({str(layer): reader for layer, reader in readers.items()})
        self.norm = nn.LayerNorm(dim, norm_eps)

    def stages(self) -> Iterator[tuple[ElasticEncoderLayer, TapeReader | None]]:
        """Yield each layer with the reader that runs before it, if any."""
        for index, layer in enumerate(self.layers):
            name = str(index)
            reader = self.readers[name] if name in self.readers else None
            yield cast(ElasticEncoderLayer, layer), cast(TapeReader | None, reader)

    def forward(
        self, x: ElasticBatch, bank: Tensor | None = None, *, capacity: int | None = None
    ) -> tuple[ElasticBatch, tuple[TapeSelection, ...]]:
        """Return the encoded batch and what each read selected, in the order of the layers.

        `bank` is for readers without a learnable one; `capacity` reserves so many tape rows for
        each read (capacity mode).
        """
        reads = []
        for layer, reader in self.stages():
            if reader is not None:
                x, selection = reader(x, bank, capacity=capacity)
                reads.append(selection)
            x = layer(x)
        return x.with_data(self.norm(x.data)), tuple(reads)


def _xavier(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
