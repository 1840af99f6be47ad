"""The sizes of images and of their patches, which every model of images has."""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adatape_kernels.arguments import shown
from adatape_kernels.models.encoder_config import (
    MOST_TOKENS,
    MOST_VALUES,
    EncoderConfig,
    EncoderOptions,
)
from adatape_kernels.models.value_checks import as_flag

if TYPE_CHECKING:  # Python has Unpack and Self from 3.11 on, this package runs from 3.10 on
    from typing_extensions import Self, Unpack

SIZES = {
    "Ti": {"dim": 192, "depth": 12, "num_heads": 3, "ffn_dim": 768},
    "S": {"dim": 384, "depth": 12, "num_heads": 6, "ffn_dim": 1536},
    "B": {"dim": 768, "depth": 12, "num_heads": 12, "ffn_dim": 3072},
    "L": {"dim": 1024, "depth": 24, "num_heads": 16, "ffn_dim": 4096},
}
"""The sizes of the ViT papers."""
_VARIANT = re.compile(rf"({'|'.join(SIZES)})/(0*[1-9][0-9]{{0,8}})")


@dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """An EncoderConfig with the sizes of the images and of their patches, in pixels.

    Raises:
        ValueError: as in EncoderConfig, or patches do not tile the image, or an image would take
            more than 1 GiB or have more than 2**20 patches.

    Source: SPEC 6.

    Example:
        >>> import adatape_kernels as ak
        >>> config = ak.models.ViTConfig(
        ...     num_classes=10, dim=64, depth=2, num_heads=4, ffn_dim=128, image_size=32
        ... )
        >>> config.num_patches
        4
    """

    image_size: int = 224
    """Height and width of an image."""
    in_channels: int = 3
    """Channels of an image."""
    patch_size: int = 16
    """Height and width of the patches that become input tokens; a divisor of image_size."""
    pre_norm: bool = False
    """Whether a LayerNorm follows the sum of embeddings and positions, as in CLIP."""

    def _check_values(self) -> None:
        super()._check_values()
        as_flag("pre_norm", self.pre_norm)
        self._check_integer("in_channels", 1, MOST_TOKENS)
        self._check_integer("image_size", 1, math.isqrt(MOST_VALUES // self.in_channels))
        self._check_patch_size("patch_size")

    def _check_patch_size(self, name: str) -> None:
        """Check that patches tile the image."""
        self._check_integer(name, 1, self.image_size)
        size = getattr(self, name)
        if self.image_size % size:
            raise ValueError(
                f"{name}: expected a divisor of image_size = {self.image_size}, got {size}"
            )
        if (self.image_size // size) ** 2 > MOST_TOKENS:
            least = -(-self.image_size // math.isqrt(MOST_TOKENS))
            raise ValueError(
                f"{name}: expected {least} or more, so that an image has up to {MOST_TOKENS:,} "
                f"patches, got {size}"
            )

    def _parameters(self) -> Iterator[tuple[str, int]]:
        yield from super()._parameters()
        embeddings = self.num_patches + self.in_channels * self.patch_size**2
        yield "dim, image_size, patch_size", self.dim * embeddings

    @classmethod
    def of(cls, variant: str, **options: "Unpack[ViTOptions]") -> "Self":
        """Return the configuration of a variant: Ti, S, B or L, a slash, and any patch size.

        Args:
            variant: a size and a patch size; "S/16" is the size S with patches of 16 pixels.
            options: fields of the configuration, which go before the variant's own.

        Raises:
            ValueError: the variant's name is malformed, or an option is unknown or out of range.

        Source: the sizes are those of Dosovitskiy et al. and Touvron et al.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.ViTConfig.of("Ti/16", num_classes=10).num_heads
            3
        """
        named = _VARIANT.fullmatch(variant) if isinstance(variant, str) else None
        if named is None:
            raise ValueError(
                f"variant: expected {', '.join(SIZES)}, a slash and a patch size, "
                f"got {shown(variant)}"
            )
        size, patch = named.groups()
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in options:
            if name not in fields:
                raise ValueError(f"options: expected a field of {cls.__name__}, got {name!r}")
        sizes: dict[str, Any] = {**SIZES[size], "num_classes": 1000, "patch_size": int(patch)}
        given: dict[str, Any] = {**sizes, **options}
        return cls(**{**cls._defaults_of(size, int(patch), given), **given})

    @classmethod
    def _defaults_of(cls, size: str, patch: int, given: dict[str, Any]) -> dict[str, Any]:
        """Return what a variant sets beside its sizes, where it is not given.

        Args:
            size, patch: the two parts of the variant's name.
            given: the variant's sizes and the options, not yet checked.
        """
        return {}

    @property
    def num_patches(self) -> int:
        """Number of input tokens without the class token.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.adatape_vit("Ti/16", depth=1).config.num_patches
            196
        """
        return (self.image_size // self.patch_size) ** 2


class ViTOptions(EncoderOptions, total=False):
    """The fields of ViTConfig as keyword arguments, for factories and type checkers.

    Example:
        >>> import adatape_kernels as ak
        >>> options: ak.models.ViTOptions = {"image_size": 32, "depth": 1}
        >>> ak.models.create_model("vit_tiny_patch16_224", **options).config.num_patches
        4
    """

    image_size: int
    in_channels: int
    patch_size: int
    pre_norm: bool
