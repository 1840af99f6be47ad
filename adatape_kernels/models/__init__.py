"""AdaTape models: elastic, and their padded counterparts on the same parameters."""

from adatape_kernels.models.adatape import AdaTape
from adatape_kernels.models.config import AdaTapeConfig, AdaTapeOptions
from adatape_kernels.models.output import AdaTapeOutput
from adatape_kernels.models.padded import PaddedAdaTape
from adatape_kernels.models.parity import AdaTapeParity, AdaTapeParityConfig
from adatape_kernels.models.pretrained import from_timm, from_torchvision
from adatape_kernels.models.vit import (
    AdaTapeViT,
    AdaTapeViTConfig,
    AdaTapeViTOptions,
    adatape_vit,
)

__all__ = [
    "AdaTape",
    "AdaTapeConfig",
    "AdaTapeOptions",
    "AdaTapeOutput",
    "AdaTapeParity",
    "AdaTapeParityConfig",
    "AdaTapeViT",
    "AdaTapeViTConfig",
    "AdaTapeViTOptions",
    "PaddedAdaTape",
    "adatape_vit",
    "from_timm",
    "from_torchvision",
]
