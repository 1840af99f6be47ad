"""AdaTape on images: a ViT that reads a tape of image patches or of learned tokens (SPEC 2, 6)."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adatape_kernels.arguments import check_kind
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.layers import ElasticEncoder, TapeReader
from adatape_kernels.layers.recomputed_bank import (
    RecomputedBank,
    examples_of,
    is_large,
    plain_backward_pass,
)
from adatape_kernels.layers.spare_rows import called_with_spare_rows
from adatape_kernels.layers.torch_modules import is_bare, is_plain
from adatape_kernels.models.adatape import AdaTape
from adatape_kernels.models.config import AdaTapeConfig, AdaTapeOptions
from adatape_kernels.models.embedding import ModelInputs, padded_banks
from adatape_kernels.models.image_classifier import ImageClassifier, embedded
from adatape_kernels.models.image_config import ViTConfig, ViTOptions
from adatape_kernels.models.model_file import saved_with
from adatape_kernels.models.patch_tokens import cuts_patches, patches, tokens_of_patches
from adatape_kernels.op_types import wide_dtype

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
        return tokens, self._bank_of(inputs)

    def _bank_of(self, inputs: Tensor) -> Tensor:
        rows = tokens_of_patches(inputs, self.bank_embed, self.config.bank_patch_size)
        return self.pre_bank(rows + self.bank_position)

    def _embed_to_read(
        self, inputs: ModelInputs
    ) -> tuple[ElasticBatch, Tensor | RecomputedBank | None, Tensor | None]:
        """Return tokens, bank and lengths; the bank is recomputed from the patches if that pays."""
        if not isinstance(inputs, Tensor) or not self._may_recompute(inputs):
            return self.embed_elastic(inputs)
        tokens, _ = super().embed(inputs)
        with torch.no_grad():
            entries = self._bank_of(inputs)
        bank = RecomputedBank(entries, functools.partial(self._bank_rows, inputs))
        return ElasticBatch.from_padded(tokens), bank, None

    def _may_recompute(self, inputs: Tensor) -> bool:
        """Return whether the readers read little, and nothing but our own code makes the bank."""
        c, cls, own, encoder = self.config, type(self), self.__dict__, self.encoder
        plain = type(inputs) in (Tensor, nn.Parameter) and inputs.dim() == 4
        if not plain or c.bank == "learn" or not c.read_layers or not plain_backward_pass():
            return False
        position = own["_parameters"].get("bank_position")
        as_written = (
            cls.embed is AdaTapeViT.embed
            and cls.embed_elastic is ImageClassifier.embed_elastic
            and not ("embed" in own or "embed_elastic" in own)
            and type(encoder) is ElasticEncoder
            and is_bare(encoder)
            and is_plain(self.bank_embed, nn.Conv2d)
            and cuts_patches(self.bank_embed, c.bank_patch_size)
            and is_plain(self.pre_bank, nn.Linear)
            and type(position) in (Tensor, nn.Parameter)
            and position.shape == (1, c.bank_tokens, c.dim)
        )
        if not as_written:
            return False
        sources = (inputs, position, self.bank_embed.weight, self.pre_bank.weight)
        if not any(each.requires_grad for each in sources):
            return False
        elements, device = len(inputs) * c.bank_tokens * c.dim, inputs.device.type
        # The size comes last, since a compiler makes its answer a condition on the batch.
        return all(
            type(reader) is TapeReader and is_bare(reader) and reader.may_recompute(c.bank_tokens)
            for _, reader in encoder.stages()
            if reader is not None
        ) and is_large(elements, device, from_patches=True)

    def _bank_rows(self, inputs: Tensor, places: Tensor, read: Tensor) -> Tensor:
        """Return the bank's rows at places (batch, rows), zero patches where nothing was read."""
        size = self.config.bank_patch_size
        columns = inputs.shape[3] // size
        grid = inputs.unflatten(3, (columns, size)).unflatten(2, (-1, size))
        row, column = places // columns, places % columns
        patches = grid[examples_of(places), :, row, :, column]
        patches = patches.flatten(2).where(read.unsqueeze(2), 0)
        weight, bias = self.bank_embed.weight.flatten(1), self.bank_embed.bias
        # An entry's position is added in many examples, whose gradients are summed in this dtype.
        positions = self.bank_position[0].to(wide_dtype(self.bank_position.dtype))
        positions = F.embedding(places, positions).to(self.bank_position.dtype)
        return self.pre_bank(F.linear(patches, weight, bias) + positions)

    def _grid_step(self) -> int:
        c = self.config
        return math.lcm(c.patch_size, c.bank_patch_size) if c.bank == "input" else c.patch_size

    def _embed_banks(self, images: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        c = self.config
        if c.bank == "learn":
            return None, None
        rows, lens = embedded(images, self.bank_embed, c, c.bank_patch_size, self.bank_position, [])
        return padded_banks(called_with_spare_rows(self.pre_bank, rows), lens, c.topk)


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
