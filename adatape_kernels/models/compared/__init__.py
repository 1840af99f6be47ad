"""The models that AdaTape is compared with: plain ones, and those whose examples or rows halt.

Each is a `Classifier` and returns what AdaTape returns.
"""

from adatape_kernels.models.compared.avit import AViT
from adatape_kernels.models.compared.halting_classifier import HaltingClassifier
from adatape_kernels.models.compared.halting_config import (
    AViTConfig,
    AViTOptions,
    UniversalConfig,
    UniversalOptions,
    UniversalTransformerConfig,
    UniversalTransformerOptions,
    UViTConfig,
    UViTOptions,
)
from adatape_kernels.models.compared.padded_classifier import PaddedClassifier
from adatape_kernels.models.compared.plain import Transformer, ViT
from adatape_kernels.models.compared.sequences import (
    SequenceClassifier,
    TransformerConfig,
    TransformerOptions,
)
from adatape_kernels.models.compared.universal import UniversalModel, UniversalTransformer, UViT

__all__ = [
    "AViT",
    "AViTConfig",
    "AViTOptions",
    "HaltingClassifier",
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
]
