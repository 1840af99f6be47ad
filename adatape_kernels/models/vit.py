"""AdaTape on images: a ViT that reads a tape of image patches or of learned tokens (SPEC 2, 6)."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adatape_kernels.arguments import check_kind, shown
from adatape_kernels.models.adatape import AdaTape
from adatape_kernels.models.config import (
    MOST_PARAMETERS,
    MOST_TOKENS,
    MOST_VALUES,
    AdaTapeConfig,
    AdaTapeOptions,
)
from adatape_kernels.models.embedding import (
    Embedded,
    ModelInputs,
    elastic_rows,
    padded_banks,
)
from adatape_kernels.models.image_sizes import (
    check_like_parameters,
    list_of_images,
    strip_of_patches,
)
from adatape_kernels.models.model_file import saved_with
from adatape_kernels.models.positions import grid_positions
from adatape_kernels.models.value_checks import as_flag

if TYPE_CHECKING:  # Python has Unpack from 3.11 on, this package runs from 3.10 on
    from typing_extensions import Unpack

# The sizes of the ViT papers.
_SIZES = {
    "Ti": {"dim": 192, "depth": 12, "num_heads": 3, "ffn_dim": 768},
    "S": {"dim": 384, "depth": 12, "num_heads": 6, "ffn_dim": 1536},
    "B": {"dim": 768, "depth": 12, "num_heads": 12, "ffn_dim": 3072},
    "L": {"dim": 1024, "depth": 24, "num_heads": 16, "ffn_dim": 4096},
}
_VARIANT = re.compile(rf"({'|'.join(_SIZES)})/(0*[1-9][0-9]{{0,8}})")


@dataclass(frozen=True)
class AdaTapeViTConfig(AdaTapeConfig):
    """An AdaTapeConfig with the sizes of the images and of their patches, in pixels.

    Raises:
        ValueError: as in AdaTapeConfig, or patches do not tile the image, or an image would take
            more than 1 GiB or have more than 2**20 patches.

    Source: SPEC 2 and 6.

    Example:
        >>> import adatape_kernels as ak
        >>> config = ak.models.AdaTapeViTConfig(
        ...     num_classes=10, dim=64, depth=2, num_heads=4, ffn_dim=128, image_size=32
        ... )
        >>> config.num_patches, config.bank_tokens
        (4, 16)
    """

    image_size: int = 224
    """Height and width of an image."""
    in_channels: int = 3
    """Channels of an image."""
    patch_size: int = 16
    """Height and width of the patches that become input tokens; a divisor of image_size."""
    bank_patch_size: int = 8
    """Height and width of the patches that an input-driven bank is made of; likewise a divisor."""
    pre_norm: bool = False
    """Whether a LayerNorm follows the sum of embeddings and positions, as in CLIP."""

    def __post_init__(self) -> None:
        """Check that patches tile the image and that a bank fills at least one tape token."""
        super().__post_init__()
        as_flag("pre_norm", self.pre_norm)
        self._check_integer("in_channels", 1, MOST_TOKENS)
        self._check_integer("image_size", 1, math.isqrt(MOST_VALUES // self.in_channels))
        for name in ("patch_size", "bank_patch_size"):
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
        if self.read_layers and self.bank_tokens < self.topk:
            raise ValueError(
                f"topk: expected at most {self.bank_tokens} (the bank's tokens), got {self.topk}"
            )
        pixels = self.patch_size**2 + self.bank_patch_size**2
        embeddings = self.num_patches + self.in_channels * pixels
        if self.bank == "input":
            embeddings += self.bank_tokens
        if self._parameters() + self.dim * embeddings > MOST_PARAMETERS:
            raise ValueError(
                "dim, image_size, patch_size: expected sizes that make up to 2**36 parameters, "
                f"got {self._parameters() + self.dim * embeddings:,}"
            )

    @classmethod
    def of(cls, variant: str, **options: "Unpack[AdaTapeViTOptions]") -> "AdaTapeViTConfig":
        """Return the configuration of a variant, as `adatape_vit` takes it.

        Raises:
            ValueError: the variant's name is malformed, or an option is unknown or out of range.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.AdaTapeViTConfig.of("Ti/16", num_classes=10).num_heads
            3
        """
        named = _VARIANT.fullmatch(variant) if isinstance(variant, str) else None
        if named is None:
            raise ValueError(
                f"variant: expected {', '.join(_SIZES)}, a slash and a patch size, "
                f"got {shown(variant)}"
            )
        size, patch = named.groups()
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in options:
            if name not in fields:
                raise ValueError(f"options: expected a field of AdaTapeViTConfig, got {name!r}")
        defaults: dict[str, Any] = {
            **_SIZES[size],
            "num_classes": 1000,
            "tape_ffn_dim": options.get("dim", _SIZES[size]["dim"]),
            "patch_size": int(patch),
            "bank_patch_size": max(1, int(patch) // 2),
        }
        return cls(**{**defaults, **options})

    @property
    def num_patches(self) -> int:
        """Number of input tokens without the class token.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.adatape_vit("Ti/16", depth=1).config.num_patches
            196
        """
        return (self.image_size // self.patch_size) ** 2

    @property
    def bank_tokens(self) -> int:
        """Number of tokens of the bank, be it learnable or input-driven.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.adatape_vit("Ti/16", depth=1).config.bank_tokens
            784
        """
        if self.bank == "learn":
            return self.bank_size
        return (self.image_size // self.bank_patch_size) ** 2


class AdaTapeViTOptions(AdaTapeOptions, total=False):
    """The fields of AdaTapeViTConfig as keyword arguments, for factories and type checkers.

    Example:
        >>> import adatape_kernels as ak
        >>> options: ak.models.AdaTapeViTOptions = {"image_size": 32, "depth": 1}
        >>> ak.models.adatape_vit("Ti/4", **options).config.num_patches
        64
    """

    image_size: int
    in_channels: int
    patch_size: int
    bank_patch_size: int
    pre_norm: bool


@saved_with(AdaTapeViTConfig)
class AdaTapeViT(AdaTape):
    """A ViT on images (batch, in_channels, image_size, image_size) with an elastic tape.

    In the place of one tensor a batch may be a list or tuple of images (in_channels, height, width)
    of many sizes, or a dict of patches as timm's NaFlex models take it: see `embed_elastic`.
    Nothing is padded in the encoder.

    Args:
        config: sizes and choices; `adatape_vit` fills them in by name.

    Raises:
        TypeError: config is no AdaTapeViTConfig.

    Source: SPEC 2 and 6.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> config = ak.models.AdaTapeViTConfig(
        ...     num_classes=10, dim=64, depth=2, num_heads=4, ffn_dim=128, image_size=32
        ... )
        >>> ak.models.AdaTapeViT(config)(torch.zeros(2, 3, 32, 32)).logits.shape
        torch.Size([2, 10])
    """

    def __init__(self, config: AdaTapeViTConfig):
        check_kind("config", config, AdaTapeViTConfig)
        super().__init__(config)
        self.config: AdaTapeViTConfig = config
        c = config
        self.patch_embed = _patches(c, c.patch_size)
        tokens = c.num_patches + (self.class_token is not None) + c.num_registers
        self.position = nn.Parameter(torch.empty(1, tokens, c.dim))
        nn.init.normal_(self.position, std=0.02)
        if c.bank == "input":
            self.bank_embed = _patches(c, c.bank_patch_size)
            self.bank_position = nn.Parameter(torch.empty(1, c.bank_tokens, c.dim))
            nn.init.normal_(self.bank_position, std=0.02)
            self.pre_bank = nn.Linear(c.dim, c.dim)
            nn.init.xavier_uniform_(self.pre_bank.weight)
            nn.init.zeros_(self.pre_bank.bias)
        self.dropout = nn.Dropout(c.dropout)
        self.pre_norm = nn.LayerNorm(c.dim, c.norm_eps) if c.pre_norm else nn.Identity()

    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cut images into input tokens and, for an input-driven bank, into bank tokens.

        Args:
            inputs: (batch, in_channels, image_size, image_size), normalised.

        Returns:
            Input tokens (batch, num_patches (+ 1), dim), with the class token and the registers
            that the model has, and the bank (batch, bank_tokens, dim) or None where it is
            learnable.

        Raises:
            TypeError: inputs is no tensor.
            ValueError: the images' shape is not the configured one.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/8", image_size=32, bank="learn", depth=1)
            >>> tokens, bank = model.embed(torch.zeros(2, 3, 32, 32))
            >>> tokens.shape, bank
            (torch.Size([2, 17, 192]), None)
        """
        c = self.config
        shape = (c.in_channels, c.image_size, c.image_size)
        check_kind("inputs", inputs, Tensor)
        if inputs.dim() != 4 or inputs.shape[1:] != shape:
            raise ValueError(
                f"inputs: expected (batch, {shape}) or a list of images of other sizes, "
                f"got {tuple(inputs.shape)}"
            )
        check_like_parameters("inputs", inputs, self.position)
        tokens = self.with_class_token(self.patch_embed(inputs).flatten(2).mT)
        tokens = self.pre_norm(self.dropout(tokens + self.position))
        if c.bank == "learn":
            return tokens, None
        bank = self.bank_embed(inputs).flatten(2).mT + self.bank_position
        return tokens, self.pre_bank(bank)

    def embed_elastic(self, inputs: ModelInputs) -> Embedded:
        """Cut images of many sizes into input tokens and, for an input-driven bank, bank tokens.

        Each image has a grid of its own, for which the position embeddings are interpolated (SPEC
        6), and an input-driven bank of its own length. The grids are known to the host: those of a
        dict of patches are copied there.

        Args:
            inputs: (batch, in_channels, image_size, image_size), as `embed` takes it; or a list or
                tuple of images (in_channels, height, width), whose sides are multiples of
                patch_size and, for an input-driven bank, of bank_patch_size; or a mapping with

                - "patches", (batch, longest, patch_size² · in_channels) or (batch, longest,
                  patch_size, patch_size, in_channels), channels last,
                - "patch_coord", (batch, longest, 2) int32 or int64, the row and the column of each
                  patch in its image's grid, every place of which is taken once, in any order,
                - "patch_valid", (batch, longest) bool, False where there is no patch.

        Returns:
            As `AdaTape.embed_elastic` says. The bank is padded to the longest and to topk tokens,
            so that an image with fewer bank tokens than topk reads nothing.

        Raises:
            ValueError: an image or an entry has another shape, dtype or device, or patches do not
                fill a grid; the error names which.
            TypeError: inputs, or one of the images, is of another type altogether.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.adatape_vit("Ti/8", image_size=32, depth=1)
            >>> wide, tall = torch.zeros(3, 16, 48), torch.zeros(3, 40, 8)
            >>> model([wide, tall]).logits.shape
            torch.Size([2, 1000])
        """
        if isinstance(inputs, Tensor):
            return super().embed_elastic(inputs)
        if torch.compiler.is_dynamo_compiling():
            from adatape_kernels.models.uncompiled_embedding import embed_uncompiled

            return embed_uncompiled(self._embed_images, inputs)
        return self._embed_images(inputs)

    def _embed_images(self, inputs: Sequence[Tensor] | Mapping[str, Tensor]) -> Embedded:
        """Embed a list of images or a dict of patches."""
        c, like = self.config, self.position
        has_bank = c.bank == "input"
        step = math.lcm(c.patch_size, c.bank_patch_size) if has_bank else c.patch_size
        images = list_of_images(inputs, c.in_channels, c.patch_size, step, like)
        if not images:
            return super().embed_elastic(like.new_empty(0, c.in_channels, *[c.image_size] * 2))
        parts = (self.class_token, self.registers)
        learned = [part[0] for part in parts if part is not None]
        rows, lens = _embedded(images, self.patch_embed, c, c.patch_size, like, learned)
        tokens = elastic_rows(self.pre_norm(self.dropout(rows)), lens)
        if not has_bank:
            return Embedded(tokens, None, None)
        rows, lens = _embedded(
            images, self.bank_embed, c, c.bank_patch_size, self.bank_position, []
        )
        return Embedded(tokens, *padded_banks(self.pre_bank(rows), lens, c.topk))


