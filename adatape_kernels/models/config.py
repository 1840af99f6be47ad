"""The sizes and choices that every AdaTape model is made of."""

from dataclasses import dataclass
from typing import Literal, TypedDict

from adatape_kernels.elastic import Pooling
from adatape_kernels.layers import QueryType
from adatape_kernels.reference import LossType

BankKind = Literal["input", "learn"]
"""Where a bank comes from: from the example itself, or from parameters."""


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
        """Check what the modules, which see one value each, cannot."""
        if self.bank not in ("input", "learn"):
            raise ValueError(f"bank: expected 'input' or 'learn', got {self.bank!r}")
        if self.pooling not in ("token", "mean", "max", "sum"):
            raise ValueError(f"pooling: expected token, mean, max or sum, got {self.pooling!r}")
        if self.query == "token" and self.pooling != "token":
            raise ValueError(
                f"query: expected 'gap' with pooling {self.pooling!r}, which has no class token, "
                "got 'token'"
            )
        if len(set(self.read_layers)) != len(self.read_layers):
            raise ValueError(f"read_layers: expected distinct layers, got {self.read_layers}")
        for name in ("dropout", "attention_dropout", "stochastic_depth", "bank_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 to below 1, got {getattr(self, name)}")


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
