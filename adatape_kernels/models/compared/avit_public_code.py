"""A-ViT as its authors' code computes it, padded and masked (SPEC 12, quirks 2 and 4)."""

import dataclasses
from typing import cast

import torch
from torch import Tensor

from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.halting import HaltingState
from adatape_kernels.layers import AViTEncoder, ElasticEncoderLayer, Halted
from adatape_kernels.layers.torch_modules import make_weights
from adatape_kernels.models.classifier import Encoded
from adatape_kernels.models.compared.halting_classifier import encoded_of
from adatape_kernels.models.compared.padded_classifier import PaddedClassifier, padded_rows
from adatape_kernels.models.padded_layer import add_branch, attend_padded, feed_forward_padded

_HALTED_KEY = -1000.0
"""What is added to the score of a key that has halted."""


class PublicCodeAViT(PaddedClassifier):
    """An AViT whose mean halting probabilities are those of the authors' code.

    A layer's mean is over the class token and halted rows too, and leaves the first example out; of
    one example there is none, and the loss has no distribution loss. Its gradient passes a halted
    row along the residual stream, since the product that sets the row to zero is hidden from it.
    Logits, steps and remainders are those of the definition.

    Args:
        model: the model, whose parameters become parameters of this module too.

    Source: SPEC 12; NVlabs/A-ViT at commit 120c9cb.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.create_model("avit_tiny_patch16_224", image_size=32, depth=3)
        >>> model.padded(public_code=True)(torch.zeros(1, 3, 32, 32)).halted.means is None
        True
    """

    def _encoded(self, tokens: ElasticBatch) -> Encoded:
        encoder = cast(AViTEncoder, self.model.encoder)
        rule = dataclasses.replace(encoder.halting, masked=True)
        state, means = rule.start(tokens), []
        layers, example = encoder.layers, tokens.example_of_rows()
        others = (example > 0) & (example < tokens.batch)
        for number, layer in enumerate(layers):
            data = self._apply_layer(cast(ElasticEncoderLayer, layer), state.batch, state).data
            probabilities = encoder.gate(state, data)
            means.append(probabilities[others].mean())
            if encoder.keep_class_token:
                first = torch.zeros_like(others).index_fill(0, tokens.cu_inputs[:-1].long(), True)
                probabilities = probabilities.where(~first, 0)
            if state.done:  # the authors' code goes on to the last layer
                state = dataclasses.replace(state, batch=state.batch.with_data(data))
            else:
                last = number == len(layers) - 1
                state = rule.advance(state, probabilities, data, last=last)
        y = state.output
        mean = torch.stack(means) if tokens.batch > 1 else None
        return encoded_of(Halted(y.with_data(encoder.norm(y.data)), state, mean))

    def _apply_layer(
        self, layer: ElasticEncoderLayer, x: ElasticBatch, state: HaltingState | None
    ) -> ElasticBatch:
        assert state is not None
        make_weights(layer)
        make_weights(layer.self_attn)
        data, exists = padded_rows(x, x.data)
        running, _ = padded_rows(x, state.rows_that_run.unsqueeze(1))
        keys = torch.zeros(data.shape[:2], dtype=data.dtype, device=data.device)
        keys = keys.masked_fill(~running.squeeze(2), _HALTED_KEY)
        if exists is not None:
            keys = keys.masked_fill(~exists, -torch.inf)
        active = running.to(data.dtype)
        y = data + (data * active - data).detach()
        y = add_branch(layer, y, self._attended(layer, y, active, keys), layer.dropout1)
        normed = active * layer.norm2(active * y)
        y = add_branch(layer, y, feed_forward_padded(layer, normed, y.shape[1]), layer.dropout2)
        return x.with_data(y.flatten(0, 1) if exists is None else y[exists])

    @staticmethod
    def _attended(layer: ElasticEncoderLayer, y: Tensor, active: Tensor, keys: Tensor) -> Tensor:
        return attend_padded(layer, active * layer.norm1(active * y), keys)
