"""AdaTape on images: a ViT that reads a tape of image patches or of learned tokens (SPEC 2, 6)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adatape_kernels.arguments import check_kind
from adatape_kernels.models.adatape import AdaTape
from adatape_kernels.models.config import AdaTapeConfig, AdaTapeOptions
from adatape_kernels.models.embedding import padded_banks
from adatape_kernels.models.image_classifier import ImageClassifier, embedded, patches
from adatape_kernels.models.image_config import ViTConfig, ViTOptions
from adatape_kernels.models.model_file import saved_with

if TYPE_CHECKING:  # Python has Unpack and Self from 3.11 on, this package runs from 3.10 on
    from typing_extensions import Self, Unpack


@dataclass(frozen=True)
class AdaTapeViTConfig(AdaTapeConfig, ViTConfig):
    """An AdaTapeConfig with the sizes of the images and of their patches, in pixels.

    Raises:
        ValueError: as in AdaTapeConfig and ViTConfig, or bank patches do not tile the image.

    Source: SPEC 2 and 6.

    Example:
        >>> import adatape_kernels as ak
        >>> config = ak.models.AdaTapeViTConfig(
        ...     num_classes=10, dim=64, depth=2, num_heads=4, ffn_dim=128, image_size=32
        ... )
        >>> config.num_patches, config.bank_tokens
        (4, 16)
    """

    bank_patch_size: int = 8
    """Height and width of the patches that an input-driven bank is made of; a divisor too."""

    def _check_values(self) -> None:
        super()._check_values()
        self._check_patch_size("bank_patch_size")
        if self.read_layers and self.bank_tokens < self.topk:
            raise ValueError(
                f"topk: expected at most {self.bank_tokens} (the bank's tokens), got {self.topk}"
            )

    def _parameters(self) -> Iterator[tuple[str, int]]:
        yield from super()._parameters()
        embeddings = self.in_channels * self.bank_patch_size**2
        if self.bank == "input":
            embeddings += self.bank_tokens
        yield "dim, image_size, patch_size", self.dim * embeddings

    @classmethod
    def of(cls, variant: str, **options: "Unpack[AdaTapeViTOptions]") -> "Self":
        """Return the configuration of a variant, as `adatape_vit` takes it.

        Raises:
            ValueError: the variant's name is malformed, or an option is unknown or out of range.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.AdaTapeViTConfig.of("Ti/16", num_classes=10).num_heads
            3
        """
        made: Any = super().of
        return made(variant, **options)

    @classmethod
    def _defaults_of(cls, size: str, patch: int, given: dict[str, Any]) -> dict[str, Any]:
        return {"tape_ffn_dim": given["dim"], "bank_patch_size": max(1, patch // 2)}

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


class AdaTapeViTOptions(AdaTapeOptions, ViTOptions, total=False):
    """The fields of AdaTapeViTConfig as keyword arguments, for factories and type checkers.

    Example:
        >>> import adatape_kernels as ak
        >>> options: ak.models.AdaTapeViTOptions = {"image_size": 32, "depth": 1}
        >>> ak.models.adatape_vit("Ti/4", **options).config.num_patches
        64
    """

    bank_patch_size: int


@saved_with(AdaTapeViTConfig)
class AdaTapeViT(AdaTape, ImageClassifier):
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

    config: AdaTapeViTConfig

    def __init__(self, config: AdaTapeViTConfig):
        check_kind("config", config, AdaTapeViTConfig)
        super().__init__(config)

    def _add_embeddings(self) -> None:
        c = self.config
        if c.bank == "input":
            self.bank_embed = patches(c, c.bank_patch_size)
            self.bank_position = nn.Parameter(torch.empty(1, c.bank_tokens, c.dim))
            nn.init.normal_(self.bank_position, std=0.02)
            self.pre_bank = nn.Linear(c.dim, c.dim)
            nn.init.xavier_uniform_(self.pre_bank.weight)
            nn.init.zeros_(self.pre_bank.bias)

    def _stem(self) -> tuple[str, ...]:
        return (*super()._stem(), "bank_embed", "bank_position", "pre_bank")

    def _unscaled(self) -> tuple[str, ...]:
        return (*super()._unscaled(), "bank_position")

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
        tokens, _ = super().embed(inputs)
        if self.config.bank == "learn":
            return tokens, None
        bank = self.bank_embed(inputs).flatten(2).mT + self.bank_position
        return tokens, self.pre_bank(bank)

    def _grid_step(self) -> int:
        c = self.config
        return math.lcm(c.patch_size, c.bank_patch_size) if c.bank == "input" else c.patch_size

    def _embed_banks(self, images: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        c = self.config
        if c.bank == "learn":
            return None, None
        rows, lens = embedded(images, self.bank_embed, c, c.bank_patch_size, self.bank_position, [])
        return padded_banks(self.pre_bank(rows), lens, c.topk)


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
