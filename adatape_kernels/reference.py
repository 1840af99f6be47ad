"""The eager definition of every op (SPEC sections 3, 4, 6 and 13), in plain torch.

It has more than 400 lines because whoever asks what an op computes should find all of it here.

Each forward is differentiable by autograd and is the oracle that kernels are tested against. Each
`…_bwd` states the derivative in closed form. The eager backend of the ops, which serves wherever no
kernel does, runs both. Sums are float32, or float64 for float64 input.

Selection, gathering and attention never mix examples: the shapes, the order of sums and the memory
alignment behind one example's results are its own, so its bits do not depend on its batch mates.
Rows that an example does not own, and bank entries that it does not read, are never multiplied, not
even by zero.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels.activations import activate, activate_bwd, glu, glu_bwd
from adatape_kernels.offsets import cumulative, packed_order
from adatape_kernels.op_types import FFN, Activation, LossType, TapeSelection, wide_dtype

# Scores are an elementwise product and a row sum, in chunks that bound the product's memory.
_SCORE_CHUNK = 1 << 22


# Adaptive tape reading: SPEC 3


def tape_select(
    query: Tensor,
    keys: Tensor,
    *,
    num_tape_tokens: int,
    topk: int,
    halt_threshold: float,
    average_query: bool = True,
    loss_type: LossType = "entropy",
    read_mask: Tensor | None = None,
    bank_lens: Tensor | None = None,
) -> TapeSelection:
    """Read bank entries for each example until its halting score reaches the threshold.

    Arguments and results as in `ops.tape_select`. Source: SPEC 3.
    """
    batch, bank_size = len(query), keys.shape[-2]
    wide = wide_dtype(query.dtype)
    # Contiguous, since a sum's order of addition, and so its bits, may follow the strides.
    query, keys = query.to(wide).contiguous(), keys.to(wide).contiguous()
    unread = torch.ones(batch, bank_size, dtype=torch.bool, device=query.device)
    if read_mask is not None:
        unread &= ~read_mask
    if bank_lens is not None:
        unread &= torch.arange(bank_size, device=query.device) < bank_lens.unsqueeze(1)
    halting, ponder = query.new_zeros(batch), query.new_zeros(batch)
    counts = torch.zeros(batch, dtype=torch.int32, device=query.device)
    all_indices = counts.new_full((batch, num_tape_tokens, topk), -1)
    all_weights = [query.new_zeros(batch, 0, topk)]

    for step in range(num_tape_tokens):
        reading = (halting < halt_threshold) & (unread.sum(1) >= topk)
        if not reading.any():
            break
        best = _best_unread(_scores(query.detach(), keys.detach(), unread), topk)
        unread = unread.scatter(1, best, ~reading.unsqueeze(1) & unread.gather(1, best))
        rows = _bank_rows(keys, best, reading.unsqueeze(1))
        weights, cost, next_query = _read_step(query, rows, average_query, loss_type)
        all_indices[:, step] = best.to(torch.int32).where(reading.unsqueeze(1), -1)
        all_weights.append(weights.where(reading.unsqueeze(1), 0).unsqueeze(1))
        ponder = ponder + cost.where(reading, 0)
        halting = halting + weights[:, 0].detach().where(reading, 0)
        query = next_query.where(reading.unsqueeze(1), query)
        counts += reading

    weights = F.pad(torch.cat(all_weights, 1), (0, 0, 0, num_tape_tokens + 1 - len(all_weights)))
    return TapeSelection(all_indices, weights, counts, ponder)


def _read_step(
    query: Tensor, rows: Tensor, average_query: bool, loss_type: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the k chosen keys (batch, k, key_dim): weights, ponder cost and the next query."""
    scores = (rows * query.unsqueeze(1)).sum(-1)
    weights = torch.softmax(scores / math.sqrt(query.shape[-1]), -1)
    cost = 1 - (weights.square().sum(-1) if loss_type == "entropy" else weights.amax(-1))
    merged = (weights.unsqueeze(-1) * rows).sum(1)
    return weights, cost, (query + merged) / 2 if average_query else merged


