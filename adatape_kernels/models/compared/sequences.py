"""What models of sequences have in common: an embedding of each element, and learned positions."""

from abc import ABC
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adatape_kernels.arguments import check_kind, check_tensor, shown
from adatape_kernels.models.classifier import Classifier
from adatape_kernels.models.embedding import Embedded, ModelInputs, elastic_rows
from adatape_kernels.models.encoder_config import (
    MOST_TOKENS,
    MOST_VALUES,
    EncoderConfig,
    EncoderOptions,
)
from adatape_kernels.models.image_sizes import check_like_parameters


@dataclass(frozen=True)
class TransformerConfig(EncoderConfig):
    """An EncoderConfig with the length of the longest sequence and the width of its elements.

    Raises:
        ValueError: as in EncoderConfig, or a sequence would take more than 1 GiB.

    Source: SPEC 11.

    Example:
        >>> import adatape_kernels as ak
        >>> ak.models.TransformerConfig(
        ...     num_classes=2, dim=24, depth=2, num_heads=2, ffn_dim=32
        ... ).seq_len
        40
    """

    seq_len: int = 40
    """Most elements of a sequence."""
    element_dim: int = 3
    """Number of features of an element, which may be a one-hot symbol."""

    def _check_values(self) -> None:
        super()._check_values()
        self._check_integer("seq_len", 1, MOST_TOKENS)
        self._check_integer("element_dim", 1, MOST_VALUES // self.seq_len)

    def _parameters(self) -> Iterator[tuple[str, int]]:
        yield from super()._parameters()
        yield "dim, seq_len, element_dim", self.dim * (self.seq_len + self.element_dim)


class TransformerOptions(EncoderOptions, total=False):
    """The fields of TransformerConfig as keyword arguments, for factories and type checkers.

    Example:
        >>> import adatape_kernels as ak
        >>> options: ak.models.TransformerOptions = {"seq_len": 100, "depth": 2}
        >>> ak.models.create_model("transformer_tiny", **options).config.seq_len
        100
    """

    seq_len: int
    element_dim: int


class SequenceClassifier(Classifier, ABC):
    """A classifier of sequences (batch, seq_len, element_dim), or of a list of shorter ones.

    Args:
        config: sizes and choices.

    Raises:
        TypeError: config is no TransformerConfig.

    Source: SPEC 11.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.create_model("transformer_tiny", depth=1)
        >>> isinstance(model, ak.models.SequenceClassifier)
        True
    """

    config: TransformerConfig

    def __init__(self, config: TransformerConfig):
        check_kind("config", config, TransformerConfig)
        super().__init__(config)
        c = config
        self.element_embed = nn.Linear(c.element_dim, c.dim)
        self.position = nn.Parameter(torch.empty(1, c.seq_len + self.num_prefix_tokens, c.dim))
        nn.init.normal_(self.position, std=0.02)
        self.dropout = nn.Dropout(c.dropout)

    def _stem(self) -> tuple[str, ...]:
        return ("position", "element_embed", *super()._stem())

    def _unscaled(self) -> tuple[str, ...]:
        return ("position", *super()._unscaled())

    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Make a token of each element.

        Args:
            inputs: (batch, length, element_dim), of length 1 to seq_len.

        Returns:
            Input tokens (batch, length (+ 1), dim), with the class token and the registers that
            the model has, and None, as there is no bank.

        Raises:
            TypeError: inputs is no tensor.
            ValueError: the sequences' shape is not the configured one.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("transformer_tiny", depth=1)
            >>> model.embed(torch.zeros(5, 40, 3))[0].shape
            torch.Size([5, 41, 192])
        """
        c = self.config
        check_kind("inputs", inputs, Tensor)
        wrong = inputs.dim() != 3 or inputs.shape[2] != c.element_dim
        if wrong or not 1 <= inputs.shape[1] <= c.seq_len:
            raise ValueError(
                f"inputs: expected (batch, 1 to {c.seq_len}, {c.element_dim}), "
                f"got {tuple(inputs.shape)}"
            )
        check_like_parameters("inputs", inputs, self.position)
        tokens = self.with_class_token(self.element_embed(inputs))
        return self.dropout(tokens + self.position[:, : tokens.shape[1]]), None

    def embed_elastic(self, inputs: ModelInputs) -> Embedded:
        """Make a token of each element, of sequences of one length or of many.

        Args:
            inputs: as `embed` takes them; or a list or tuple of sequences (length, element_dim).

        Raises:
            TypeError: inputs, or one of the sequences, is of another type altogether.
            ValueError: a sequence's shape is not the configured one; the error names its index.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("transformer_tiny", depth=1)
            >>> model.embed_elastic([torch.zeros(7, 3), torch.zeros(2, 3)]).tokens.lens.tolist()
            [8, 3]
        """
        if isinstance(inputs, Tensor):
            return super().embed_elastic(inputs)
        if not isinstance(inputs, list | tuple):
            raise TypeError(f"inputs: expected a tensor or a list of them, got {shown(inputs)}")
        c = self.config
        if not inputs:
            return super().embed_elastic(self.position.new_empty(0, c.seq_len, c.element_dim))
        tokens = []
        for index, sequence in enumerate(inputs):
            check_tensor(f"inputs[{index}]", sequence)
            if sequence.dim() != 2:
                raise ValueError(
                    f"inputs[{index}]: expected (1 to {c.seq_len}, {c.element_dim}), "
                    f"got {tuple(sequence.shape)}"
                )
            try:
                tokens.append(self.embed(sequence.unsqueeze(0))[0][0])
            except ValueError as error:
                raise ValueError(str(error).replace("inputs:", f"inputs[{index}]:", 1)) from None
        return Embedded(elastic_rows(torch.cat(tokens), [len(rows) for rows in tokens]), None, None)
