"""The padded model: AdaTape in plain torch on dense tensors and a mask, as one would port it.

Every read appends num_tape_tokens positions to every example, a mask says which of them exist, and
attention, feed-forwards and norms run over all of them. It shares the elastic model's parameters;
that model's results and speed are compared with it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adatape_kernels import reference
from adatape_kernels.layers import ElasticEncoderLayer, TapeReader
from adatape_kernels.models.adatape import AdaTape, AdaTapeOutput, stack_ponder
from adatape_kernels.reference import FFN, TapeSelection


@dataclass(frozen=True)
class _Padded:
    """Tokens (batch, seqlen, dim), their mask (batch, seqlen), and how many of them are inputs."""

    data: Tensor
    mask: Tensor
    num_inputs: int


class PaddedAdaTape(nn.Module):
    """The padded, masked counterpart of an AdaTape model, on the same parameters."""

    def __init__(self, model: AdaTape):
        super().__init__()
        self.model = model
        self.select = reference.tape_select if model.bank_repeats_rows else batched_topk_select

    def forward(self, inputs: Tensor) -> AdaTapeOutput:
        """Return what the elastic model returns, computed over every position that could exist."""
        model = self.model
        tokens, bank = model.embed(inputs)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        x = _Padded(tokens, mask, tokens.shape[1])
        reads = []
        for layer, reader in model.encoder.stages():
            if reader is not None:
                x, selection = self._read(reader, x, bank)
                reads.append(selection)
            x = _encode(layer, x)
        x = _Padded(model.encoder.norm(x.data), x.mask, x.num_inputs)
        logits = model.head(_pool(x, model.config.pooling))
        tape_lens = x.mask[:, x.num_inputs :].sum(1, dtype=torch.int32)
        return AdaTapeOutput(logits, tape_lens, stack_ponder(tuple(reads), logits), tuple(reads))

    def loss(
        self, output: AdaTapeOutput, labels: Tensor, *, label_smoothing: float = 0.0
    ) -> Tensor:
        """Return the loss of the elastic model."""
        return self.model.loss(output, labels, label_smoothing=label_smoothing)

    def _read(
        self, reader: TapeReader, x: _Padded, bank: Tensor | None
    ) -> tuple[_Padded, TapeSelection]:
        pooled = _pool(x, "token" if reader.query == "token" else "mean")
        values, query, read_mask = reader.normalised(bank, pooled)
        selection = self.select(
            query[:, : reader.key_dim],
            values[..., : reader.key_dim],
            num_tape_tokens=reader.num_tape_tokens,
            topk=reader.topk,
            halt_threshold=reader.halt_threshold,
            average_query=reader.average_query,
            loss_type=reader.loss_type,
            read_mask=read_mask,
        )
        rows = _rows(values, selection.indices.clamp(min=0).long())
        tape = (selection.weights.unsqueeze(2) @ rows).squeeze(2).to(x.data.dtype)
        if reader.tape_mlp is not None:
            tape = reader.tape_mlp(tape)
        steps = torch.arange(reader.num_tape_tokens, device=tape.device)
        exists = steps < selection.counts.unsqueeze(1)
        appended = _Padded(
            torch.cat([x.data, tape], 1), torch.cat([x.mask, exists], 1), x.num_inputs
        )
        return appended, selection


def batched_topk_select(
    query: Tensor,
    keys: Tensor,
    *,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float,
    average_query: bool,
    loss_type: str,
    read_mask: Tensor | None = None,
) -> TapeSelection:
    """Read the whole batch by one matrix product and one `torch.topk` a step.

    As `ops.tape_select`, except that equal scores come in any order.
    """
    batch, key_dim = query.shape
    bank_size = keys.shape[-2]
    read = query.new_zeros(batch, bank_size, dtype=torch.bool) if read_mask is None else read_mask
    halting, ponder = query.new_zeros(2, batch)
    counts = torch.zeros(batch, dtype=torch.int32, device=query.device)
    all_indices, all_weights = [], []
    for _ in range(min(num_tape_tokens, bank_size // topk)):
        reading = halting < halt_threshold
        if read_mask is not None:
            reading = reading & ((~read).sum(1) >= topk)
        scores = query @ keys.T if keys.dim() == 2 else (keys @ query.unsqueeze(2)).squeeze(2)
        # Not -inf: an example that has halted reads on unheard, and its bank may run out.
        best, indices = scores.masked_fill(read, torch.finfo(scores.dtype).min).topk(topk)
        weights = torch.softmax(best / math.sqrt(key_dim), 1)
        cost = 1 - (weights.square().sum(1) if loss_type == "entropy" else weights.amax(1))
        ponder = ponder + cost * reading
        halting = halting + weights[:, 0].detach() * reading
        counts += reading
        merged = (weights.unsqueeze(1) @ _rows(keys, indices)).squeeze(1)
        query = (query + merged) / 2 if average_query else merged
        read = read.scatter(1, indices, True)
        all_indices.append(indices.masked_fill(~reading.unsqueeze(1), -1))
        all_weights.append(weights * reading.unsqueeze(1))
    unused = num_tape_tokens - len(all_indices)
    empty = query.new_zeros(batch, unused, topk)
    return TapeSelection(
        torch.cat([_steps(all_indices, empty), empty.to(torch.int32) - 1], 1).to(torch.int32),
        torch.cat([_steps(all_weights, empty), empty], 1),
        counts,
        ponder,
    )


def _steps(parts: list[Tensor], empty: Tensor) -> Tensor:
    return torch.stack(parts, 1) if parts else empty[:, :0]


def _rows(bank: Tensor, indices: Tensor) -> Tensor:
    """Return the bank's rows at indices (batch, ...) as (batch, ..., width)."""
    if bank.dim() == 2:
        return bank[indices]
    batch = torch.arange(len(bank), device=bank.device)
    return bank[batch.view(-1, *[1] * (indices.dim() - 1)), indices]


