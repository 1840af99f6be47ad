"""Images of many sizes in one batch: checked, cut into patches, and put together from patches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.arguments import check_tensor, shown
from adatape_kernels.offsets import INTEGERS

_PATCHES, _PLACES, _EXIST = KEYS = ("patches", "patch_coord", "patch_valid")
"""The entries of a batch of patches, as timm's NaFlex models take it."""
# Timm's collator puts the padded length beside them, which the shapes say as well.
_IGNORED = ("seq_len",)


def list_of_images(
    inputs: Sequence[Tensor] | Mapping[str, Tensor],
    channels: int,
    patch_size: int,
    step: int,
    like: Tensor,
) -> list[Tensor]:
    """Return a batch as a list of images, each checked by itself.

    Args:
        inputs: a list or tuple of images (channels, height, width), or a mapping as
            `join_patches` takes it.
        channels: channels of every image.
        patch_size: side of the patches of a mapping.
        step: the sides of images are multiples of it.
        like: a tensor of the model's dtype and on its device.

    Raises:
        ValueError: an image has another shape, dtype or device; the error names its index.
        TypeError: this is neither a sequence of tensors nor a mapping.
    """
    if isinstance(inputs, Mapping):
        images = join_patches(inputs, channels, patch_size, like)
    elif isinstance(inputs, list | tuple):
        images = [*inputs]
    else:
        raise TypeError(
            f"inputs: expected a tensor, a list of images or a dict of patches, got {shown(inputs)}"
        )
    for index, image in enumerate(images):
        _check_image(f"inputs[{index}]", image, channels, step, like)
    return images


def _check_image(name: str, image: Tensor, channels: int, step: int, like: Tensor) -> None:
    _check_dense(name, image)
    shape = tuple(image.shape)
    wrong = len(shape) != 3 or shape[0] != channels
    if wrong or any(side == 0 or side % step for side in shape[1:]):
        raise ValueError(
            f"{name}: expected ({channels}, height, width), both sides multiples of {step}, "
            f"got {shape}"
        )
    check_like_parameters(name, image, like)