def _embedded(
    images: Sequence[Tensor],
    embed: nn.Module,
    config: AdaTapeViTConfig,
    size: int,
    position: Tensor,
    learned: list[Tensor],
) -> tuple[Tensor, list[int]]:
    """Embed the patches of images of many sizes, learned tokens before those of each image.

    Returns:
        Rows (rows, dim), with their positions, image after image, and how many each image has.
    """
    side = config.image_size // size
    grids = [(image.shape[1] // size, image.shape[2] // size) for image in images]
    lens = [rows * columns for rows, columns in grids]
    rows = embed(strip_of_patches(images, size).unsqueeze(0)).flatten(2)[0].mT
    if learned:
        rows = torch.cat([part for own in rows.split(lens) for part in (*learned, own)])
    of_grid = {grid: grid_positions(position, (side, side), grid) for grid in set(grids)}
    positions = torch.cat([of_grid[grid] for grid in grids])
    front = sum(map(len, learned))
    return rows + positions, [front + patches for patches in lens]


def _patches(config: AdaTapeViTConfig, size: int) -> nn.Conv2d:
    """Return the convolution that makes a token of every patch of `size` pixels square."""
    return nn.Conv2d(config.in_channels, config.dim, size, stride=size)


def adatape_vit(variant: str = "S/16", **options: "Unpack[AdaTapeViTOptions]") -> AdaTapeViT:
    """Build an AdaTape ViT by name: Ti, S, B or L, a slash, and any patch size.

    Args:
        variant: a size and a patch size; "S/16" is the size S with patches of 16 pixels.
        options: fields of AdaTapeViTConfig, which go before the variant's own. num_classes is
            1000, tape_ffn_dim is dim and bank_patch_size half the patch size where they are not
            given.

    Raises:
        ValueError: the variant's name is malformed, or an option is unknown or out of range.

    Source: SPEC 2 and 6; the sizes are those of Dosovitskiy et al. and Touvron et al.

    Example:
        >>> import adatape_kernels as ak
        >>> model = ak.models.adatape_vit("Ti/16", num_classes=10, num_tape_tokens=4)
        >>> model.config.dim, model.config.depth, model.config.patch_size
        (192, 12, 16)
    """
    return AdaTapeViT(AdaTapeViTConfig.of(variant, **options))
