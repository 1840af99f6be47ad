"""What models of images have in common: patches, positions, and images of many sizes (SPEC 6)."""

from abc import ABC
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adatape_kernels.arguments import check_kind
from adatape_kernels.models.classifier import Classifier
from adatape_kernels.models.embedding import Embedded, ModelInputs, elastic_rows
from adatape_kernels.models.image_config import ViTConfig
from adatape_kernels.models.image_sizes import (
    check_like_parameters,
    list_of_images,
    strip_of_patches,
)
from adatape_kernels.models.patch_tokens import patches, tokens_of_patches, tokens_of_strip
from adatape_kernels.models.positions import grid_positions


class ImageClassifier(Classifier, ABC):
    """A classifier of images (batch, in_channels, image_size, image_size).

    In the place of one tensor a batch may be a list or tuple of images (in_channels, height, width)
    of many sizes, or a dict of patches as timm's NaFlex models take it: see `embed_elastic`.
    Nothing is padded in the encoder.

    Args:
        config: sizes and choices.

    Raises:
        TypeError: config is no ViTConfig.

    Source: SPEC 6.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.create_model("vit_tiny_patch16_224", depth=1, image_size=32)
        >>> isinstance(model, ak.models.ImageClassifier), model.in_chans
        (True, 3)
    """

    config: ViTConfig

    def __init__(self, config: ViTConfig):
        check_kind("config", config, ViTConfig)
        super().__init__(config)
        c = config
        self.patch_embed = patches(c, c.patch_size)
        tokens = c.num_patches + self.num_prefix_tokens
        self.position = nn.Parameter(torch.empty(1, tokens, c.dim))
        nn.init.normal_(self.position, std=0.02)
        self._add_embeddings()
        self.dropout = nn.Dropout(c.dropout)
        self.pre_norm = nn.LayerNorm(c.dim, c.norm_eps) if c.pre_norm else nn.Identity()

    def _add_embeddings(self) -> None:
        """Add the parameters with which a subclass embeds more than tokens, behind `position`."""

    @property
    def in_chans(self) -> int:
        """Channels of an image, by timm's name.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.adatape_vit("Ti/16", depth=1, in_channels=1).in_chans
            1
        """
        return self.config.in_channels

    @property
    def _pixels_per_token(self) -> int:
        return self.config.patch_size

    def _stem(self) -> tuple[str, ...]:
        return ("position", "patch_embed", "pre_norm", *super()._stem())

    def _unscaled(self) -> tuple[str, ...]:
        return ("position", *super()._unscaled())

    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cut images into input tokens.

        Args:
            inputs: (batch, in_channels, image_size, image_size), normalised.

        Returns:
            Input tokens (batch, num_patches (+ 1), dim), with the class token and the registers
            that the model has, and None, as there is no bank.

        Raises:
            TypeError: inputs is no tensor.
            ValueError: the images' shape is not the configured one.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("vit_tiny_patch16_224", depth=1, image_size=32)
            >>> model.embed(torch.zeros(2, 3, 32, 32))[0].shape
            torch.Size([2, 5, 192])
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
        tokens = tokens_of_patches(inputs, self.patch_embed, c.patch_size)
        tokens = self.with_class_token(tokens)
        return self.pre_norm(self.dropout(tokens + self.position)), None

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
            As `Classifier.embed_elastic` says. A bank is padded to the longest and to topk tokens,
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
        images = list_of_images(inputs, c.in_channels, c.patch_size, self._grid_step(), like)
        if not images:
            return super().embed_elastic(like.new_empty(0, c.in_channels, *[c.image_size] * 2))
        parts = (self.class_token, self.registers)
        learned = [part[0] for part in parts if part is not None]
        rows, lens = embedded(images, self.patch_embed, c, c.patch_size, like, learned)
        tokens = elastic_rows(self.pre_norm(self.dropout(rows)), lens)
        return Embedded(tokens, *self._embed_banks(images))

    def _grid_step(self) -> int:
        """Return what the sides of images must be multiples of."""
        return self.config.patch_size

    def _embed_banks(self, images: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Return the bank of images of many sizes and the banks' lengths, as `Embedded` has it."""
        return None, None


def embedded(
    images: Sequence[Tensor],
    embed: nn.Conv2d,
    config: ViTConfig,
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
    rows = tokens_of_strip(strip_of_patches(images, size), embed, size)
    if learned:
        rows = torch.cat([part for own in rows.split(lens) for part in (*learned, own)])
    of_grid = {grid: grid_positions(position, (side, side), grid) for grid in set(grids)}
    positions = torch.cat([of_grid[grid] for grid in grids])
    front = sum(map(len, learned))
    return rows + positions, [front + patches for patches in lens]
