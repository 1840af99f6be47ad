"""The sizes and choices that every AdaTape model is made of."""

import math
from dataclasses import dataclass
from typing import Literal, TypedDict

from adatape_kernels.arguments import shown
from adatape_kernels.layers import QueryType
from adatape_kernels.models.value_checks import as_choice, as_flag, as_integer, as_number
from adatape_kernels.op_types import ACTIVATIONS, Activation, LossType
from adatape_kernels.ops.reading_checks import MAX_TOPK
from adatape_kernels.pooling import Pooling

BankKind = Literal["input", "learn"]
"""Where a bank comes from: from the example itself, or from parameters."""

MOST_TOKENS = 1 << 20
"""Most tokens that an example's input, bank or tape may have."""
MOST_VALUES = 1 << 28
"""Most numbers that one example may consist of: 1 GiB in float32."""
MOST_PARAMETERS = 1 << 36
"""Most parameters that the layers of a model may have: 256 GiB in float32."""
MOST_LAYERS = 1 << 12
"""Most layers of a model; each costs time when a model is built, however narrow it is."""

# Names of a bank's tokens are int32.
_MOST_BANK_TOKENS = (1 << 31) - 1


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
    activation: Activation = "gelu_tanh"
    """That of the feed-forward for input rows; "gelu" is GELU's exact form."""

    def __post_init__(self) -> None:
        """Check every value, so that what is wrong shows here and not in the first step."""
        as_choice("bank", self.bank, ("input", "learn"))
        as_choice("pooling", self.pooling, ("token", "mean", "max", "sum"))
        as_choice("query", self.query, ("token", "gap"))
        as_choice("loss_type", self.loss_type, ("entropy", "max"))
        as_choice("activation", self.activation, ACTIVATIONS)
        as_flag("average_query", self.average_query)
        for name in ("num_classes", "dim", "depth", "num_heads", "ffn_dim"):
            self._check_integer(name, 1, MOST_PARAMETERS)
        for name in ("tape_ffn_dim", "tape_mlp_dim"):
            self._check_integer(name, 0, MOST_PARAMETERS)
        self._check_integer("bank_size", 1, _MOST_BANK_TOKENS)
        self._check_integer("num_tape_tokens", 0, MOST_TOKENS)
        self._check_integer("topk", 1, MAX_TOPK)
        self._check_integer("key_split", 1, self.dim)
        if self.dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of dim = {self.dim}, got {self.num_heads}"
            )
        self._check_numbers()
        if self._layer_parameters() > MOST_PARAMETERS:
            raise ValueError(
                "dim, depth, ffn_dim: expected sizes that make up to 2**36 parameters, "
                f"got {self._layer_parameters():,}"
            )
        as_integer("depth", self.depth, 1, MOST_LAYERS)
        self._check_reads()
        if self._parameters() > MOST_PARAMETERS:
            raise ValueError(
                "dim, bank_size, tape_mlp_dim: expected sizes that make up to 2**36 parameters, "
                f"got {self._parameters():,}"
            )

    def _set(self, name: str, value: object) -> None:
        """Replace a field by an equal value of the type that it is declared with."""
        object.__setattr__(self, name, value)

    def _check_integer(self, name: str, least: int, most: int) -> None:
        self._set(name, as_integer(name, getattr(self, name), least, most))

    def _check_numbers(self) -> None:
        names = ("halt_threshold", "query_noise", "ponder_weight")
        shares = ("dropout", "attention_dropout", "stochastic_depth", "bank_dropout")
        for name in (*names, *shares):
            self._set(name, as_number(name, getattr(self, name)))
        for name in ("query_noise", "ponder_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}: expected a finite number of 0 or more, got {getattr(self, name)}"
                )
        for name in shares:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 to below 1, got {getattr(self, name)}")

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
        """Return about how many parameters the layers and the head have."""
        layer = self.dim * (4 * self.dim + 2 * self.ffn_dim + 2 * self.tape_ffn_dim)
        return self.depth * layer + self.dim * self.num_classes

    def _parameters(self) -> int:
        """Return about how many parameters a model has; subclasses add what they embed with."""
        bank = self.bank_size if self.bank == "learn" else 0
        reader = self.dim * (bank + 3 * self.tape_mlp_dim)
        return self._layer_parameters() + len(self.read_layers) * reader


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
    activation: Activation
