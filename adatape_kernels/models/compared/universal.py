"""Models whose examples, or rows, halt after the step that is enough for them: UViT and its kin."""

from abc import ABC

from adatape_kernels.arguments import check_kind
from adatape_kernels.halting import Halting
from adatape_kernels.layers import ElasticEncoderLayer, UniversalEncoder
from adatape_kernels.models.compared.halting_classifier import HaltingClassifier
from adatape_kernels.models.compared.halting_config import (
    UniversalConfig,
    UniversalTransformerConfig,
    UViTConfig,
)
from adatape_kernels.models.compared.padded_classifier import PaddedClassifier
from adatape_kernels.models.compared.sequences import SequenceClassifier
from adatape_kernels.models.image_classifier import ImageClassifier
from adatape_kernels.models.model_file import saved_with


class UniversalModel(HaltingClassifier, ABC):
    """A classifier whose examples, or rows, halt, and leave the batch (ACT).

    Args:
        config: sizes and choices.

    Raises:
        TypeError: config is no UniversalConfig.

    Source: SPEC 11.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.create_model("universal_transformer_tiny", depth=6)
        >>> isinstance(model, ak.models.UniversalModel), len(model.encoder.layers)
        (True, 1)
    """

    config: UniversalConfig
    encoder: UniversalEncoder

    def __init__(self, config: UniversalConfig):
        check_kind("config", config, UniversalConfig)
        super().__init__(config)

    def _new_encoder(self) -> UniversalEncoder:
        c = self.config
        rule = None
        if c.act_type != "none":
            rule = Halting.act(
                threshold=1 - c.act_epsilon,
                level=c.act_level,
                update=c.act_type,
                leave=c.leave,
                force_halt=c.force_halt,
            )
        return UniversalEncoder(
            [self._new_layer(layer) for layer in range(c.num_layers)],
            c.dim,
            c.depth,
            rule,
            halting_bias_init=c.halting_bias_init,
            norm_eps=c.norm_eps,
        )

    def _new_layer(self, layer: int, tape_ffn_dim: int = 0) -> ElasticEncoderLayer:
        new = super()._new_layer(layer, tape_ffn_dim)
        new.stochastic_depth, new.rescale_kept = self.config.stochastic_depth, False
        return new

    def padded(self) -> PaddedClassifier:
        """Return the eager, padded and masked model on the same parameters.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("uvit_tiny_patch16_224", image_size=32, depth=5)
            >>> leaves, masks = model(images := torch.ones(2, 3, 32, 32)), model.padded()(images)
            >>> torch.allclose(leaves.logits, masks.logits, atol=1e-5)
            True
        """
        return PaddedClassifier(self)


@saved_with(UViTConfig)
class UViT(UniversalModel, ImageClassifier):
    """A ViT of images each of which halts after the layer that is enough for it, and leaves.

    With `distinct_layers=2` two layers take turns, which is one way to read the name U2T.

    Args:
        config: sizes and choices; `create_model` fills them in by name.

    Raises:
        TypeError: config is no UViTConfig.

    Source: SPEC 11; scenic's UViT.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.create_model("uvit_tiny_patch16_224", image_size=32, num_classes=5)
        >>> output = model(torch.zeros(2, 3, 32, 32))
        >>> output.halted.steps.tolist(), output.ponder.shape
        ([4, 4], torch.Size([2, 1]))
    """

    config: UViTConfig

    def __init__(self, config: UViTConfig):
        check_kind("config", config, UViTConfig)
        super().__init__(config)


@saved_with(UniversalTransformerConfig)
class UniversalTransformer(UniversalModel, SequenceClassifier):
    """A Transformer of sequences that takes one step after the other with the same parameters.

    Args:
        config: sizes and choices; `create_model` fills them in by name.

    Raises:
        TypeError: config is no UniversalTransformerConfig.

    Source: SPEC 11; Dehghani et al., arXiv:1807.03819.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.create_model("universal_transformer_tiny", num_classes=2)
        >>> model(torch.zeros(5, 40, 3)).halted.steps.tolist()
        [4, 4, 4, 4, 4]
    """

    config: UniversalTransformerConfig

    def __init__(self, config: UniversalTransformerConfig):
        check_kind("config", config, UniversalTransformerConfig)
        super().__init__(config)
