"""SPEC 11 and 12 word for word: models whose examples or rows halt, example after example.

Nothing here is batched or left out by an index of ours; what the models of the package compute is
compared with it.
"""

import math

import torch


def block(layer, x, keys):
    """One encoder layer on the rows (length, dim) of one example.

    Args:
        layer: the layer.
        x: the rows.
        keys: which rows others see, (length,) bool.
    """
    attention = layer.self_attn
    x = x + attend(attention, layer.norm1(x), keys)
    hidden = layer.linear1(layer.norm2(x))
    if layer.activation == "gelu":
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    else:
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        hidden = 0.5 * hidden * (1 + torch.tanh(inner))
    return x + layer.linear2(hidden)


def attend(attention, x, keys, penalty=-math.inf):
    width = x.shape[1] // attention.num_heads
    q, k, v = (x @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, 1)
    parts = []
    for head in range(attention.num_heads):
        of_head = slice(head * width, (head + 1) * width)
        scores = q[:, of_head] @ k[:, of_head].T / math.sqrt(width)
        scores = scores.where(keys, scores + penalty)
        parts.append(torch.softmax(scores, 1) @ v[:, of_head])
    return attention.out_proj(torch.cat(parts, 1))


def classify(model, y):
    """Logits of the normed rows of one example."""
    c = model.config
    rows = torch.nn.functional.layer_norm(
        y, (c.dim,), model.encoder.norm.weight, model.encoder.norm.bias, 1e-6
    )
    pooled = rows[0] if c.pooling == "token" else rows[c.num_registers :].mean(0)
    return model.head(pooled)


def universal(model, images):
    """Logits, N and R of each example of a UViT, by the recurrence of SPEC 11."""
    c, found = model.config, []
    threshold, unit = 1 - c.act_epsilon, model.encoder.unit.projection
    for image in images:
        s = model.embed(image.unsqueeze(0))[0][0]
        length = len(s)
        y = torch.zeros_like(s)
        h = torch.zeros(length, dtype=s.dtype)
        remainder = torch.zeros(length, dtype=s.dtype)
        steps = torch.zeros(length, dtype=torch.int32)
        running = torch.ones(length, dtype=torch.bool)
        for n in range(c.depth):
            if not running.any():
                break
            p = torch.sigmoid(s @ unit.weight[0] + unit.bias)
            if c.act_level == "example":
                p = p.mean().expand(length)
            layer = model.encoder.layers[n % len(model.encoder.layers)]
            seen = running.clone() if c.leave == "row" else torch.ones_like(running)
            after = block(layer, s, seen)
            halts = h + p > threshold
            if c.force_halt and n == c.depth - 1:
                halts = torch.ones_like(halts)
            new = []
            for j in range(length):
                w = torch.zeros((), dtype=s.dtype)
                if running[j]:
                    steps[j] += 1
                    if halts[j]:
                        remainder = remainder.index_put((torch.tensor(j),), 1 - h[j])
                        w = 1 - h[j]
                        h = h.index_put((torch.tensor(j),), h.new_ones(()))
                        running[j] = False
                    else:
                        w = p[j]
                        h = h.index_put((torch.tensor(j),), h[j] + p[j])
                        running[j] = bool(h[j] < threshold)
                old = (1 - w) * y[j] if c.act_type == "basic" else y[j]
                new.append(w * after[j] + old)
            y, s = torch.stack(new), after
        found.append((classify(model, y), steps, remainder))
    return found


def avit(model, images):
    """Logits, N and R of each example of an A-ViT, and the mean d of each layer."""
    c, found = model.config, []
    threshold = 1 - c.act_epsilon
    sums = [torch.zeros((), dtype=images.dtype) for _ in range(c.depth)]
    counts = [0] * c.depth
    for image in images:
        x = model.embed(image.unsqueeze(0))[0][0]
        length = len(x)
        score, left = torch.zeros(2, length, dtype=x.dtype).unbind(0)
        left = left + 1
        rest = torch.zeros(length, dtype=x.dtype)
        steps = torch.zeros(length, dtype=torch.int32)
        active = torch.ones(length, dtype=torch.bool)
        y = torch.zeros_like(x)
        for number, layer in enumerate(model.encoder.layers):
            if not active.any():
                break
            at = active.nonzero().flatten()
            e = x.index_copy(0, at, block(layer, x[at], torch.ones(len(at), dtype=torch.bool)))
            gate = torch.sigmoid(c.gate_scale * e[:, 0] - c.gate_center)
            for j in at.tolist():
                if j > 0:
                    sums[number], counts[number] = sums[number] + gate[j], counts[number] + 1
                p = gate[j]
                if c.keep_class_token and j == 0:
                    p = torch.zeros_like(p)
                if number == c.depth - 1:
                    p = torch.ones_like(p)
                here = torch.tensor(j)
                steps[j] += 1
                score = score.index_put((here,), score[j] + p)
                if score[j] > threshold:
                    y = y.index_put((here,), y[j] + left[j] * e[j])
                    rest = rest.index_put((here,), left[j])
                elif score[j] < threshold:
                    y = y.index_put((here,), y[j] + p * e[j])
                    left = left.index_put((here,), left[j] - p)
                active[j] = bool(score[j] < threshold)
            x = e
        found.append((classify(model, y), steps, rest))
    means = torch.stack([s / max(1, n) for s, n in zip(sums, counts, strict=True)])
    return found, means


def avit_means_of_the_public_code(model, images):
    """The mean d of each layer as the authors' code has it, all rows computed."""
    c, means = model.config, []
    threshold = 1 - c.act_epsilon
    xs = [model.embed(image.unsqueeze(0))[0][0] for image in images]
    scores = [torch.zeros(len(x), dtype=x.dtype) for x in xs]
    masks = [torch.ones(len(x), dtype=torch.bool) for x in xs]
    for number, layer in enumerate(model.encoder.layers):
        gates = []
        for i, x in enumerate(xs):
            m = masks[i].to(x.dtype).unsqueeze(1)
            x = x + (m * x).detach() - x.detach()
            u = x + attend(layer.self_attn, m * layer.norm1(m * x), masks[i], -1000)
            hidden = layer.linear1(m * layer.norm2(m * u))
            e = u + layer.linear2(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))
            gate = torch.sigmoid(c.gate_scale * e[:, 0] - c.gate_center)
            gates.append(gate)
            last = number == c.depth - 1
            scores[i] = scores[i] + (torch.ones_like(gate) if last else gate).detach()
            masks[i] = scores[i] < threshold
            xs[i] = e
        means.append(torch.cat(gates[1:]).mean())
    return torch.stack(means)
