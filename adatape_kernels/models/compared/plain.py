"""Models that neither read nor halt: a ViT, and a Transformer of sequences."""

from adatape_kernels.arguments import check_kind
from adatape_kernels.models.compared.padded_classifier import PaddedClassifier
from adatape_kernels.models.compared.sequences import SequenceClassifier, TransformerConfig
from adatape_kernels.models.image_classifier import ImageClassifier
from adatape_kernels.models.image_config import ViTConfig
from adatape_kernels.models.model_file import saved_with


@saved_with(ViTConfig)
class ViT(ImageClassifier):
    """A ViT: AdaTapeViT without a tape, all of whose rows pass all layers.

    Args:
        config: sizes and choices; `create_model` fills them in by name.

    Raises:
        TypeError: config is no ViTConfig.

    Source: SPEC 6 and 11; Dosovitskiy et al.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> config = ak.models.ViTConfig(
        ...     num_classes=10, dim=64, depth=2, num_heads=4, ffn_dim=128, image_size=32
        ... )
        >>> ak.models.ViT(config)(torch.zeros(2, 3, 32, 32)).logits.shape
        torch.Size([2, 10])
    """

    def padded(self) -> PaddedClassifier:
        """Return the eager, padded model on the same parameters.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("vit_tiny_patch16_224", image_size=32, depth=1)
            >>> model.padded()(torch.zeros(2, 3, 32, 32)).logits.shape
            torch.Size([2, 1000])
        """
        return PaddedClassifier(self)


@saved_with(TransformerConfig)
class Transformer(SequenceClassifier):
    """A Transformer of sequences, all of whose rows pass all layers.

    Args:
        config: sizes and choices; `create_model` fills them in by name.

    Raises:
        TypeError: config is no TransformerConfig.

    Source: SPEC 11.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> config = ak.models.TransformerConfig(
        ...     num_classes=2, dim=24, depth=2, num_heads=2, ffn_dim=32
        ... )
        >>> ak.models.Transformer(config)(torch.zeros(5, 40, 3)).logits.shape
        torch.Size([5, 2])
    """

    def __init__(self, config: TransformerConfig):
        check_kind("config", config, TransformerConfig)
        super().__init__(config)

    def padded(self) -> PaddedClassifier:
        """Return the eager, padded model on the same parameters.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("transformer_tiny", depth=1)
            >>> model.padded()(torch.zeros(2, 40, 3)).logits.shape
            torch.Size([2, 2])
        """
        return PaddedClassifier(self)
