"""AdaTape models: elastic, and their padded counterparts on the same parameters."""

from adatape_kernels.models.adatape import AdaTape, AdaTapeConfig, AdaTapeOutput
from adatape_kernels.models.padded import PaddedAdaTape
from adatape_kernels.models.parity import AdaTapeParity, AdaTapeParityConfig
from adatape_kernels.models.vit import AdaTapeViT, AdaTapeViTConfig, adatape_vit

__all__ = [
    "AdaTape",
    "AdaTapeConfig",
    "AdaTapeOutput",
    "AdaTapeParity",
    "AdaTapeParityConfig",
    "AdaTapeViT",
    "AdaTapeViTConfig",
    "PaddedAdaTape",
    "adatape_vit",
]
