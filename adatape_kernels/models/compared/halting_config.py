"""What models are made of whose examples or rows halt."""

from dataclasses import dataclass
from typing import Any, Literal

from adatape_kernels.models.compared.sequences import TransformerConfig, TransformerOptions
from adatape_kernels.models.encoder_config import MOST_LAYERS, EncoderConfig, EncoderOptions
from adatape_kernels.models.image_config import ViTConfig, ViTOptions
from adatape_kernels.models.value_checks import as_choice, as_flag
from adatape_kernels.op_types import Activation

ActType = Literal["basic", "accumulated", "none"]
"""How an output takes in the states of the steps, as in `Halting.update`; "none" halts nothing."""
HaltingLevel = Literal["example", "row"]
"""What halts, or leaves, on its own: whole examples, or each row."""


@dataclass(frozen=True)
class UniversalConfig(EncoderConfig):
    """An EncoderConfig whose depth is the most steps that an example takes, and when it halts.

    Raises:
        ValueError: as in EncoderConfig, or rows are to leave where examples halt.

    Source: SPEC 11.

    Example:
        >>> import adatape_kernels as ak
        >>> config = ak.models.UniversalConfig(
        ...     num_classes=10, dim=64, depth=6, num_heads=4, ffn_dim=128, distinct_layers=2
        ... )
        >>> config.num_layers, config.act_epsilon
        (2, 0.01)
    """

    distinct_layers: int = 1
    """Number of layers that take turns: 1 is shared by all steps; 0 stands for one a step."""
    act_epsilon: float = 0.01
    """What halts has a score above 1 - act_epsilon."""
    act_type: ActType = "basic"
    """Either "basic", y = w·s + (1 - w)·y, "accumulated", y = y + w·s, or "none": no halting."""
    act_level: HaltingLevel = "example"
    """What halts on its own: an example, "example", or each row, "row"."""
    leave: HaltingLevel = "example"
    """When rows leave: with all others of their example, or each at once ("row")."""
    force_halt: bool = False
    """Whether the last step gives the remainder to all that still run."""
    halting_bias_init: float = -1.0
    """The bias of the halting unit at first."""
    ponder_weight: float = 0.01
    """The factor of the ponder loss, the mean of N + R, within the loss."""

    def _check_values(self) -> None:
        super()._check_values()
        self._check_integer("distinct_layers", 0, min(self.depth, MOST_LAYERS))
        check_epsilon(self)
        as_choice("act_type", self.act_type, ("basic", "accumulated", "none"))
        as_choice("act_level", self.act_level, ("example", "row"))
        as_choice("leave", self.leave, ("example", "row"))
        if self.leave == "row" and self.act_level == "example":
            raise ValueError("leave: expected 'example' where examples halt, got 'row'")
        as_flag("force_halt", self.force_halt)
        self._check_number("halting_bias_init")
        if abs(self.halting_bias_init) == float("inf"):
            raise ValueError(
                f"halting_bias_init: expected a finite number, got {self.halting_bias_init}"
            )
        self._check_factor("ponder_weight")

    @property
    def num_layers(self) -> int:
        """Number of layers that have parameters of their own.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.create_model("u2t_tiny_patch16_224").config.num_layers
            2
        """
        return self.distinct_layers or self.depth

    def _layer_parameters(self) -> int:
        return super()._layer_parameters() // self.depth * self.num_layers


def check_epsilon(config: Any) -> None:
    """Check the field act_epsilon of a configuration, and make it a float.

    Raises:
        ValueError: it is no number above 0 and below 1.
    """
    config._check_number("act_epsilon")
    if not 0 < 1 - config.act_epsilon < 1:
        raise ValueError(
            f"act_epsilon: expected above 1.1e-16 and below 1, got {config.act_epsilon}"
        )


class UniversalOptions(EncoderOptions, total=False):
    """The fields of UniversalConfig as keyword arguments, for factories and type checkers.

    Example:
        >>> import adatape_kernels as ak
        >>> options: ak.models.UniversalOptions = {"act_epsilon": 0.1, "depth": 3}
        >>> ak.models.create_model("uvit_tiny_patch16_224", **options).config.depth
        3
    """

    distinct_layers: int
    act_epsilon: float
    act_type: ActType
    act_level: HaltingLevel
    leave: HaltingLevel
    force_halt: bool
    halting_bias_init: float
    ponder_weight: float


