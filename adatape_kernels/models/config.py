"""The sizes and choices that every AdaTape model is made of."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, TypedDict

from adatape_kernels.elastic import Pooling
from adatape_kernels.layers import QueryType
from adatape_kernels.op_types import LossType
from adatape_kernels.ops.reading_checks import MAX_TOPK

BankKind = Literal["input", "learn"]
"""Where a bank comes from: from the example itself, or from parameters."""

MOST_TOKENS = 1 << 20
"""Most tokens that an example's input, bank or tape may have."""
MOST_VALUES = 1 << 28
"""Most numbers that one example may consist of: 1 GiB in float32."""
MOST_PARAMETERS = 1 << 36
"""Most parameters that the layers of a model may have: 256 GiB in float32."""

# Names of a bank's tokens are int32.
_MOST_BANK_TOKENS = (1 << 31) - 1


def check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise ValueError unless a value is an integer from `least` to `most`; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}: expected an integer, got {value!r}")
    if int(value) < least or (most is not None and int(value) > most):
        range_ = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {range_}, got {value}")


def check_number(name: str, value: object) -> float:
    """Return a value as a float; raise ValueError where it is no number, as NaN is none."""
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return float(value)


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless a value is one of several words."""
    if value not in tuple(choices):
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


@dataclass(frozen=True)
class AdaTapeConfig:
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

    num_classes: int
    dim: int
    """Width of a token."""
    depth: int
    """Number of encoder layers."""
    num_heads: int
    """Number of attention heads, a divisor of dim."""
    ffn_dim: int
    """Hidden width of the feed-forward for input rows."""
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
    pooling: Pooling = "token"
    """What the head sees; with "token" the model has a class token, otherwise none."""
    ponder_weight: float = 0.01
    """The factor of the ponder loss within the loss."""
    dropout: float = 0.0
    """Probability with which training drops an activation or an output of a branch."""
    attention_dropout: float = 0.0
    """Probability with which training drops an attention weight."""
    stochastic_depth: float = 0.0
    """Probability with which training drops a branch of the last layer; earlier ones have less."""
    query_noise: float = 0.0
    """Standard deviation of the noise that training adds to a query."""
    bank_dropout: float = 0.0
    """Probability with which training hides a bank token from an example."""

    def __post_init__(self) -> None:
        """Check every value, so that what is wrong shows here and not in the first step."""
        check_choice("bank", self.bank, ("input", "learn"))
        check_choice("pooling", self.pooling, ("token", "mean", "max", "sum"))
        check_choice("query", self.query, ("token", "gap"))
        check_choice("loss_type", self.loss_type, ("entropy", "max"))
        if not isinstance(self.average_query, bool):
            raise ValueError(f"average_query: expected True or False, got {self.average_query!r}")
        for name in ("num_classes", "dim", "depth", "num_heads", "ffn_dim"):
            check_integer(name, getattr(self, name), 1)
        for name in ("tape_ffn_dim", "tape_mlp_dim"):
            check_integer(name, getattr(self, name), 0)
        check_integer("bank_size", self.bank_size, 1, _MOST_BANK_TOKENS)
        check_integer("num_tape_tokens", self.num_tape_tokens, 0, MOST_TOKENS)
        check_integer("topk", self.topk, 1, MAX_TOPK)
        check_integer("key_split", self.key_split, 1, self.dim)
        if self.dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of dim = {self.dim}, got {self.num_heads}"
            )
        self._check_numbers()
        self._check_reads()
        if self._layer_parameters() > MOST_PARAMETERS:
            raise ValueError(
                "dim, depth, ffn_dim: expected sizes that make up to 2**36 parameters, "
                f"got {self._layer_parameters():,}"
            )

    def _check_numbers(self) -> None:
        check_number("halt_threshold", self.halt_threshold)
        for name in ("query_noise", "ponder_weight"):
            if not 0 <= check_number(name, getattr(self, name)) < math.inf:
                raise ValueError(
                    f"{name}: expected a finite number of 0 or more, got {getattr(self, name)}"
                )
        for name in ("dropout", "attention_dropout", "stochastic_depth", "bank_dropout"):
            if not 0 <= check_number(name, getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected 0 to below 1, got {getattr(self, name)}")

    def _check_reads(self) -> None:
        if not isinstance(self.read_layers, (tuple, list)):
            raise ValueError(f"read_layers: expected a tuple of layers, got {self.read_layers!r}")
        for layer in self.read_layers:
            check_integer("read_layers", layer, 0, self.depth - 1)
        if len(set(self.read_layers)) != len(self.read_layers):
            raise ValueError(f"read_layers: expected distinct layers, got {self.read_layers}")
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
        """Return about how many parameters the layers, the readers and the head have."""
        layer = self.dim * (4 * self.dim + 2 * self.ffn_dim + 2 * self.tape_ffn_dim)
        bank = self.bank_size if self.bank == "learn" else 0
        reader = self.dim * (bank + 3 * self.tape_mlp_dim)
        readers = len(self.read_layers)
        return self.depth * layer + readers * reader + self.dim * self.num_classes


class AdaTapeOptions(TypedDict, total=False):
    """The fields of AdaTapeConfig as keyword arguments, for factories and type checkers.

    Example:
        >>> import adatape_kernels as ak
        >>> options: ak.models.AdaTapeOptions = {"num_tape_tokens": 4, "topk": 3}
        >>> ak.models.adatape_vit("Ti/16", depth=1, **options).config.num_tape_tokens
        4
    """

    num_classes: int
    dim: int
    depth: int
    num_heads: int
    ffn_dim: int
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
    pooling: Pooling
    ponder_weight: float
    dropout: float
    attention_dropout: float
    stochastic_depth: float
    query_noise: float
    bank_dropout: float
