"""A-ViT: a ViT each of whose tokens halts after the layer that is enough for it."""

from torch import Tensor

from adatape_kernels.arguments import check_flag, check_kind
from adatape_kernels.halting import Halting, distribution_loss
from adatape_kernels.layers import AViTEncoder, FeatureGate
from adatape_kernels.models.compared.avit_public_code import PublicCodeAViT
from adatape_kernels.models.compared.halting_classifier import HaltingClassifier
from adatape_kernels.models.compared.halting_config import AViTConfig
from adatape_kernels.models.compared.padded_classifier import PaddedClassifier
from adatape_kernels.models.image_classifier import ImageClassifier
from adatape_kernels.models.model_file import saved_with
from adatape_kernels.models.output import AdaTapeOutput


@saved_with(AViTConfig)
class AViT(HaltingClassifier, ImageClassifier):
    """A ViT each of whose tokens halts when its first feature says so, and leaves.

    Args:
        config: sizes and choices; `create_model` fills them in by name.

    Raises:
        TypeError: config is no AViTConfig.

    Source: SPEC 12; Yin et al., arXiv:2112.07658.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> model = ak.models.create_model("avit_tiny_patch16_224", image_size=32, depth=3)
        >>> output = model(torch.zeros(2, 3, 32, 32))
        >>> output.halted.steps.shape, output.halted.rows_per_step
        (torch.Size([2, 5]), (10, 10, 10))
    """

    config: AViTConfig
    encoder: AViTEncoder

    def __init__(self, config: AViTConfig):
        check_kind("config", config, AViTConfig)
        super().__init__(config)

    def _new_encoder(self) -> AViTEncoder:
        c = self.config
        return AViTEncoder(
            [self._new_layer(layer) for layer in range(c.depth)],
            c.dim,
            FeatureGate(c.gate_scale, c.gate_center),
            Halting.avit(threshold=1 - c.act_epsilon),
            keep_class_token=c.keep_class_token,
            class_token=c.has_class_token,
            norm_eps=c.norm_eps,
        )

    def charge(self, output: AdaTapeOutput) -> Tensor | None:
        """Return the ponder loss and the distribution loss, weighted, a scalar.

        Args:
            output: what the model returned for the batch; of a slice of an output, the distribution
                loss is that of the whole batch.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model(
            ...     "avit_tiny_patch16_224", image_size=32, depth=2, distribution_weight=0
            ... )
            >>> round(model.charge(model(torch.zeros(2, 3, 32, 32))).item(), 6)  # (2 + 1) * 5e-4
            0.0015
        """
        c, total = self.config, super().charge(output)
        means = None if output.halted is None else output.halted.means
        if total is None or means is None or c.depth == 1 or c.distribution_weight == 0:
            return total
        return total + c.distribution_weight * distribution_loss(
            means, c.distribution_center * c.depth
        )

    def padded(self, *, public_code: bool = False) -> PaddedClassifier:
        """Return the eager, padded and masked model on the same parameters.

        Args:
            public_code: whether the mean halting probabilities of the layers, and their gradients,
                are those of the authors' code rather than of the paper.

        Raises:
            TypeError: public_code is no flag.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("avit_tiny_patch16_224", image_size=32, depth=3)
            >>> leaves, masks = model(images := torch.ones(2, 3, 32, 32)), model.padded()(images)
            >>> torch.allclose(leaves.logits, masks.logits, atol=1e-5)
            True
        """
        check_flag("public_code", public_code)
        return PublicCodeAViT(self) if public_code else PaddedClassifier(self)
