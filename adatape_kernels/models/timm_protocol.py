"""A model of images with the methods and attributes that timm's scripts ask of a model.

It does not need timm; `adatape_kernels.timm` enters it into timm's registry.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from adatape_kernels.arguments import check_kind, check_number, shown
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.models.embedding import ModelInputs
from adatape_kernels.models.image_classifier import ImageClassifier
from adatape_kernels.models.output import AdaTapeOutput
from adatape_kernels.models.vit import AdaTapeViT


class TimmClassifier(nn.Module):
    """A model of images that returns logits and is trained by timm's scripts.

    The model itself is `model`, which `save`, `loss`, `padded` and all else of this package take;
    this module adds nothing but dropout before the head. When what halts, and the ponder loss of a
    call, are in `last_output` until the next call. `PonderLoss` adds that loss to a criterion.

    Args:
        model: the model, new or loaded.
        drop_rate: probability with which training drops a feature that the head sees.

    Attributes:
        model: the model.
        last_output: the `AdaTapeOutput` of the last call, or None. Copies and pickles do not
            take it along.

    Raises:
        TypeError: model is no ImageClassifier.
        ValueError: drop_rate is no probability.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> from adatape_kernels.models.timm_protocol import TimmClassifier
        >>> avit = ak.models.create_model("avit_tiny_patch16_224", image_size=32, depth=2)
        >>> model = TimmClassifier(avit)
        >>> model(torch.zeros(2, 3, 32, 32)).shape, model.last_output.halted.steps.shape
        (torch.Size([2, 1000]), torch.Size([2, 5]))
    """

    _NAME = "model"
    """The name of the attribute that is the model itself, and so of its parameters' prefix."""

    def __init__(self, model: ImageClassifier, *, drop_rate: float = 0.0):
        check_kind(self._NAME, model, ImageClassifier)
        check_number("drop_rate", drop_rate, 0, 1)
        super().__init__()
        setattr(self, self._NAME, model)
        self.drop_rate = drop_rate
        self.last_output: AdaTapeOutput | None = None

    @property
    def classifier(self) -> ImageClassifier:
        """The model itself."""
        return cast(ImageClassifier, getattr(self, self._NAME))

    def forward(self, x: ModelInputs) -> Tensor:
        """Return logits (batch, num_classes), or without a head features (batch, num_features).

        Args:
            x: images (batch, in_chans, height, width), or images of many sizes in a list or in a
                dict of patches, as the model takes them.
        """
        self.last_output = None  # what the last call kept is freed before this one needs memory
        encoded = self.classifier.encode(x)
        logits = self.forward_head(encoded.batch)
        self.last_output = self.classifier.output_of(encoded, logits)
        return logits

    if TYPE_CHECKING:
        __call__ = forward

    def forward_features(self, x: ModelInputs) -> ElasticBatch:
        """Return the encoded tokens of images, the tape tokens of each, if any, behind its own.

        They are an `ElasticBatch`, since images have different numbers of tokens; `to_padded` gives
        (batch, longest, num_features) and a mask.
        """
        return self.classifier.forward_features(x)

    def forward_head(self, x: ElasticBatch, pre_logits: bool = False) -> Tensor:
        """Return logits, or what the head's linear layer sees, of encoded tokens.

        Args:
            x: what `forward_features` returned.
            pre_logits: whether to leave the linear layer out.
        """
        check_kind("x", x, ElasticBatch)
        pooled = self.classifier._pool(x)
        return self.classifier._classify(pooled, pre_logits=pre_logits, drop_rate=self.drop_rate)

    def get_classifier(self) -> nn.Module:
        """Return the head; where num_classes is 0, what is left of it."""
        return self.classifier.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new head, whose weights are zero.

        Args:
            num_classes: number of logits; 0 for no head.
            global_pool: None, or the pooling that the model has.

        Raises:
            ValueError: another pooling is asked for, or the number is negative.
            TypeError: num_classes is no whole number.
        """
        self.classifier.reset_classifier(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether training computes the layers once more in the backward pass."""
        self.classifier.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Return the names of tokens and positions, whose sizes weight decay should leave."""
        return {f"{self._NAME}.{name}" for name in self.classifier.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return expressions that group parameters by layer, as timm's optimizers take them.

        A reader belongs to the layer that it runs before.

        Args:
            coarse: of no consequence, as there are no coarser groups.
        """
        return self.classifier._groups(rf"{self._NAME}\.")

    @property
    def num_classes(self) -> int:
        """Number of logits; with 0 there is no head."""
        return self.classifier.num_classes

    @property
    def num_features(self) -> int:
        """Width of a token."""
        return self.classifier.num_features

    embed_dim = num_features

    @property
    def head_hidden_size(self) -> int:
        """Width of what the head's linear layer sees."""
        return self.classifier.head_hidden_size

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return self.classifier.in_chans

    @property
    def global_pool(self) -> str:
        """What the head sees: "token", "avg", "max" or "sum"."""
        return self.classifier.global_pool

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before those of the image."""
        return self.classifier.num_prefix_tokens

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The name, width and pixels per token of each layer."""
        return [
            {**layer, "module": f"{self._NAME}.{layer['module']}"}
            for layer in self.classifier.feature_info
        ]

    @property
    def grad_checkpointing(self) -> bool:
        """Whether training computes the layers once more in the backward pass."""
        return self.classifier.grad_checkpointing

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_output": None}


