"""The AdaTape model, from tokens to logits and loss; what it is fed is left to its subclasses."""

from abc import ABC
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adatape_kernels.arguments import check_kind
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.layers import ElasticEncoder, TapeReader
from adatape_kernels.layers.reader import given_limits
from adatape_kernels.layers.recomputed_bank import RecomputedBank
from adatape_kernels.models.classifier import Classifier, Encoded
from adatape_kernels.models.config import AdaTapeConfig
from adatape_kernels.models.embedding import ModelInputs
from adatape_kernels.models.output import AdaTapeOutput
from adatape_kernels.models.padded import PaddedAdaTape


class AdaTape(Classifier, ABC):
    """An elastic encoder with a class token, a head and a loss; subclasses define `embed`.

    Args:
        config: sizes and choices.

    Raises:
        TypeError: config is no AdaTapeConfig.

    Source: SPEC 6 and 7.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> class Sentences(ak.models.AdaTape):
        ...     def embed(self, inputs):  # (batch, seqlen, dim) embeddings are their own bank
        ...         return self.with_class_token(inputs), inputs
        >>> model = Sentences(ak.models.AdaTapeConfig(
        ...     num_classes=3, dim=8, depth=2, num_heads=2, ffn_dim=16, topk=2
        ... ))
        >>> model(torch.randn(4, 20, 8)).logits.shape
        torch.Size([4, 3])
    """

    bank_repeats_rows = False
    """Whether rows of a bank may be equal; the padded model then breaks ties as SPEC 3 does."""

    config: AdaTapeConfig
    encoder: ElasticEncoder

    def __init__(self, config: AdaTapeConfig):
        check_kind("config", config, AdaTapeConfig)
        super().__init__(config)

    def _new_encoder(self) -> ElasticEncoder:
        c = self.config
        first_read = min(c.read_layers, default=c.depth)
        return ElasticEncoder(
            (
                self._new_layer(layer, c.tape_ffn_dim if layer >= first_read else 0)
                for layer in range(c.depth)
            ),
            c.dim,
            {
                layer: TapeReader(
                    c.dim,
                    num_tape_tokens=c.num_tape_tokens,
                    topk=c.topk,
                    halt_threshold=c.halt_threshold,
                    bank_size=c.bank_size if c.bank == "learn" else 0,
                    key_split=c.key_split,
                    query=c.query,
                    average_query=c.average_query,
                    loss_type=c.loss_type,
                    tape_mlp_dim=c.tape_mlp_dim,
                    query_noise=c.query_noise,
                    bank_dropout=c.bank_dropout,
                )
                for layer in sorted(c.read_layers)
            },
            norm_eps=c.norm_eps,
        )

    def forward(
        self,
        inputs: ModelInputs,
        *,
        capacity: int | None = None,
        halt_threshold: float | Tensor | None = None,
        num_tape_tokens: int | None = None,
    ) -> AdaTapeOutput:
        """Classify a batch.

        Args:
            inputs: what the subclass embeds, on the parameters' device and in their dtype.
            capacity: tape rows to reserve for each read, over the whole batch (capacity mode,
                which never synchronises); None computes exactly the rows that are read.
            halt_threshold: an example reads on while its halting score is below this, in the place
                of the configuration's; None leaves that. A scalar tensor is not waited for.
            num_tape_tokens: most tape tokens that a read appends to an example, likewise.

        Raises:
            ValueError: the inputs do not fit the model, the capacity is too small, or a limit is
                NaN or negative.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=5)
            >>> model(torch.zeros(2, 3, 8, 8)).logits.shape
            torch.Size([2, 5])
            >>> model(torch.zeros(2, 3, 8, 8), capacity=20).logits.shape
            torch.Size([2, 5])
            >>> model(torch.zeros(2, 3, 8, 8), num_tape_tokens=1).tape_lens.tolist()
            [1, 1]
        """
        encoded = self.encode(
            inputs,
            capacity=capacity,
            halt_threshold=halt_threshold,
            num_tape_tokens=num_tape_tokens,
        )
        return self.output_of(encoded, self.forward_head(encoded.batch))

    if TYPE_CHECKING:
        __call__ = forward

    def encode(
        self,
        inputs: ModelInputs,
        *,
        capacity: int | None = None,
        halt_threshold: float | Tensor | None = None,
        num_tape_tokens: int | None = None,
    ) -> Encoded:
        """Embed and encode a batch, whose examples read a tape.

        Args:
            inputs, capacity, halt_threshold, num_tape_tokens: as for `forward`.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=5)
            >>> encoded = model.encode(torch.zeros(2, 3, 8, 8))
            >>> encoded.batch.input_lens.tolist(), len(encoded.reads)
            ([5, 5], 1)
        """
        tokens, bank, bank_lens = self._embed_to_read(inputs)
        options: dict[str, Any] = {"bank_lens": bank_lens, "capacity": capacity}
        options |= given_limits(halt_threshold, num_tape_tokens)
        if self._checkpoints:
            options["apply"] = self._apply_layer
        return Encoded(*self.encoder(tokens, bank, **options))

    def _embed_to_read(
        self, inputs: ModelInputs
    ) -> tuple[ElasticBatch, Tensor | RecomputedBank | None, Tensor | None]:
        """Return what `embed_elastic` does, of which the bank may be one that is recomputed."""
        return self.embed_elastic(inputs)

    def _unscaled(self) -> tuple[str, ...]:
        readers = self.encoder.readers
        return (
            *super()._unscaled(),
            *(f"encoder.readers.{layer}.tape_tokens" for layer in readers),
        )

    def padded(self) -> PaddedAdaTape:
        """Return the eager, padded and masked model on the same parameters.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=5)
            >>> elastic, padded = model(images := torch.ones(2, 3, 8, 8)), model.padded()(images)
            >>> torch.allclose(elastic.logits, padded.logits, atol=1e-5)
            True
        """
        return PaddedAdaTape(self)

    def _choices_in_words(self) -> str:
        c = self.config
        reads = f", bank={c.bank}, read_layers={c.read_layers}"
        return f"{reads}, num_tape_tokens={c.num_tape_tokens}, halt_threshold={c.halt_threshold:g}"
