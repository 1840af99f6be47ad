"""AdaTape on images: a ViT that reads a tape of image patches or of learned tokens (SPEC 2, 6)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adatape_kernels.models.adatape import AdaTape, AdaTapeConfig

# dim, depth, num_heads, ffn_dim: the ViT papers' sizes.
_SIZES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
}


@dataclass(frozen=True)
class AdaTapeViTConfig(AdaTapeConfig):
    """An AdaTapeConfig with the image's and the patches' sizes, in pixels."""

    image_size: int = 224
    in_channels: int = 3
    patch_size: int = 16
    bank_patch_size: int = 8
    """Side of the patches that an input-driven bank is made of."""

    def __post_init__(self) -> None:
        """Check that patches tile the image and that a bank fills at least one tape token."""
        super().__post_init__()
        for name in ("patch_size", "bank_patch_size"):
            size = getattr(self, name)
            if size < 1 or self.image_size % size:
                raise ValueError(
                    f"{name}: expected a divisor of image_size = {self.image_size}, got {size}"
                )
        if self.read_layers and self.bank_tokens < self.topk:
            raise ValueError(
                f"topk: expected at most {self.bank_tokens} (the bank's tokens), got {self.topk}"
            )

    @property
    def num_patches(self) -> int:
        """Input tokens without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def bank_tokens(self) -> int:
        """Tokens of the bank, of either kind."""
        if self.bank == "learn":
            return self.bank_size
        return (self.image_size // self.bank_patch_size) ** 2


class AdaTapeViT(AdaTape):
    """A ViT on (batch, in_channels, image_size, image_size) images with an elastic tape."""

    def __init__(self, config: AdaTapeViTConfig):
        super().__init__(config)
        self.config: AdaTapeViTConfig = config
        c = config
        self.patch_embed = _patches(c, c.patch_size)
        tokens = c.num_patches + (self.class_token is not None)
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

    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cut images into input tokens and, for an input-driven bank, into bank tokens.

        Raises:
            ValueError: the images' shape is not the configured one.
        """
        c = self.config
        shape = (c.in_channels, c.image_size, c.image_size)
        if inputs.dim() != 4 or inputs.shape[1:] != shape:
            raise ValueError(f"inputs: expected (batch, {shape}), got {tuple(inputs.shape)}")
        tokens = self.with_class_token(self.patch_embed(inputs).flatten(2).mT)
        tokens = self.dropout(tokens + self.position)
        if c.bank == "learn":
            return tokens, None
        bank = self.bank_embed(inputs).flatten(2).mT + self.bank_position
        return tokens, self.pre_bank(bank)


def _patches(config: AdaTapeViTConfig, size: int) -> nn.Conv2d:
    return nn.Conv2d(config.in_channels, config.dim, size, stride=size)


def adatape_vit(variant: str = "S/16", **options: Any) -> AdaTapeViT:
    """Build an AdaTape ViT by name: Ti, S, B or L, a slash, and any patch size.

    Args:
        variant: "S/16" is the size S with patches of 16 pixels.
        options: fields of AdaTapeViTConfig, over the variant's own. num_classes defaults to
            1000, tape_ffn_dim to dim, bank_patch_size to half the patch size.

    Raises:
        ValueError: the variant's name is malformed, an option is unknown or out of range.
    """
    size, _, patch = variant.partition("/")
    if size not in _SIZES or not patch.isdecimal() or int(patch) < 1:
        raise ValueError(
            f"variant: expected {', '.join(_SIZES)}, a slash and a patch size, got {variant!r}"
        )
    fields = {field.name for field in dataclasses.fields(AdaTapeViTConfig)}
    for name in options:
        if name not in fields:
            raise ValueError(f"options: expected a field of AdaTapeViTConfig, got {name!r}")
    dim, depth, num_heads, ffn_dim = _SIZES[size]
    defaults = {
        "num_classes": 1000,
        "dim": dim,
        "depth": depth,
        "num_heads": num_heads,
        "ffn_dim": ffn_dim,
        "tape_ffn_dim": options.get("dim", dim),
        "patch_size": int(patch),
        "bank_patch_size": max(1, int(patch) // 2),
    }
    return AdaTapeViT(AdaTapeViTConfig(**{**defaults, **options}))
