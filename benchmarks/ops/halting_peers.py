"""A-ViT and UViT as one writes them in torch: with masks, or with boolean indexing.

All take the parameters and the halting unit of our model, and return what its loss needs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels.halting import distribution_loss
from adatape_kernels.layers import ElasticEncoderLayer
from adatape_kernels.models import AViT, UViT
from adatape_kernels.models.padded_layer import encode_padded, feed_forward_padded


class PeerOutput(NamedTuple):
    """What a peer returns for a batch."""

    logits: Tensor
    charge: Tensor
    """What the loss adds to the cross entropy, a scalar."""


Forward = Callable[[Tensor], PeerOutput]
HaltingUnit = Callable[[Tensor, Tensor], Tensor]
"""It takes rows (any, dim) or (batch, rows, dim), and the numbers of the units that run."""


def loss(output: PeerOutput, labels: Tensor) -> Tensor:
    """Return the loss of our model."""
    return F.cross_entropy(output.logits, labels) + output.charge


def masked(model: AViT | UViT, probabilities: HaltingUnit) -> Forward:
    """Return the model that computes every row in every layer, so that it is one graph."""
    return _peer(model, _masked_avit if isinstance(model, AViT) else _masked_uvit, probabilities)


def indexed(model: AViT | UViT, probabilities: HaltingUnit) -> Forward:
    """Return the model that goes on with `x[running]`, and pads the rows of A-ViT for attention."""
    return _peer(model, _indexed_avit if isinstance(model, AViT) else _indexed_uvit, probabilities)


def _peer(model: Any, encoder: Callable[..., tuple[Tensor, Tensor]], unit: HaltingUnit) -> Forward:
    layers = [cast(ElasticEncoderLayer, layer) for layer in model.encoder.layers]

    def forward(images: Tensor) -> PeerOutput:
        x, _ = model.embed(images)
        total, charge = encoder(model.config, layers, unit, x)
        rows = model.encoder.norm(total.to(x.dtype))
        pooled = rows[:, 0] if model.config.pooling == "token" else rows.float().mean(1).to(x.dtype)
        return PeerOutput(model.head(pooled), charge)

    return forward


class _Scores(NamedTuple):
    """What has become of each unit so far; of a shape that the units have."""

    score: Tensor
    remainders: Tensor
    updates: Tensor

    @classmethod
    def none(cls, shape: tuple[int, ...], device: torch.device) -> "_Scores":
        zeros = torch.zeros(shape, device=device)
        return cls(zeros, zeros, zeros)

    def step(
        self, p: Tensor, threshold: float, running: Tensor | None, last: bool
    ) -> tuple["_Scores", Tensor, Tensor]:
        """Return what becomes of units, what their states weigh, and which of them run on."""
        reached = self.score + p
        halts = torch.ones_like(reached, dtype=torch.bool) if last else reached > threshold
        left = 1 - self.score
        weights, runs = torch.where(halts, left, p), torch.ones_like(halts)
        if running is not None:
            halts, weights, runs = halts & running, weights.where(running, 0), running
        after = _Scores(
            torch.where(halts, 1, reached.where(runs, self.score)),
            torch.where(halts, left, self.remainders),
            self.updates + runs,
        )
        return after, weights, runs & ~halts

    def at(self, units: Tensor) -> "_Scores":
        return _Scores(*(values[units] for values in self))

    def put(self, units: Tensor, after: "_Scores") -> "_Scores":
        pairs = zip(self, after, strict=True)
        return _Scores(*(old.index_put((units,), new) for old, new in pairs))

    def ponder(self) -> Tensor:
        return (self.updates + self.remainders).mean()


def _masked_avit(
    config: Any, layers: list[ElasticEncoderLayer], unit: HaltingUnit, x: Tensor
) -> tuple[Tensor, Tensor]:
    batch, seqlen, _ = x.shape
    total, means = torch.zeros_like(x, dtype=torch.float32), []
    scores = _Scores.none((batch, seqlen), x.device)
    every = torch.arange(batch * seqlen, device=x.device)
    running = torch.ones(batch, seqlen, dtype=torch.bool, device=x.device)
    for number, layer in enumerate(layers):
        # An example none of whose rows runs sees itself, since a softmax over nothing is NaN.
        keys = running | ~running.any(1, keepdim=True)
        x = encode_padded(layer, x.where(running.unsqueeze(2), 0), keys, seqlen)
        p = unit(x.flatten(0, 1), every).view(batch, seqlen)
        patches = running[:, 1:]
        means.append(p[:, 1:].where(patches, 0).sum() / patches.sum().clamp(min=1))
        last = number == len(layers) - 1
        scores, weights, running = scores.step(p, 1 - config.act_epsilon, running, last)
        total = total + weights.unsqueeze(2) * x
    return total, _avit_charge(config, scores, means)


def _indexed_avit(
    config: Any, layers: list[ElasticEncoderLayer], unit: HaltingUnit, x: Tensor
) -> tuple[Tensor, Tensor]:
    batch, seqlen, dim = x.shape
    x = x.flatten(0, 1)
    total, means = torch.zeros_like(x, dtype=torch.float32), []
    scores = _Scores.none((len(x),), x.device)
    place = torch.arange(len(x), device=x.device)
    for number, layer in enumerate(layers):
        if not len(place):
            means.append(total.new_zeros(()))
            continue
        x = _layer_of_ragged_rows(layer, x, place // seqlen, batch)
        p = unit(x, place)
        patches = place % seqlen != 0
        means.append(p.where(patches, 0).sum() / patches.sum().clamp(min=1))
        last = number == len(layers) - 1
        after, weights, on = scores.at(place).step(p, 1 - config.act_epsilon, None, last)
        scores = scores.put(place, after)
        total = total.index_add(0, place, weights.unsqueeze(1) * x)
        x, place = x[on], place[on]
    return total.view(batch, seqlen, dim), _avit_charge(config, scores, means)


def _layer_of_ragged_rows(
    layer: ElasticEncoderLayer, x: Tensor, example: Tensor, batch: int
) -> Tensor:
    """Apply a layer to rows, of which those of an example lie together; attention is padded."""
    attention = layer.self_attn
    lens = example.bincount(minlength=batch)
    exists = torch.arange(int(lens.max()), device=x.device) < lens.unsqueeze(1)
    qkv = F.linear(layer.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
    padded = qkv.new_zeros(*exists.shape, qkv.shape[1]).index_put((exists,), qkv)
    q, k, v = padded.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    seen = (exists | (lens == 0).unsqueeze(1))[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    x = x + attention.out_proj(out.transpose(1, 2).flatten(2)[exists])
    return x + feed_forward_padded(layer, layer.norm2(x), 0)


def _masked_uvit(
    config: Any, layers: list[ElasticEncoderLayer], unit: HaltingUnit, x: Tensor
) -> tuple[Tensor, Tensor]:
    batch, seqlen, _ = x.shape
    total, scores = torch.zeros_like(x, dtype=torch.float32), _Scores.none((batch,), x.device)
    every = torch.arange(batch, device=x.device)
    running = torch.ones(batch, dtype=torch.bool, device=x.device)
    for layer in layers:
        p = unit(x, every)
        x = encode_padded(layer, x, None, seqlen)
        scores, weights, running = scores.step(p, 1 - config.act_epsilon, running, False)
        weights = weights[:, None, None]
        total = weights * x + (1 - weights) * total
    return total, config.ponder_weight * scores.ponder()


def _indexed_uvit(
    config: Any, layers: list[ElasticEncoderLayer], unit: HaltingUnit, x: Tensor
) -> tuple[Tensor, Tensor]:
    batch, seqlen, _ = x.shape
    total, scores = torch.zeros_like(x, dtype=torch.float32), _Scores.none((batch,), x.device)
    place = torch.arange(batch, device=x.device)
    for layer in layers:
        if not len(place):
            break
        p = unit(x, place)
        x = encode_padded(layer, x, None, seqlen)
        after, weights, on = scores.at(place).step(p, 1 - config.act_epsilon, None, False)
        scores = scores.put(place, after)
        weights = weights[:, None, None]
        total = total.index_put((place,), weights * x + (1 - weights) * total[place])
        if not bool(on.all()):
            x, place = x[on], place[on]
    return total, config.ponder_weight * scores.ponder()


def _avit_charge(config: Any, scores: _Scores, means: list[Tensor]) -> Tensor:
    center = config.distribution_center * config.depth
    distribution = distribution_loss(torch.stack(means), center)
    return config.ponder_weight * scores.ponder() + config.distribution_weight * distribution