@dataclass(frozen=True)
class UViTConfig(UniversalConfig, ViTConfig):
    """A UniversalConfig and a ViTConfig in one; by default each step has a layer of its own.

    Raises:
        ValueError: as in UniversalConfig and in ViTConfig.

    Source: SPEC 11.

    Example:
        >>> import adatape_kernels as ak
        >>> ak.models.UViTConfig.of("B/16").num_layers
        12
    """

    distinct_layers: int = 0
    """Number of layers that take turns: 1 is shared by all steps; 0 stands for one a step."""


class UViTOptions(UniversalOptions, ViTOptions, total=False):
    """The fields of UViTConfig as keyword arguments, for factories and type checkers.

    Example:
        >>> import adatape_kernels as ak
        >>> options: ak.models.UViTOptions = {"act_level": "row", "image_size": 32}
        >>> ak.models.create_model("uvit_tiny_patch16_224", **options).config.act_level
        'row'
    """


@dataclass(frozen=True)
class UniversalTransformerConfig(UniversalConfig, TransformerConfig):
    """A UniversalConfig and a TransformerConfig in one; by default all steps share one layer.

    Raises:
        ValueError: as in UniversalConfig and in TransformerConfig.

    Source: SPEC 11.

    Example:
        >>> import adatape_kernels as ak
        >>> config = ak.models.UniversalTransformerConfig(
        ...     num_classes=2, dim=24, depth=6, num_heads=2, ffn_dim=32
        ... )
        >>> config.num_layers, config.seq_len
        (1, 40)
    """


class UniversalTransformerOptions(UniversalOptions, TransformerOptions, total=False):
    """The fields of UniversalTransformerConfig as keyword arguments.

    Example:
        >>> import adatape_kernels as ak
        >>> options: ak.models.UniversalTransformerOptions = {"seq_len": 9, "force_halt": True}
        >>> ak.models.create_model("universal_transformer_tiny", **options).config.seq_len
        9
    """


@dataclass(frozen=True)
class AViTConfig(ViTConfig):
    """A ViTConfig with the gate by which rows halt, and what halting is charged.

    Raises:
        ValueError: as in ViTConfig, or a value is out of range.

    Source: SPEC 12.

    Example:
        >>> import adatape_kernels as ak
        >>> ak.models.AViTConfig.of("S/16").gate_center
        75.0
    """

    activation: Activation = "gelu"
    """That of the feed-forward; "gelu" is GELU's exact form."""
    act_epsilon: float = 0.01
    """What halts has a score above 1 - act_epsilon."""
    gate_scale: float = 10.0
    """The factor of a row's first feature in its halting probability."""
    gate_center: float = 30.0
    """What is taken away from that product before the sigmoid."""
    keep_class_token: bool = False
    """Whether the class token runs to the last layer."""
    ponder_weight: float = 5e-4
    """The factor of the ponder loss, the mean of N + R, within the loss."""
    distribution_weight: float = 1e-3
    """The factor within the loss of how far halting is from a normal distribution over layers."""
    distribution_center: float = 0.75
    """The center of that distribution, as a share of the depth."""

    def _check_values(self) -> None:
        super()._check_values()
        check_epsilon(self)
        for name in ("gate_scale", "gate_center"):
            self._check_number(name)
            if abs(getattr(self, name)) == float("inf"):
                raise ValueError(f"{name}: expected a finite number, got {getattr(self, name)}")
        as_flag("keep_class_token", self.keep_class_token)
        if self.keep_class_token and not self.has_class_token:
            raise ValueError("keep_class_token: expected False without a class token, got True")
        self._check_factor("ponder_weight")
        self._check_factor("distribution_weight")
        self._check_number("distribution_center")
        least = 1 / self.depth if self.depth > 1 else 0
        if not least < self.distribution_center <= 1:
            raise ValueError(
                f"distribution_center: expected above {least:.3g} and up to 1, "
                f"got {self.distribution_center}"
            )

    @classmethod
    def _defaults_of(cls, size: str, patch: int, given: dict[str, Any]) -> dict[str, Any]:
        return {"gate_center": 30.0 if size == "Ti" else 75.0}


class AViTOptions(ViTOptions, total=False):
    """The fields of AViTConfig as keyword arguments, for factories and type checkers.

    Example:
        >>> import adatape_kernels as ak
        >>> options: ak.models.AViTOptions = {"gate_scale": 100.0, "gate_center": 3.0}
        >>> ak.models.create_model("avit_tiny_patch16_224", **options).config.gate_scale
        100.0
    """

    act_epsilon: float
    gate_scale: float
    gate_center: float
    keep_class_token: bool
    ponder_weight: float
    distribution_weight: float
    distribution_center: float