class TimmAdaTape(TimmClassifier):
    """An AdaTape ViT that returns logits and is trained by timm's scripts, as a TimmClassifier.

    What a call reads, and its ponder loss, are in `last_output` until the next call.

    Args:
        adatape: the model, new, loaded or made of a pretrained ViT.
        drop_rate: probability with which training drops a feature that the head sees.

    Attributes:
        adatape: the model.

    Raises:
        TypeError: adatape is no AdaTapeViT.
        ValueError: drop_rate is no probability.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> from adatape_kernels.models.timm_protocol import TimmAdaTape
        >>> model = TimmAdaTape(ak.models.adatape_vit("Ti/8", image_size=16, num_classes=5))
        >>> model(torch.zeros(2, 3, 16, 16)).shape, model.last_output.tape_lens.shape
        (torch.Size([2, 5]), torch.Size([2]))
    """

    _NAME = "adatape"
    adatape: AdaTapeViT

    def __init__(self, adatape: AdaTapeViT, *, drop_rate: float = 0.0):
        check_kind("adatape", adatape, AdaTapeViT)
        super().__init__(adatape, drop_rate=drop_rate)


class PonderLoss(nn.Module):
    """A criterion of logits and labels that adds the ponder loss of a model's last call.

    `PonderLoss(model, torch.nn.CrossEntropyLoss())` gives what `AdaTape.loss` gives. Make it of the
    model before that is wrapped or compiled.

    Args:
        model: the model whose logits come.
        criterion: what gives the loss of logits and labels; any of timm's, for instance.

    Raises:
        TypeError: model is no TimmClassifier, or criterion cannot be called.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> from adatape_kernels.models.timm_protocol import PonderLoss, TimmAdaTape
        >>> model = TimmAdaTape(ak.models.adatape_vit("Ti/8", image_size=16, num_classes=5))
        >>> criterion = PonderLoss(model, torch.nn.CrossEntropyLoss())
        >>> criterion(model(torch.zeros(2, 3, 16, 16)), torch.tensor([0, 4])).shape
        torch.Size([])
    """

    def __init__(self, model: TimmClassifier, criterion: Callable[[Tensor, Any], Tensor]):
        check_kind("model", model, TimmClassifier)
        if not callable(criterion):
            raise TypeError(f"criterion: expected a function or module, got {shown(criterion)}")
        super().__init__()
        self.criterion = criterion
        # Within a tuple it is no submodule, whose parameters would be this module's.
        self._model = (model,)

    def forward(self, output: Tensor, target: Any) -> Tensor:
        """Return the loss.

        Args:
            output: the logits that the model's last call returned.
            target: what the criterion takes.

        Raises:
            ValueError: the model's last call was on another number of images, or there was none.
        """
        (model,) = self._model
        last = model.last_output
        if last is None or last.logits.shape[0] != output.shape[0]:
            images = "no images" if last is None else f"{last.logits.shape[0]} images"
            raise ValueError(
                f"output: expected the logits of the model's last call, which was on {images}, "
                f"got {tuple(output.shape)}"
            )
        charge = model.classifier.charge(last)
        loss = self.criterion(output, target)
        return loss if charge is None else loss + charge

    if TYPE_CHECKING:
        __call__ = forward
