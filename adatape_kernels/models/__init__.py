"""AdaTape models, elastic and padded on the same parameters, and those they are compared with."""

from adatape_kernels.models.adatape import AdaTape
from adatape_kernels.models.classifier import Classifier, Encoded
from adatape_kernels.models.compared import (
    AViT,
    AViTConfig,
    AViTOptions,
    HaltingClassifier,
    PaddedClassifier,
    SequenceClassifier,
    Transformer,
    TransformerConfig,
    TransformerOptions,
    UniversalConfig,
    UniversalModel,
    UniversalOptions,
    UniversalTransformer,
    UniversalTransformerConfig,
    UniversalTransformerOptions,
    UViT,
    UViTConfig,
    UViTOptions,
    ViT,
)
from adatape_kernels.models.config import AdaTapeConfig, AdaTapeOptions
from adatape_kernels.models.encoder_config import EncoderConfig, EncoderOptions
from adatape_kernels.models.factory import create_model, list_models
from adatape_kernels.models.image_classifier import ImageClassifier
from adatape_kernels.models.image_config import ViTConfig, ViTOptions
from adatape_kernels.models.output import AdaTapeOutput, HaltedUnits
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
    "AViT",
    "AViTConfig",
    "AViTOptions",
    "AdaTape",
    "AdaTapeConfig",
    "AdaTapeOptions",
    "AdaTapeOutput",
    "AdaTapeParity",
    "AdaTapeParityConfig",
    "AdaTapeViT",
    "AdaTapeViTConfig",
    "AdaTapeViTOptions",
    "Classifier",
    "Encoded",
    "EncoderConfig",
    "EncoderOptions",
    "HaltedUnits",
    "HaltingClassifier",
    "ImageClassifier",
    "PaddedAdaTape",
    "PaddedClassifier",
    "SequenceClassifier",
    "Transformer",
    "TransformerConfig",
    "TransformerOptions",
    "UViT",
    "UViTConfig",
    "UViTOptions",
    "UniversalConfig",
    "UniversalModel",
    "UniversalOptions",
    "UniversalTransformer",
    "UniversalTransformerConfig",
    "UniversalTransformerOptions",
    "ViT",
    "ViTConfig",
    "ViTOptions",
    "adatape_vit",
    "create_model",
    "from_timm",
    "from_torchvision",
    "list_models",
]