def _scores(query: Tensor, keys: Tensor, unread: Tensor) -> Tensor:
    """Return integers (batch, bank_size) in the order of q · key, for `_best_unread`.

    A sum over each row, since a matrix product may round equal rows differently by position. NaN
    ranks below every number, an entry that may not be read below NaN.
    """
    examples = max(1, _SCORE_CHUNK // max(1, keys.shape[-2] * keys.shape[-1]))
    parts = [
        (part * (keys if keys.dim() == 2 else keys[i * examples : (i + 1) * examples])).sum(-1)
        for i, part in enumerate(query.unsqueeze(1).split(examples))
    ]
    scores = torch.cat(parts) if parts else query.new_zeros(unread.shape)
    integer = torch.int64 if scores.dtype == torch.float64 else torch.int32
    limits = torch.iinfo(integer)
    bits = (scores + 0.0).view(integer)  # + 0.0 makes -0.0 equal to 0.0
    order = torch.where(bits < 0, bits ^ limits.max, bits)
    order = order.masked_fill(scores.isnan(), limits.min + 1)
    return order.where(unread, limits.min)


def _best_unread(order: Tensor, topk: int) -> Tensor:
    """Return the k largest of each row, best first, the lower index first among equals."""
    order, lowest = order.clone(), torch.iinfo(order.dtype).min
    best = []
    for _ in range(topk):
        best.append(order.argmax(1, keepdim=True))  # the first of several maxima
        order.scatter_(1, best[-1], lowest)
    return torch.cat(best, 1)


def _used(counts: Tensor, num_tape_tokens: int) -> Tensor:
    """Return the mask (batch, num_tape_tokens) of tape rows that exist."""
    return torch.arange(num_tape_tokens, device=counts.device) < counts.unsqueeze(1)


def _flat_index(indices: Tensor, bank: Tensor) -> Tensor:
    """Turn bank entries (batch, ...) into rows of the bank flattened to (entries, width)."""
    if bank.dim() == 2:
        return indices.long()
    first = bank.shape[1] * torch.arange(len(bank), device=bank.device)
    return indices.long() + first.view(-1, *[1] * (indices.dim() - 1))


def _bank_rows(bank: Tensor, indices: Tensor, used: Tensor) -> Tensor:
    """Gather the bank's rows (batch, ..., width), zero where not `used`, whose shape ends in ones.

    The gradient, too, touches used rows only.
    """
    flat = _flat_index(indices.where(used, 0), bank)
    return bank.flatten(0, -2)[flat].where(used.unsqueeze(-1), 0)


def _scatter_add(rows: Tensor, bank: Tensor, flat: Tensor) -> Tensor:
    """Add rows (..., width) into zeros of the bank's shape, at the rows `flat` of `_flat_index`."""
    total = rows.new_zeros(bank.shape).flatten(0, -2)
    return total.index_add(0, flat.flatten(), rows.flatten(0, -2)).view(bank.shape)


def read_along(
    query: Tensor,
    keys: Tensor,
    indices: Tensor,
    counts: Tensor,
    average_query: bool,
    loss_type: LossType,
) -> tuple[Tensor, Tensor]:
    """Return the weights and the ponder loss of a selection that was made before.

    Derivatives are taken of this function, since what is selected has none. Its arguments and
    results are those of `tape_select` of the same names.
    """
    wide = wide_dtype(query.dtype)
    used = _used(counts, indices.shape[1])
    rows = _bank_rows(keys.to(wide), indices, used.unsqueeze(-1))
    query, ponder, all_weights = query.to(wide), query.new_zeros(len(query), dtype=wide), []
    for step in range(indices.shape[1]):
        reading = used[:, step]
        weights, cost, following = _read_step(query, rows[:, step], average_query, loss_type)
        all_weights.append(weights.where(reading.unsqueeze(1), 0))
        ponder = ponder + cost.where(reading, 0)
        query = following.where(reading.unsqueeze(1), query)
    empty = query.new_zeros(len(query), 0, indices.shape[2])
    return torch.stack(all_weights, 1) if all_weights else empty, ponder


def tape_select_bwd(
    query: Tensor,
    keys: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    indices: Tensor,
    counts: Tensor,
    average_query: bool,
    loss_type: LossType,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and keys from the rows that were read.

    With κ = Σ_j w_j key_j and next = keep · q + take · κ, run backwards over the steps:

        dw_j = dweights_j + take · dnext · key_j + dponder · ∂cost/∂w_j
        ds_j = w_j (dw_j - Σ_i w_i dw_i) / sqrt(key_dim)
        dkey_j = take · w_j dnext + ds_j q        dq = keep · dnext + Σ_j ds_j key_j
    """
    used = _used(counts, indices.shape[1])
    dquery, drows = _gradients_along(
        query, keys, dweights, dponder, indices, used, average_query, loss_type
    )
    dkeys = _scatter_add(drows[used], keys, _flat_index(indices, keys)[used])
    return dquery.to(query.dtype), dkeys.to(keys.dtype)


def _gradients_along(
    query: Tensor,
    keys: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    indices: Tensor,
    used: Tensor,
    average_query: bool,
    loss_type: LossType,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the query and of each read's key, in float32 or wider."""
    wide = wide_dtype(query.dtype)
    keep, take = (0.5, 0.5) if average_query else (0.0, 1.0)
    rows = _bank_rows(keys, indices, used.unsqueeze(-1)).to(wide)
    queries, weights = [query.to(wide).contiguous()], []
    for step in range(indices.shape[1]):
        w, _, following = _read_step(queries[-1], rows[:, step], average_query, loss_type)
        weights.append(w)
        queries.append(following.where(used[:, step, None], queries[-1]))

    dquery = torch.zeros_like(queries[0])
    drows: list[Tensor] = []
    for step in reversed(range(indices.shape[1])):
        q, w, r = queries[step], weights[step], rows[:, step]
        if loss_type == "entropy":
            dcost = -2 * w
        else:
            best = (w == w.amax(-1, keepdim=True)).to(wide)
            dcost = -best / best.sum(-1, keepdim=True)  # equal maxima share the gradient
        dmerged = (take * dquery).unsqueeze(1)
        dw = dweights[:, step] + (dmerged * r).sum(-1) + dponder.unsqueeze(1) * dcost
        ds = w * (dw - (w * dw).sum(-1, keepdim=True)) / math.sqrt(query.shape[-1])
        drows.append(w.unsqueeze(-1) * dmerged + ds.unsqueeze(-1) * q.unsqueeze(1))
        dq = keep * dquery + (ds.unsqueeze(-1) * r).sum(1)
        dquery = dq.where(used[:, step, None], dquery)
    return dquery, torch.stack(drows[::-1], 1) if drows else torch.zeros_like(rows)


# Variable-length gathering: SPEC 4


def tape_gather(
    bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor, *, capacity: int | None = None
) -> tuple[Tensor, Tensor]:
    """Merge the bank tokens of each read into tape tokens, packed example after example.

    Arguments and results as in `ops.tape_gather`. Source: SPEC 4.
    """
    used = _used(counts, indices.shape[1])
    rows = bank.flatten(0, -2)[_flat_index(indices, bank)[used]].to(wide_dtype(bank.dtype))
    tape = rows.new_zeros(len(rows), bank.shape[-1])
    for row, weight in zip(rows.unbind(1), weights[used].unbind(1), strict=True):
        tape = tape + weight.unsqueeze(1) * row
    if capacity is not None:
        tape = F.pad(tape, (0, 0, 0, capacity - len(tape)))
    return tape.to(bank.dtype), cumulative(counts)


def tape_gather_bwd(
    dtape: Tensor, bank: Tensor, indices: Tensor, weights: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of bank, a weighted scatter-add, and weights, a dot product per row."""
    used = _used(counts, indices.shape[1])
    flat = _flat_index(indices, bank)[used]
    drows, dweights = _gradients_of_merging(dtape, bank, flat, weights, used)
    return _scatter_add(drows, bank, flat).to(bank.dtype), dweights


def _gradients_of_merging(
    dtape: Tensor, bank: Tensor, flat: Tensor, weights: Tensor, used: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of each row that was merged and of all weights, float32 or wider."""
    dmerged = dtape[: len(flat), None].to(weights.dtype)
    dweights = torch.zeros_like(weights, memory_format=torch.contiguous_format).index_put(
        (used,), (bank.flatten(0, -2)[flat].to(weights.dtype) * dmerged).sum(-1)
    )
    return weights[used].unsqueeze(-1) * dmerged, dweights


def tape_read_bwd(
    query: Tensor,
    bank: Tensor,
    dtape: Tensor,
    dweights: Tensor,
    dponder: Tensor,
    weights: Tensor,
    indices: Tensor,
    counts: Tensor,
    average_query: bool,
    loss_type: LossType,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of query and bank, whose first features are the keys.

    The gradient of a row is the sum of what `tape_gather_bwd` and `tape_select_bwd` say, where the
    weights' gradient is that of the merging plus the one that is given.
    """
    used = _used(counts, indices.shape[1])
    flat, keys = _flat_index(indices, bank)[used], bank[..., : query.shape[1]]
    drows, dmerging = _gradients_of_merging(dtape, bank, flat, weights, used)
    dquery, dkeys = _gradients_along(
        query, keys, dweights + dmerging, dponder, indices, used, average_query, loss_type
    )
    drows = drows + F.pad(dkeys[used], (0, bank.shape[-1] - query.shape[1]))
    return dquery.to(query.dtype), _scatter_add(drows, bank, flat).to(bank.dtype)


# Attention over inputs and tape: SPEC 6


def elastic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    *,
    softmax_scale: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attend within each example, to its input and its tape rows alike.

    Arguments as in `ops.elastic_attention`; `dropout` is the rate on the attention weights.

    Returns:
        The result, shaped and typed as q, zero in unused rows; and the log-sum-exp of each row's
        scaled scores, (num_heads, rows), which the backward needs.

    Source: SPEC 6.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    order, lens = _example_rows(cu_inputs, cu_tapes)
    wide = wide_dtype(q.dtype)
    outs, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(q.shape[1], 0, dtype=wide)]
    for qi, ki, vi in _per_example((q, k, v), order, lens):
        scores = qi @ ki.mT * scale
        largest = scores.detach().amax(-1, keepdim=True)
        exponentials = torch.exp(scores - largest)
        total = exponentials.sum(-1, keepdim=True)
        weights = F.dropout(exponentials / total, dropout)
        outs.append((weights @ vi).transpose(0, 1).to(q.dtype))
        lses.append((largest + total.log()).squeeze(-1))
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.zeros(q.shape[1], len(q), dtype=wide, device=q.device)
    return out.index_copy(0, order, torch.cat(outs)), lse.index_copy(1, order, torch.cat(lses, 1))


def elastic_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, zero in unused rows.

    With P = exp(S - lse) and δ = Σ out · dout a row: dS = P ⊙ (dout Vᵀ - δ).
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    order, lens = _example_rows(cu_inputs, cu_tapes)
    grads: list[list[Tensor]] = [[x.new_zeros(0, *x.shape[1:])] for x in (q, k, v)]
    per_example = _per_example((dout, q, k, v, out), order, lens)
    lse_rows = lse.index_select(1, order).split(lens, 1)
    for (doi, qi, ki, vi, oi), lse_i in zip(per_example, lse_rows, strict=True):
        p = torch.exp(qi @ ki.mT * scale - lse_i.unsqueeze(-1))
        ds = p * (doi @ vi.mT - (doi * oi).sum(-1, keepdim=True)) * scale
        for grad, part in zip(grads, (ds @ ki, ds.mT @ qi, p.mT @ doi), strict=True):
            grad.append(part.transpose(0, 1).to(q.dtype))
    dq, dk, dv = (
        torch.zeros(q.shape, dtype=q.dtype, device=q.device).index_copy(0, order, torch.cat(parts))
        for parts in grads
    )
    return dq, dk, dv


def _example_rows(cu_inputs: Tensor, cu_tapes: Tensor) -> tuple[Tensor, list[int]]:
    """Return the rows' places example after example, and the lengths of the nonempty examples."""
    lens = (cu_inputs.diff() + cu_tapes.diff()).tolist()
    return packed_order(cu_inputs, cu_tapes, sum(lens)), [n for n in lens if n > 0]


def _per_example(
    tensors: tuple[Tensor, ...], order: Tensor, lens: list[int]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield each example's part of the tensors, (num_heads, rows, head_dim) each, wide.

    Clones: matrix products may round differently where memory is aligned differently.
    """
    packed = torch.stack(tensors, 1).index_select(0, order).to(wide_dtype(tensors[0].dtype))
    for part in packed.split(lens):
        yield part.permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format).unbind(0)


# Two feed-forwards: SPEC 6


def dual_ffn(
    x: Tensor,
    num_input_rows: int,
    input_ffn: FFN,
    tape_ffn: FFN | None = None,
    *,
    num_rows: int | None = None,
    activation: Activation = "gelu_tanh",
) -> tuple[Tensor, Tensor, Tensor]:
    """Send input rows through one feed-forward and tape rows through the other.

    Arguments as in `ops.dual_ffn`.

    Returns:
        The result, shaped as x, zero from row `num_rows` on; and the pre-activations of both kinds
        of rows, (num_input_rows, hidden) and (num_rows - num_input_rows, tape hidden), which the
        backward needs.

    Source: SPEC 6.
    """
    end = len(x) if num_rows is None else num_rows
    middle = end if tape_ffn is None else num_input_rows
    hidden = F.linear(x[:middle], input_ffn.w1, input_ffn.b1)
    parts = [F.linear(activate(hidden, activation), input_ffn.w2, input_ffn.b2)]
    tape_hidden = x.new_empty(0, 0)
    if tape_ffn is not None:
        tape_hidden = F.linear(x[middle:end], tape_ffn.w1, tape_ffn.b1)
        parts.append(F.linear(glu(tape_hidden), tape_ffn.w2, tape_ffn.b2))
    return F.pad(torch.cat(parts), (0, 0, 0, len(x) - end)), hidden, tape_hidden


def dual_ffn_bwd(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    tape_hidden: Tensor,
    input_ffn: FFN,
    tape_ffn: FFN | None,
    activation: Activation = "gelu_tanh",
) -> tuple[Tensor, FFN, FFN | None]:
    """Return the gradients of x and of both parameter sets; recomputes the activations."""
    middle, end = len(hidden), len(hidden) + len(tape_hidden)
    dact = dy[:middle] @ input_ffn.w2
    dhidden, act = activate_bwd(dact, hidden, activation), activate(hidden, activation)
    dx, dinput = _linear_pair_bwd(dy[:middle], dhidden, act, x[:middle], input_ffn.w1)
    if tape_ffn is None:
        return F.pad(dx, (0, 0, 0, len(x) - end)), dinput, None
    dy_tape, x_tape = dy[middle:end], x[middle:end]
    dhidden, act = glu_bwd(dy_tape @ tape_ffn.w2, tape_hidden), glu(tape_hidden)
    dx_tape, dtape = _linear_pair_bwd(dy_tape, dhidden, act, x_tape, tape_ffn.w1)
    return F.pad(torch.cat([dx, dx_tape]), (0, 0, 0, len(x) - end)), dinput, dtape


def _linear_pair_bwd(
    dy: Tensor, dhidden: Tensor, act: Tensor, x: Tensor, w1: Tensor
) -> tuple[Tensor, FFN]:
    """Return dx and the parameters' gradients of w2 · act(w1 · x + b1) + b2."""
    return dhidden @ w1, FFN(dhidden.mT @ x, dhidden.sum(0), dy.mT @ act, dy.sum(0))


# The residual stream: SPEC 6


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add a branch to the residual stream, and normalise the sum as it is stored.

    Arguments as in `ops.add_layer_norm`.

    Returns:
        The sum and its LayerNorm, shaped and typed as x; and each row's mean and reciprocal
        standard deviation, (rows,), which the backward needs.

    Source: SPEC 6.
    """
    total, wide = (x + branch).to(x.dtype).contiguous(), wide_dtype(x.dtype)
    normed, mean, rstd = torch.native_layer_norm(
        total.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps
    )
    return total, normed.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def add_layer_norm_bwd(
    dtotal: Tensor, dnormed: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (and of the branch), weight and bias.

    With y = (total - mean) · rstd and g = weight · dnormed, means over a row's features:

        dx = dtotal + rstd (g - mean(g) - y · mean(g · y))
        dweight = Σ_rows dnormed · y        dbias = Σ_rows dnormed
    """
    wide = wide_dtype(total.dtype)
    weight_wide = weight.to(wide)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dnormed.to(wide),
        total.to(wide),
        total.shape[-1:],
        mean.unsqueeze(-1),
        rstd.unsqueeze(-1),
        weight_wide,
        weight_wide,  # in place of the bias, of which it takes the shape only
        (True, True, True),
    )
    return (dtotal + dx).to(total.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


# Rows that leave, and come home: SPEC 13


def compact_rows(
    data: Tensor,
    keep: Tensor,
    cu_inputs: Tensor,
    cu_tapes: Tensor,
    *,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep some rows of each example, in their order.

    Arguments and results as in `ops.compact_rows`. Source: SPEC 13.
    """
    kept = keep & (torch.arange(len(data), device=data.device) < cu_tapes[-1])
    source = kept.nonzero().squeeze(1)
    before = cumulative(kept.long())
    packed, unused = data.index_select(0, source), 0
    if capacity is not None:
        unused = capacity - len(source)
        packed = F.pad(packed, (0, 0, 0, unused))
    source = F.pad(source.to(torch.int32), (0, unused), value=-1)
    return packed, before[cu_inputs], before[cu_tapes], source


def compact_rows_bwd(dpacked: Tensor, source: Tensor, rows: int) -> Tensor:
    """Return the gradient of the rows before some left: zero for those that did."""
    kept = source >= 0
    zeros = dpacked.new_zeros(rows, dpacked.shape[1])
    return zeros.index_copy(0, source[kept].long(), dpacked[kept])


def accumulate_rows(
    total: Tensor,
    rows: Tensor,
    source: Tensor,
    weights: Tensor,
    *,
    total_weights: Tensor | None = None,
) -> Tensor:
    """Add weighted rows to those rows of a total that they come from.

    Arguments and results as in `ops.accumulate_rows`. Source: SPEC 13.
    """
    used, place = _places(total, source)
    wide = wide_dtype(rows.dtype)
    before = total.index_select(0, place).to(wide)
    if total_weights is not None:
        before = total_weights[used].unsqueeze(1) * before
    after = before + weights[used].unsqueeze(1) * rows[used].to(wide)
    return total.contiguous().index_copy(0, place, after.to(total.dtype))


def accumulate_rows_bwd(
    dsum: Tensor,
    total: Tensor | None,
    rows: Tensor,
    source: Tensor,
    weights: Tensor,
    total_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of total, rows, weights and total_weights.

    Without total_weights that of total is dsum itself; then it, and that of total_weights, have no
    rows here. With r̄ for row source[r] of dsum:

        drows[r] = weights[r] · r̄                   dweights[r] = rows[r] · r̄
        dtotal[source[r]] = total_weights[r] · r̄    dtotal_weights[r] = total[source[r]] · r̄
    """
    used, place = _places(dsum, source)
    wide = wide_dtype(rows.dtype)
    given = dsum.index_select(0, place).to(wide)

    def by_row(values: Tensor, like: Tensor) -> Tensor:
        return like.new_zeros(like.shape).index_put((used,), values.to(like.dtype))

    drows = by_row(weights[used].unsqueeze(1) * given, rows)
    dweights = by_row((rows[used].to(wide) * given).sum(1), weights)
    if total is None or total_weights is None:
        return dsum.new_empty(0, dsum.shape[1]), drows, dweights, weights.new_empty(0)
    dbefore = total_weights[used].unsqueeze(1) * given
    dtotal = dsum.contiguous().index_copy(0, place, dbefore.to(dsum.dtype))
    before = total.index_select(0, place).to(wide)
    return dtotal, drows, dweights, by_row((before * given).sum(1), total_weights)


def _places(total: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows come from a row of the total, and the numbers of these rows."""
    used = (source >= 0) & (source < len(total))
    return used, source[used].long()
