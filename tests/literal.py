"""The SPEC's text as loops over Python lists, one example at a time: what the ops must compute."""

import itertools
import math


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(scores):
    top = max(scores)
    exps = [math.exp(s - top) for s in scores]
    return [e / sum(exps) for e in exps]


def tape_select(
    query,
    keys,
    *,
    num_tape_tokens,
    topk,
    halt_threshold,
    average_query=True,
    loss_type="entropy",
    read_mask=None,
    bank_len=None,
):
    """SPEC 3 for one example: query (key_dim), keys (bank_size, key_dim); unused rows stay out."""
    q, h, p, indices, weights = list(query), 0.0, 0.0, [], []
    unread = list(range(len(keys) if bank_len is None else bank_len))
    if read_mask is not None:
        unread = [m for m in unread if not read_mask[m]]

    while len(indices) < num_tape_tokens and h < halt_threshold and len(unread) >= topk:
        score = {m: dot(q, keys[m]) for m in unread}

        def rank(m, score=score):  # best first; NaN last; the lower index first among equals
            return (True, 0, m) if math.isnan(score[m]) else (False, -score[m], m)

        best = sorted(unread, key=rank)[:topk]
        w = softmax([score[m] / math.sqrt(len(q)) for m in best])
        p += 1 - (sum(x * x for x in w) if loss_type == "entropy" else max(w))
        h += w[0]
        unread = [m for m in unread if m not in best]
        merged = [dot(w, [keys[m][d] for m in best]) for d in range(len(q))]
        q = [(a + b) / 2 for a, b in zip(q, merged, strict=True)] if average_query else merged
        indices.append(best)
        weights.append(w)
    return indices, weights, len(indices), p


def tape_gather(indices, weights, counts, *, banks):
    """SPEC 4: banks holds each example's (bank_size, dim); returns the rows and their offsets."""
    rows, offsets = [], [0]
    for bank, ms, ws, count in zip(banks, indices, weights, counts, strict=True):
        for s in range(count):
            rows.append([dot(ws[s], [bank[m][d] for m in ms[s]]) for d in range(len(bank[0]))])
        offsets.append(len(rows))
    return rows, offsets


def elastic_attention(q, k, v, cu_inputs, cu_tapes, scale):
    """SPEC 6: q, k, v (rows, num_heads, head_dim); rows that no example owns are zero."""
    out = [[[0.0] * len(head) for head in row] for row in q]
    for i in range(len(cu_inputs) - 1):
        own = [*range(cu_inputs[i], cu_inputs[i + 1]), *range(cu_tapes[i], cu_tapes[i + 1])]
        for r in own:
            for h in range(len(q[r])):
                w = softmax([dot(q[r][h], k[c][h]) * scale for c in own])
                values = [[v[c][h][d] for c in own] for d in range(len(q[r][h]))]
                out[r][h] = [dot(w, column) for column in values]
    return out


def compact_rows(data, keep, cu_inputs, cu_tapes):
    """SPEC 13: the rows that are kept, their offsets, and where each of them was."""
    rows, source, ends = [], [], []
    for offsets in (cu_inputs, cu_tapes):
        found = [len(rows)]
        for first, last in itertools.pairwise(offsets):
            for r in range(first, last):
                if keep[r]:
                    rows.append(data[r])
                    source.append(r)
            found.append(len(rows))
        ends.append(found)
    return rows, *ends, source


def accumulate_rows(total, rows, source, weights, total_weights=None):
    """SPEC 13: the total with the rows added to it; -1 leaves a row out."""
    out = [list(row) for row in total]
    for r, place in enumerate(source):
        if place != -1:
            factor = 1.0 if total_weights is None else total_weights[r]
            pairs = zip(total[place], rows[r], strict=True)
            out[place] = [factor * old + weights[r] * new for old, new in pairs]
    return out


def linear(x, weight, bias):
    return [dot(row, x) + b for row, b in zip(weight, bias, strict=True)]


def gelu_tanh(x):
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    return x / 2 * math.erfc(-x / math.sqrt(2))


def relu(x):
    return max(x, 0.0)


def dual_ffn(x, num_input_rows, input_ffn, tape_ffn, num_rows, activation=gelu_tanh):
    """SPEC 6: rows of x to the input or the tape feed-forward; zero from num_rows on."""
    out = []
    for r, row in enumerate(x):
        if r >= num_rows:
            out.append([0.0] * len(row))
        elif r < num_input_rows or tape_ffn is None:
            w1, b1, w2, b2 = input_ffn
            out.append(linear([activation(z) for z in linear(row, w1, b1)], w2, b2))
        else:
            w1, b1, w2, b2 = tape_ffn
            hidden = linear(row, w1, b1)
            a, g = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
            gated = [x / (1 + math.exp(-y)) for x, y in zip(a, g, strict=True)]
            out.append(linear(gated, w2, b2))
    return out
