"""Tokens of the patches of images: by a convolution, or by the product that it is (SPEC 2 and 6).

A convolution whose stride is its size sees every pixel once, so that it is a product of the patches
and the weights. On a CPU the product, with the copy that lays each patch's pixels side by side,
takes less time than torch's convolution, most of all in bfloat16. It is the product on every device
and in every exported program, since the two are summed in different orders.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from adatape_kernels.layers.spare_rows import keeps_code_by_rows, rounded_rows, with_zero_rows
from adatape_kernels.layers.torch_modules import is_plain
from adatape_kernels.models.image_config import ViTConfig


def patches(config: ViTConfig, size: int) -> nn.Conv2d:
    """Return the convolution that makes a token of every patch of `size` pixels square."""
    return nn.Conv2d(config.in_channels, config.dim, size, stride=size)


def cuts_patches(convolution: nn.Conv2d, size: int) -> bool:
    """Return whether a convolution is as `patches` makes it, and so a product of each patch."""
    c, side = convolution, (size, size)
    return (
        (c.kernel_size, c.stride, c.padding, c.dilation) == (side, side, (0, 0), (1, 1))
        and c.groups == 1
        and not c.transposed
    )


def tokens_of_patches(images: Tensor, embed: nn.Conv2d, size: int) -> Tensor:
    """Embed the patches of images of one size.

    A module that is not plain, or does something else, is called.

    Args:
        images: (batch, channels, height, width), whose sides are multiples of `size`.
        embed: what makes a token of each patch.
        size: side of a patch.

    Returns:
        (batch, patches, dim), those of an image in raster order.
    """
    if not _is_product(embed, size):
        return embed(images).flatten(2).mT
    return F.linear(_pixels_of_patches(images, size), embed.weight.flatten(1), embed.bias)


def tokens_of_strip(strip: Tensor, embed: nn.Conv2d, size: int) -> Tensor:
    """Embed the patches of a strip (channels, size, patches · size), to (patches, dim).

    In bfloat16 on a CPU there are spare ones among them, as `spare_rows` says.
    """
    if not _is_product(embed, size):
        return embed(strip.unsqueeze(0)).flatten(2)[0].mT
    pixels = _pixels_of_patches(strip, size)
    count = len(pixels)
    if keeps_code_by_rows(strip):
        pixels = with_zero_rows(pixels, rounded_rows(count))
    return F.linear(pixels, embed.weight.flatten(1), embed.bias)[:count]


def _is_product(embed: nn.Conv2d, size: int) -> bool:
    """Return whether a product does what calling the module does."""
    return is_plain(embed, nn.Conv2d) and cuts_patches(embed, size)


def _pixels_of_patches(images: Tensor, size: int) -> Tensor:
    """Return the pixels of each patch, in the order of the weights.

    Args:
        images: (..., channels, height, width).
        size: side of a patch.

    Returns:
        (..., patches, channels · size · size).
    """
    grid = images.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    # Of (..., channels, rows, size, columns, size), the rows and columns of patches come first.
    return grid.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)