def _encode(layer: ElasticEncoderLayer, x: _Padded) -> _Padded:
    """Apply one pre-norm encoder layer to every position."""
    y = _add(layer, x.data, _attend(layer, layer.norm1(x.data), x.mask))
    y = _add(layer, y, _feed_forward(layer, layer.norm2(y), x.num_inputs))
    return _Padded(y, x.mask, x.num_inputs)


def _attend(layer: ElasticEncoderLayer, data: Tensor, mask: Tensor) -> Tensor:
    attention = layer.self_attn
    qkv = F.linear(data, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask[:, None, None, :],
        dropout_p=attention.dropout if layer.training else 0.0,
    )
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def _feed_forward(layer: ElasticEncoderLayer, data: Tensor, num_inputs: int) -> Tensor:
    tape_ffn = layer.tape_ffn
    inputs = data if tape_ffn is None else data[:, :num_inputs]
    y = _ffn(layer, F.gelu(_first(inputs, layer.input_ffn), approximate="tanh"), layer.input_ffn)
    if tape_ffn is None:
        return y
    tape = _ffn(layer, F.glu(_first(data[:, num_inputs:], tape_ffn)), tape_ffn)
    return torch.cat([y, tape], 1)


def _first(data: Tensor, ffn: FFN) -> Tensor:
    return F.linear(data, ffn.w1, ffn.b1)


def _ffn(layer: ElasticEncoderLayer, activation: Tensor, ffn: FFN) -> Tensor:
    return F.linear(F.dropout(activation, layer.dropout, layer.training), ffn.w2, ffn.b2)


def _add(layer: ElasticEncoderLayer, x: Tensor, branch: Tensor) -> Tensor:
    out = F.dropout(branch, layer.dropout, layer.training)
    if layer.training and layer.stochastic_depth > 0:
        keep = out.new_empty(len(out), 1, 1).bernoulli_(1 - layer.stochastic_depth)
        out = out * keep / (1 - layer.stochastic_depth)
    return x + out


def _pool(x: _Padded, kind: str) -> Tensor:
    """Pool over the positions that exist, as `ElasticBatch.pool` does."""
    if kind == "token":
        return x.data[:, 0]
    mask, lens = x.mask.unsqueeze(2), x.mask.sum(1, keepdim=True)
    if kind == "max":
        return x.data.masked_fill(~mask, -torch.inf).amax(1).where(lens > 0, 0)
    total = (x.data * mask).sum(1)
    return total if kind == "sum" else total / lens.clamp(min=1)
