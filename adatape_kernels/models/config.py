"""The sizes and choices that every AdaTape model is made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from adatape_kernels.arguments import shown
from adatape_kernels.layers import QueryType
from adatape_kernels.models.encoder_config import (
    MOST_PARAMETERS,
    MOST_TOKENS,
    EncoderConfig,
    EncoderOptions,
)
from adatape_kernels.models.value_checks import as_choice, as_flag, as_integer
from adatape_kernels.op_types import LossType
from adatape_kernels.ops.reading_checks import MAX_TOPK

BankKind = Literal["input", "learn"]
"""Where a bank comes from: from the example itself, or from parameters."""

# Names of a bank's tokens are int32.
_MOST_BANK_TOKENS = (1 << 31) - 1


@dataclass(frozen=True)
class AdaTapeConfig(EncoderConfig):
    """What every AdaTape model is made of.

    Raises:
        ValueError: a value is out of range, or values contradict one another.

    Source: SPEC 1 to 7.

    Example:
        >>> import adatape_kernels as ak
        >>> config = ak.models.AdaTapeConfig(
        ...     num_classes=10, dim=64, depth=2, num_heads=4, ffn_dim=128, halt_threshold=1.5
        ... )
        >>> config.num_tape_tokens, config.topk
        (10, 5)
    """

    tape_ffn_dim: int = 0
    """Hidden width of the feed-forward for tape rows; 0 shares that of input rows."""
    bank: BankKind = "input"
    """Either "input", a bank made of each example, or "learn", one bank of parameters for all."""
    bank_size: int = 10_000
    """Number of tokens of a learnable bank; an input-driven bank has a size of its own."""
    num_tape_tokens: int = 10
    """Most tape tokens that one read appends to an example."""
    topk: int = 5
    """Number of bank tokens that are merged into one tape token."""
    halt_threshold: float = 2.0
    """An example reads on while its halting score is below this."""
    key_split: int = 1
    """The key of a bank token is its first dim // key_split features."""
    average_query: bool = True
    """Whether a new query is the mean of the last one and of what it read, or the latter alone."""
    loss_type: LossType = "entropy"
    """How a read is charged, as in `ops.tape_select`."""
    query: QueryType = "token"
    """Whether to read with the class token, "token", or the mean of the example's rows, "gap"."""
    read_layers: tuple[int, ...] = (0,)
    """Indices of the layers that a read runs before."""
    tape_mlp_dim: int = 0
    """Hidden width of a GLU feed-forward that tape tokens pass first; 0 for none."""
    ponder_weight: float = 0.01
    """The factor of the ponder loss within the loss."""
    query_noise: float = 0.0
    """Standard deviation of the noise that training adds to a query."""
    bank_dropout: float = 0.0
    """Probability with which training hides a bank token from an example."""

    def _check_values(self) -> None:
        super()._check_values()
        as_choice("bank", self.bank, ("input", "learn"))
        as_choice("query", self.query, ("token", "gap"))
        as_choice("loss_type", self.loss_type, ("entropy", "max"))
        as_flag("average_query", self.average_query)
        for name in ("tape_ffn_dim", "tape_mlp_dim"):
            self._check_integer(name, 0, MOST_PARAMETERS)
        self._check_integer("bank_size", 1, _MOST_BANK_TOKENS)
        self._check_integer("num_tape_tokens", 0, MOST_TOKENS)
        self._check_integer("topk", 1, MAX_TOPK)
        self._check_integer("key_split", 1, self.dim)
        self._check_number("halt_threshold")
        self._check_factor("query_noise")
        self._check_factor("ponder_weight")
        self._check_share("bank_dropout")
        self._check_reads()

    def _check_reads(self) -> None:
        layers = self.read_layers
        if not isinstance(layers, (tuple, list)):
            raise ValueError(f"read_layers: expected a tuple of layers, got {shown(layers)}")
        layers = tuple(as_integer("read_layers", layer, 0, self.depth - 1) for layer in layers)
        if len(set(layers)) != len(layers):
            raise ValueError(f"read_layers: expected distinct layers, got {shown(layers)}")
        self._set("read_layers", layers)
        if self.query == "token" and self.pooling != "token":
            raise ValueError(
                f"query: expected 'gap' with pooling {self.pooling!r}, which has no class token, "
                "got 'token'"
            )
        if self.bank == "learn" and self.read_layers and self.bank_size < self.topk:
            raise ValueError(
                f"topk: expected at most {self.bank_size} (the bank's tokens), got {self.topk}"
            )

    def _layer_parameters(self) -> int:
        return super()._layer_parameters() + self.depth * self.dim * 2 * self.tape_ffn_dim

    def _parameters(self) -> Iterator[tuple[str, int]]:
        yield from super()._parameters()
        bank = self.bank_size if self.bank == "learn" else 0
        reader = self.dim * (bank + 3 * self.tape_mlp_dim)
        yield "dim, bank_size, tape_mlp_dim", len(self.read_layers) * reader


class AdaTapeOptions(EncoderOptions, total=False):
    """The fields of AdaTapeConfig as keyword arguments, for factories and type checkers.

    Example:
        >>> import adatape_kernels as ak
        >>> options: ak.models.AdaTapeOptions = {"num_tape_tokens": 4, "topk": 3}
        >>> ak.models.adatape_vit("Ti/16", depth=1, **options).config.num_tape_tokens
        4
    """

    tape_ffn_dim: int
    bank: BankKind
    bank_size: int
    num_tape_tokens: int
    topk: int
    halt_threshold: float
    key_split: int
    average_query: bool
    loss_type: LossType
    query: QueryType
    read_layers: tuple[int, ...]
    tape_mlp_dim: int
    ponder_weight: float
    query_noise: float
    bank_dropout: float
