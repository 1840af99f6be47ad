"""The sizes and choices of an encoder, which every model has."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

from adatape_kernels.layers import NORM_EPS
from adatape_kernels.models.value_checks import as_choice, as_flag, as_integer, as_number
from adatape_kernels.op_types import ACTIVATIONS, Activation
from adatape_kernels.pooling import Pooling

MOST_TOKENS = 1 << 20
"""Most tokens that an example's input, bank or tape may have."""
MOST_VALUES = 1 << 28
"""Most numbers that one example may consist of: 1 GiB in float32."""
MOST_PARAMETERS = 1 << 36
"""Most parameters that a model may have: 256 GiB in float32."""
MOST_LAYERS = 1 << 12
"""Most layers of a model; each costs time when a model is built, however narrow it is."""


@dataclass(frozen=True)
class EncoderConfig:
    """What every model is made of: a Transformer's encoder, a pooling and a head.

    Raises:
        ValueError: a value is out of range, or values contradict one another.

    Source: SPEC 6.

    Example:
        >>> import adatape_kernels as ak
        >>> config = ak.models.EncoderConfig(
        ...     num_classes=10, dim=64, depth=2, num_heads=4, ffn_dim=128
        ... )
        >>> config.pooling, config.activation
        ('token', 'gelu_tanh')
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
    pooling: Pooling = "token"
    """What the head sees; "token" is the class token, or without one the first of the input."""
    dropout: float = 0.0
    """Probability with which training drops an activation or an output of a branch."""
    attention_dropout: float = 0.0
    """Probability with which training drops an attention weight."""
    stochastic_depth: float = 0.0
    """Probability with which training drops a branch of the last layer; earlier ones have less."""
    activation: Activation = "gelu_tanh"
    """That of the feed-forward for input rows; "gelu" is GELU's exact form."""
    norm_eps: float = NORM_EPS
    """Epsilon of the encoder's LayerNorms; that of a reader's is always 1e-6."""
    norm_after_pooling: bool = False
    """Whether the last LayerNorm is applied to what the head sees rather than to every row."""
    num_registers: int = 0
    """Learned tokens that follow the class token and that the head does not see."""
    class_token: bool = True
    """Whether a model with the pooling "token" has a class token, which is learned, in front."""
    representation_size: int = 0
    """Width of a dense layer and tanh before the head; 0 for none."""

    def __post_init__(self) -> None:
        """Check every value, so that what is wrong shows here and not in the first step."""
        self._check_values()
        parameters = 0
        for names, added in self._parameters():
            parameters += added
            if parameters > MOST_PARAMETERS:
                raise ValueError(
                    f"{names}: expected sizes that make up to 2**36 parameters, got {parameters:,}"
                )
        as_integer("depth", self.depth, 1, MOST_LAYERS)

    def _check_values(self) -> None:
        """Check each field by itself, and with others; subclasses go on with their own."""
        as_choice("pooling", self.pooling, ("token", "mean", "max", "sum"))
        as_choice("activation", self.activation, ACTIVATIONS)
        as_flag("norm_after_pooling", self.norm_after_pooling)
        for name in ("num_classes", "dim", "depth", "num_heads", "ffn_dim"):
            self._check_integer(name, 1, MOST_PARAMETERS)
        self._check_integer("num_registers", 0, MOST_TOKENS)
        as_flag("class_token", self.class_token)
        if self.num_registers and self.pooling == "token" and not self.class_token:
            raise ValueError(
                "num_registers: expected 0 where the head sees the first token of the input, "
                f"got {self.num_registers}"
            )
        self._check_integer("representation_size", 0, MOST_PARAMETERS)
        if self.representation_size and self.norm_after_pooling:
            raise ValueError(
                "representation_size: expected 0 where the last LayerNorm follows pooling, "
                f"got {self.representation_size}"
            )
        if self.dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of dim = {self.dim}, got {self.num_heads}"
            )
        for name in ("dropout", "attention_dropout", "stochastic_depth"):
            self._check_share(name)
        self._check_factor("norm_eps")
        if self.norm_eps == 0:
            raise ValueError("norm_eps: expected more than 0, which rows of zeros need, got 0")

    def _parameters(self) -> Iterator[tuple[str, int]]:
        """Yield about how many parameters there are, and the names of fields that they grow with.

        Each class adds its own to those of the classes that it extends.
        """
        yield "dim, depth, ffn_dim", self._layer_parameters() + self.dim * self.num_classes
        yield "dim, num_registers", self.num_registers * self.dim
        head = self.representation_size * (self.dim + self.num_classes)
        yield "dim, num_classes, representation_size", head

    @property
    def has_class_token(self) -> bool:
        """Whether the model has a learned token in front of all others.

        Example:
            >>> import adatape_kernels as ak
            >>> model = ak.models.create_model("vit_tiny_patch16_224", depth=1, pooling="mean")
            >>> model.config.has_class_token
            False
        """
        return self.pooling == "token" and self.class_token

    def _layer_parameters(self) -> int:
        """Return about how many parameters the layers have."""
        return self.depth * self.dim * (4 * self.dim + 2 * self.ffn_dim)

    def _set(self, name: str, value: object) -> None:
        """Replace a field by an equal value of the type that it is declared with."""
        object.__setattr__(self, name, value)

    def _check_integer(self, name: str, least: int, most: int) -> None:
        self._set(name, as_integer(name, getattr(self, name), least, most))

    def _check_number(self, name: str) -> None:
        self._set(name, as_number(name, getattr(self, name)))

    def _check_factor(self, name: str) -> None:
        self._check_number(name)
        if not 0 <= getattr(self, name) < math.inf:
            raise ValueError(
                f"{name}: expected a finite number of 0 or more, got {getattr(self, name)}"
            )

    def _check_share(self, name: str) -> None:
        self._check_number(name)
        if not 0 <= getattr(self, name) < 1:
            raise ValueError(f"{name}: expected 0 to below 1, got {getattr(self, name)}")


class EncoderOptions(TypedDict, total=False):
    """The fields of EncoderConfig as keyword arguments, for factories and type checkers.

    Example:
        >>> import adatape_kernels as ak
        >>> options: ak.models.EncoderOptions = {"depth": 1, "num_classes": 5}
        >>> ak.models.create_model("vit_tiny_patch16_224", **options).config.depth
        1
    """

    num_classes: int
    dim: int
    depth: int
    num_heads: int
    ffn_dim: int
    pooling: Pooling
    dropout: float
    attention_dropout: float
    stochastic_depth: float
    activation: Activation
    norm_eps: float
    norm_after_pooling: bool
    num_registers: int
    class_token: bool
    representation_size: int
