"""Each op in plain torch, without our code: in float64 the exact result, in a narrow dtype a peer.

Every intermediate that is rounded in a narrow dtype passes through `jitter`, by which the oracle
learns how much a rounding there may change the results; what is always wide, through `jitter.wide`.
"""

import math

import torch
import torch.nn.functional as F


class Exact:
    """Disturbs nothing."""

    def __call__(self, x):
        return x

    def wide(self, x):
        return x

    def share(self, weights):
        return weights


class Peer(Exact):
    """Stands for torch's own functions, as they round.

    It takes a softmax's smallest weights for 0, as some exponentials do: they decide whether an
    infinity comes out as that or as NaN, and so neither is then expected.
    """

    def share(self, weights):
        return weights.where(weights.abs() > 4 * torch.finfo(torch.float32).tiny, 0 * weights)


EXACT, PEER = Exact(), Peer()


def read_along(query, keys, indices, counts, average_query, loss_type, jitter=EXACT):
    """Weights and ponder loss of what was selected; query (batch, key_dim)."""
    weights = query.new_zeros(indices.shape)
    ponder = []
    for i, count in enumerate(counts.tolist()):
        q, bank, cost = query[i], keys if keys.dim() == 2 else keys[i], query.new_zeros(())
        rows = []
        for step in range(count):
            chosen = bank.index_select(0, indices[i, step].long())
            w = jitter.share(torch.softmax(jitter((chosen * q).sum(1)) / math.sqrt(len(q)), 0))
            w = jitter.wide(w)
            rows.append(w)
            largest = w.square().sum() if loss_type == "entropy" else w.amax()
            cost = cost + 1 - jitter.wide(largest)
            merged = (w.unsqueeze(1) * chosen).sum(0)
            q = (q + merged) / 2 if average_query else merged
        if rows:
            weights = weights.index_put(
                (torch.tensor(i), torch.arange(count)), jitter(torch.stack(rows))
            )
        ponder.append(cost)
    return weights, torch.stack(ponder) if ponder else query.new_zeros(0)


def gather(bank, indices, weights, counts, rows, jitter=EXACT):
    """The merged rows (rows, dim), zero from the last one on that was read."""
    tape = [bank.new_zeros(0, bank.shape[-1])]
    for i, count in enumerate(counts.tolist()):
        own = bank if bank.dim() == 2 else bank[i]
        chosen = own[indices[i, :count].long()]  # (count, topk, dim)
        tape.append((weights[i, :count].to(bank.dtype).unsqueeze(2) * chosen).sum(1))
    packed = torch.cat(tape)
    return F.pad(packed, (0, 0, 0, rows - len(packed)))


def attention(q, k, v, cu_inputs, cu_tapes, scale, jitter=EXACT):
    """Softmax attention within each example; rows of no example are zero."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = q.new_zeros(q.shape)
    bounds = cu_inputs.tolist(), cu_tapes.tolist()
    for i in range(len(cu_inputs) - 1):
        own = torch.cat([torch.arange(b[i], b[i + 1]) for b in bounds])
        if len(own):
            qi, ki, vi = (x[own].transpose(0, 1) for x in (q, k, v))
            scores = qi @ ki.mT * scale
            shares = torch.softmax(scores, -1)
            if jitter not in (EXACT, PEER):
                shares = _Recomputed.apply(scores, jitter)
            mixed = jitter(jitter.share(shares)) @ vi
            if jitter not in (EXACT, PEER):
                again = _recomputed(scores.detach(), jitter) - shares.detach()
                mixed = mixed + again @ (vi - vi.detach())
                # A backward that takes its row sums from the stored result has that one's rounding
                # in them: as if this term, which is 0, had been added.
                sums = torch.logsumexp(scores, -1, keepdim=True)
                mixed = mixed + (sums - sums.detach()) * (jitter(mixed) - mixed).detach()
            out = out.index_copy(0, own, mixed.transpose(0, 1))
    return out


def _recomputed(scores, jitter):
    """Softmax as a backward computes it anew from the logsumexp, which was rounded when stored."""
    return torch.exp(scores - jitter.wide(torch.logsumexp(scores, -1, keepdim=True)))


class _Recomputed(torch.autograd.Function):
    """Softmax whose derivative is that of recomputed shares."""

    @staticmethod
    def forward(ctx, scores, jitter):
        ctx.save_for_backward(_recomputed(scores, jitter))
        return torch.softmax(scores, -1)

    @staticmethod
    def backward(ctx, grad):
        (shares,) = ctx.saved_tensors
        return shares * (grad - (shares * grad).sum(-1, keepdim=True)), None


class _Overflowing(torch.autograd.Function):
    """A function's result, where a gradient that overflowed makes that of x NaN.

    It is multiplied by the slope, which may be 0; the clamp below would hide that.
    """

    @staticmethod
    def forward(ctx, result, x):
        return result.view_as(result)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.where(grad.isfinite(), 0.0, torch.nan).to(grad.dtype)


def activate(x, name, jitter=EXACT):
    """The activation with its limits at infinity."""
    if name == "relu":
        return F.relu(x)
    end = 40.0
    inner = x.clamp(-end, end)
    if jitter is PEER:
        inner = F.gelu(inner, approximate="tanh" if name == "gelu_tanh" else "none")
    elif name == "gelu_tanh":
        inner = inner * torch.sigmoid(math.sqrt(8 / math.pi) * (inner + 0.044715 * inner**3))
    else:
        # 1 + erf, by which torch computes it, is 0 where this is small: nothing times infinity.
        inner = inner * torch.special.erfc(inner / -math.sqrt(2)) / 2
    # The square of NaN has the slope NaN, while that of a clamped number would be 0.
    result = torch.where(x > end, x, torch.where(x.isnan(), x.square(), inner))
    return _Overflowing.apply(result, x) if jitter is PEER else result


def ffn(x, middle, end, own, of_tape, activation, jitter=EXACT):
    """The two feed-forwards, zero from row `end` on."""
    w1, b1, w2, b2 = own
    hidden = jitter(F.linear(x[:middle], w1, b1))
    parts = [F.linear(jitter(activate(hidden, activation, jitter)), w2, b2)]
    if of_tape is not None:
        w1, b1, w2, b2 = of_tape
        a, g = jitter(F.linear(x[middle:end], w1, b1)).chunk(2, 1)
        parts.append(F.linear(jitter(a * torch.sigmoid(g)), w2, b2))
    return F.pad(torch.cat(parts), (0, 0, 0, len(x) - end))


def accumulate(total, rows, source, weights, total_weights):
    """The total with weighted rows added to those of its rows that they come from."""
    used = source >= 0
    place = source[used].long()
    before = total[place]
    if total_weights is not None:
        before = total_weights[used].unsqueeze(1) * before
    return total.index_put((place,), before + weights[used].unsqueeze(1) * rows[used])


def norm(total, weight, bias, eps, jitter=EXACT):
    """LayerNorm over the features of a sum as it is stored."""
    variance, mean = torch.var_mean(total, -1, correction=0, keepdim=True)
    rstd = jitter.wide((variance + eps).rsqrt())
    return weight * jitter.wide((total - jitter.wide(mean)) * rstd) + bias
