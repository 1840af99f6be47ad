"""What models have in common whose examples or rows halt, and leave or lie unused."""

import dataclasses
from abc import ABC
from typing import TYPE_CHECKING, cast

from torch import nn

from adatape_kernels.arguments import check_flag
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.halting import Halting
from adatape_kernels.layers import Halted
from adatape_kernels.layers.halting_encoder import ApplyLayer
from adatape_kernels.models.classifier import Classifier, Encoded
from adatape_kernels.models.embedding import ModelInputs
from adatape_kernels.models.output import AdaTapeOutput, HaltedUnits


class HaltingClassifier(Classifier, ABC):
    """A classifier whose encoder has a rule by which examples or rows halt.

    Args:
        config: sizes and choices.

    Raises:
        TypeError: config is no EncoderConfig.

    Source: SPEC 11 and 12.

    Example:
        >>> import adatape_kernels as ak
        >>> model = ak.models.create_model("avit_tiny_patch16_224", depth=1)
        >>> isinstance(model, ak.models.HaltingClassifier)
        True
    """

    def forward(self, inputs: ModelInputs, *, static: bool = False) -> AdaTapeOutput:
        """Classify a batch.

        Args:
            inputs: what the subclass embeds, on the parameters' device and in their dtype.
            static: True keeps the size of every buffer, so that nothing is copied to the host and
                a CUDA graph can be captured; rows that left lie unused behind the others. False
                computes exactly the rows that run, and stops when none does.

        Raises:
            ValueError: the inputs do not fit the model.
            TypeError: static is no flag.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("uvit_tiny_patch16_224", image_size=32, depth=6)
            >>> output = model(torch.zeros(2, 3, 32, 32), static=True)
            >>> output.halted.steps.tolist(), output.halted.rows_per_step
            ([4, 4], (10, 10, 10, 10, 10, 10))
        """
        encoded = self.encode(inputs, static=static)
        return self.output_of(encoded, self.forward_head(encoded.batch))

    if TYPE_CHECKING:
        __call__ = forward

    def encode(self, inputs: ModelInputs, *, static: bool = False) -> Encoded:
        """Embed and encode a batch.

        Args:
            inputs, static: as for `forward`.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("avit_tiny_patch16_224", image_size=32, depth=2)
            >>> model.encode(torch.zeros(2, 3, 32, 32), static=True).batch.lens.tolist()
            [5, 5]
        """
        check_flag("static", static)
        tokens = self.embed_elastic(inputs).tokens
        return self.encode_rows(tokens, self._apply_layer, static=static)

    def encode_rows(
        self,
        tokens: ElasticBatch,
        apply: ApplyLayer,
        *,
        masked: bool = False,
        static: bool = False,
    ) -> Encoded:
        """Encode embedded rows, applying the layers in a way of the caller's own.

        Args:
            tokens, apply, masked: as in `Classifier.encode_rows`.
            static: as for `forward`.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("uvit_tiny_patch16_224", image_size=32, depth=5)
            >>> tokens = model.embed_elastic(torch.zeros(2, 3, 32, 32)).tokens
            >>> encoded = model.encode_rows(tokens, lambda layer, rows, state: layer(rows))
            >>> encoded.halted.steps.tolist()
            [4, 4]
        """
        return encoded_of(halted_by(self.encoder, tokens, apply, masked=masked, static=static))


def halted_by(
    encoder: nn.Module,
    tokens: ElasticBatch,
    apply: ApplyLayer,
    *,
    masked: bool = False,
    static: bool = False,
) -> Halted:
    """Return what an encoder makes of rows, whose rule is made one that masks or is static."""
    rule = cast(Halting | None, encoder.halting)
    if rule is not None and (masked or static):
        rule = dataclasses.replace(rule, masked=masked, static=static)
    return cast(Halted, encoder(tokens, apply=apply, halting=rule))


def encoded_of(halted: Halted) -> Encoded:
    """Return what an encoder returned whose examples or rows halt, example by example."""
    state = halted.state
    if state is None:
        return Encoded(halted.batch)
    initial, ponder = state.initial, (state.updates + state.remainders).unsqueeze(1)
    steps, remainders = state.updates, state.remainders
    if state.of_rows:
        ponder = initial.with_data(ponder).pool("mean")
        steps, remainders = (
            initial.with_data(values.unsqueeze(1)).to_padded(initial.max_rows)[0].squeeze(2)
            for values in (steps, remainders)
        )
    units = HaltedUnits(steps, remainders, halted.means, state.rows_per_step)
    return Encoded(halted.batch, (), ponder, units)
