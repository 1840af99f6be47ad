"""AdaTape on the parity task: one token for the whole sequence, a bank token for each element."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from adatape_kernels.arguments import check_kind
from adatape_kernels.models.adatape import AdaTape
from adatape_kernels.models.config import AdaTapeConfig
from adatape_kernels.models.encoder_config import MOST_TOKENS, MOST_VALUES
from adatape_kernels.models.model_file import saved_with
from adatape_kernels.models.value_checks import as_flag


@dataclass(frozen=True)
class AdaTapeParityConfig(AdaTapeConfig):
    """An AdaTapeConfig with the length of a sequence and the width of its elements.

    Raises:
        ValueError: as in AdaTapeConfig, or a sequence has fewer elements than topk.

    Source: SPEC 2.

    Example:
        >>> import adatape_kernels as ak
        >>> ak.models.AdaTapeParityConfig(
        ...     num_classes=2, dim=24, depth=2, num_heads=2, ffn_dim=32
        ... ).seq_len
        40
    """

    seq_len: int = 40
    """Most elements of a sequence."""
    element_dim: int = 3
    """Number of features of an element, which is a one-hot symbol."""
    sequence_token: bool = True
    """Whether a token stands for the whole sequence. Without it the class token is the only input,
    and the model knows a sequence through its tape alone."""

    def _check_values(self) -> None:
        super()._check_values()
        self._check_integer("seq_len", 1, MOST_TOKENS)
        self._check_integer("element_dim", 1, MOST_VALUES // self.seq_len)
        if self.bank == "input" and self.seq_len < self.topk:
            raise ValueError(f"topk: expected at most seq_len = {self.seq_len}, got {self.topk}")
        as_flag("sequence_token", self.sequence_token)
        if not self.sequence_token and (self.pooling, self.bank) != ("token", "input"):
            raise ValueError(
                "sequence_token: expected True unless pooling is 'token' and bank 'input', "
                f"got False with {self.pooling!r} and {self.bank!r}"
            )

    def _parameters(self) -> Iterator[tuple[str, int]]:
        yield from super()._parameters()
        elements = self.seq_len + 1 if self.sequence_token else 1
        yield "dim, seq_len, element_dim", self.dim * elements * self.element_dim


@saved_with(AdaTapeParityConfig)
class AdaTapeParity(AdaTape):
    """A classifier of sequences (batch, length, element_dim), of length topk to seq_len.

    One token stands for the whole sequence, unless the configuration leaves it out; single elements
    reach the model through the tape. In the token of a shorter sequence the features of the
    elements that it lacks are 0.

    Args:
        config: sizes and choices.

    Raises:
        TypeError: config is no AdaTapeParityConfig.

    Source: SPEC 2; scenic's AdaTape on the parity task.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> config = ak.models.AdaTapeParityConfig(
        ...     num_classes=2, dim=24, depth=2, num_heads=2, ffn_dim=32
        ... )
        >>> symbols = torch.arange(5 * 40).view(5, 40) % 3
        >>> sequences = torch.nn.functional.one_hot(symbols).float()
        >>> ak.models.AdaTapeParity(config)(sequences).logits.shape
        torch.Size([5, 2])
    """

    bank_repeats_rows = True

    config: AdaTapeParityConfig

    def __init__(self, config: AdaTapeParityConfig):
        check_kind("config", config, AdaTapeParityConfig)
        super().__init__(config)
        self.sequence_embed: nn.Linear | None = None
        if config.sequence_token:
            self.sequence_embed = nn.Linear(config.seq_len * config.element_dim, config.dim)
        if config.bank == "input":
            self.pre_bank = nn.Linear(config.element_dim, config.dim)

    def _stem(self) -> tuple[str, ...]:
        return ("sequence_embed", "pre_bank", *super()._stem())

    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Flatten each sequence into one token, and make each element a bank token.

        Args:
            inputs: (batch, length, element_dim), of length topk to seq_len, or 1 to seq_len where
                the bank is learnable.

        Returns:
            Input tokens (batch, 1 (+ 1), dim), with the class token where the model has one and the
            sequence's where it has that; and the bank (batch, length, dim), None where it is
            learnable.

        Raises:
            TypeError: inputs is no tensor.
            ValueError: the sequences' shape is not the configured one.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.AdaTapeParity(ak.models.AdaTapeParityConfig(
            ...     num_classes=2, dim=24, depth=1, num_heads=2, ffn_dim=32
            ... ))
            >>> tokens, bank = model.embed(torch.zeros(5, 40, 3))
            >>> tokens.shape, bank.shape
            (torch.Size([5, 2, 24]), torch.Size([5, 40, 24]))
        """
        check_kind("inputs", inputs, Tensor)
        c = self.config
        least = c.topk if c.bank == "input" else 1
        length, features = inputs.shape[1:] if inputs.dim() == 3 else (0, 0)
        if not least <= length <= c.seq_len or features != c.element_dim:
            lengths = c.seq_len if least == c.seq_len else f"{least} to {c.seq_len}"
            raise ValueError(
                f"inputs: expected (batch, ({lengths}, {c.element_dim})), got {tuple(inputs.shape)}"
            )
        if self.sequence_embed is not None:
            lacking = c.seq_len - length
            whole = functional.pad(inputs, (0, 0, 0, lacking)) if lacking else inputs
            tokens = self.sequence_embed(whole.flatten(1)).unsqueeze(1)
        else:
            tokens = inputs.new_zeros(inputs.shape[0], 0, c.dim)
        tokens = self.with_class_token(tokens)
        if c.bank == "learn":
            return tokens, None
        # The product with a one-hot element is a row of the weights plus zeros, which rounds
        # nothing: equal elements give bank rows of equal bits, wherever they stand.
        return tokens, self.pre_bank(inputs)