def _check_dense(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested one" if tensor.is_nested else str(tensor.layout)
        raise ValueError(f"{name}: expected a dense tensor, got {kind}")


def check_like_parameters(name: str, tensor: Tensor, like: Tensor) -> None:
    """Refuse a tensor of another dtype than the parameters, save where autocast converts it.

    Args:
        name: the tensor's name in an error.
        tensor: what a model is given.
        like: a parameter of it.

    Raises:
        ValueError: the dtype or the device is another one.
    """
    converted = tensor.is_floating_point() and _autocast(like.device.type)
    if tensor.dtype != like.dtype and not converted:
        raise ValueError(f"{name}: expected {like.dtype} like the parameters, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got {tensor.device}")


def _autocast(device_type: str) -> bool:
    """Whether torch converts what calls on such a device are given."""
    available = torch.amp.autocast_mode.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def strip_of_patches(images: Sequence[Tensor], size: int) -> Tensor:
    """Return the patches of all images side by side in one image, each image's in raster order.

    A convolution of patches runs over them at once, without a loop over images.

    Args:
        images: (channels, height, width) each, whose sides are multiples of `size`.
        size: side of a patch.

    Returns:
        (channels, size, patches · size).
    """
    # Of (channels, rows, size, width), the rows of patches are put behind each other.
    strips = [image.unflatten(1, (-1, size)).transpose(1, 2).flatten(2) for image in images]
    return torch.cat(strips, 2)


def join_patches(
    inputs: Mapping[str, Tensor], channels: int, size: int, like: Tensor
) -> list[Tensor]:
    """Return the images that a padded batch of patches was cut from.

    Args:
        inputs: has the entries of KEYS and none but these and "seq_len":
            patches (batch, longest, size · size · channels) or (batch, longest, size, size,
            channels), channels last; patch_coord (batch, longest, 2) int32 or int64, the row and
            the column of each patch in its image's grid; patch_valid (batch, longest) bool, False
            where there is no patch, whose other entries are then not looked at.
        channels: channels of a patch.
        size: side of a patch.
        like: a tensor of the model's dtype and on its device.

    Returns:
        An image (channels, height, width) for each example. Where patches exist is copied to the
        host.

    Raises:
        ValueError: an entry is missing or unknown, has another shape, dtype or device, or an
            image's patches do not fill a grid, each place once.
        TypeError: an entry is no tensor.
    """
    _check_keys(inputs)
    patches, places, exist = (inputs[key] for key in KEYS)
    for key in KEYS:
        _check_dense(_entry(key), inputs[key])
    shape, width = tuple(patches.shape), size * size * channels
    if len(shape) < 2 or shape[2:] not in ((width,), (size, size, channels)):
        raise ValueError(
            f"{_entry(_PATCHES)}: expected (batch, longest, {width}) or "
            f"(batch, longest, {size}, {size}, {channels}), got {shape}"
        )
    check_like_parameters(_entry(_PATCHES), patches, like)
    if places.dtype not in INTEGERS or places.shape != (*shape[:2], 2):
        raise ValueError(
            f"{_entry(_PLACES)}: expected int32 or int64 {(*shape[:2], 2)}, "
            f"got {places.dtype} {tuple(places.shape)}"
        )
    if exist.dtype != torch.bool or exist.shape != shape[:2]:
        raise ValueError(
            f"{_entry(_EXIST)}: expected torch.bool {shape[:2]}, "
            f"got {exist.dtype} {tuple(exist.shape)}"
        )
    images = []
    for index, (where, there) in enumerate(zip(places.cpu().long(), exist.cpu(), strict=True)):
        kept = there.nonzero().flatten()
        rows, columns, order = _raster_order(index, where[kept])
        grid = patches[index].index_select(0, kept[order].to(patches.device))
        grid = grid.view(rows, columns, size, size, channels).permute(4, 0, 2, 1, 3)
        images.append(grid.reshape(channels, rows * size, columns * size))
    return images


def _check_keys(inputs: Mapping[str, Tensor]) -> None:
    missing = [key for key in KEYS if key not in inputs]
    unknown = [key for key in inputs if key not in (*KEYS, *_IGNORED)]
    if missing or unknown:
        raise ValueError(f"inputs: expected the entries {', '.join(KEYS)}, got {shown([*inputs])}")


def _entry(key: str) -> str:
    return f"inputs[{key!r}]"


def _raster_order(image: int, places: Tensor) -> tuple[int, int, Tensor]:
    """Return the rows and columns of a grid, and the order in which its places are ascending.

    Args:
        image: the image's index, for an error.
        places: (patches, 2) int64 on the host.

    Raises:
        ValueError: there is no patch, or the places do not fill a grid, each once.
    """
    if not len(places):
        raise ValueError(
            f"{_entry(_EXIST)}: expected a patch or more in each image, got none in image {image}"
        )
    rows, columns = (int(most) + 1 for most in places.amax(0))
    if int(places.min()) >= 0 and rows * columns == len(places):
        places_in_order, order = (places[:, 0] * columns + places[:, 1]).sort()
        if torch.equal(places_in_order, torch.arange(len(places))):
            return rows, columns, order
    raise ValueError(
        f"{_entry(_PLACES)}: expected each place of a grid once, got {_fault(places.tolist())} "
        f"in image {image}"
    )


def _fault(places: list[list[Any]]) -> str:
    """Return which place keeps a list of places from being a grid."""
    seen = set()
    for y, x in places:
        if y < 0 or x < 0 or (y, x) in seen:
            return f"{(y, x)}{' twice' if (y, x) in seen else ''}"
        seen.add((y, x))
    rows, columns = (max(axis) + 1 for axis in zip(*places, strict=True))
    return f"{len(places)} places of a grid of {rows} by {columns}"
