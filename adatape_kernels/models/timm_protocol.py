"""An AdaTape ViT with the methods and attributes that timm's scripts ask of a model.

It does not need timm; `adatape_kernels.timm` enters it into timm's registry.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adatape_kernels.arguments import check_flag, check_int, check_kind, check_number, shown
from adatape_kernels.elastic import ElasticBatch
from adatape_kernels.models.embedding import ModelInputs
from adatape_kernels.models.head import NormedHead
from adatape_kernels.models.output import AdaTapeOutput, stack_ponder
from adatape_kernels.models.vit import AdaTapeViT
from adatape_kernels.op_types import TapeSelection

_POOLINGS = {"token": "token", "mean": "avg", "max": "max", "sum": "sum"}
"""timm's names of poolings, by ours; it has none for a sum."""


class TimmAdaTape(nn.Module):
    """An AdaTape ViT that returns logits and is trained by timm's scripts.

    The model itself is `adatape`, which `save`, `loss`, `padded` and all else of this package take;
    this module adds nothing but dropout before the head. What a call reads, and its ponder loss,
    are in `last_output` until the next call. `PonderLoss` adds that loss to a criterion.

    Args:
        adatape: the model, new, loaded or made of a pretrained ViT.
        drop_rate: probability with which training drops a feature that the head sees.

    Attributes:
        adatape: the model.
        last_output: the `AdaTapeOutput` of the last call, or None. Copies and pickles do not
            take it along.
        num_classes: number of logits; with 0 there is no head.
        num_features, embed_dim, head_hidden_size: width of a token.
        in_chans: channels of an image.
        global_pool: "token", "avg", "max" or "sum"; what the head sees.

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

    def __init__(self, adatape: AdaTapeViT, *, drop_rate: float = 0.0):
        check_kind("adatape", adatape, AdaTapeViT)
        check_number("drop_rate", drop_rate, 0, 1)
        super().__init__()
        config = adatape.config
        self.adatape = adatape
        self.drop_rate = drop_rate
        self.num_classes = config.num_classes
        self.num_features = self.embed_dim = self.head_hidden_size = config.dim
        self.in_chans = config.in_channels
        self.global_pool = _POOLINGS[config.pooling]
        self.num_prefix_tokens = config.num_registers + (config.pooling == "token")
        self.grad_checkpointing = False
        self.last_output: AdaTapeOutput | None = None

    def forward(self, x: ModelInputs) -> Tensor:
        """Return logits (batch, num_classes), or without a head features (batch, num_features).

        Args:
            x: images (batch, in_chans, height, width), or images of many sizes in a list or in a
                dict of patches, as `AdaTapeViT` takes them.
        """
        self.last_output = None  # what the last call kept is freed before this one needs memory
        features, reads = self._encoded(x)
        logits = self.forward_head(features)
        ponder = stack_ponder(reads, logits)
        self.last_output = AdaTapeOutput(logits, features.tape_lens, ponder, reads)
        return logits

    if TYPE_CHECKING:
        __call__ = forward

    def forward_features(self, x: ModelInputs) -> ElasticBatch:
        """Return the encoded tokens of images, the tape tokens of each behind its own.

        They are an `ElasticBatch`, since images read tapes of different lengths; `to_padded` gives
        (batch, longest, num_features) and a mask.
        """
        return self._encoded(x)[0]

    def forward_head(self, x: ElasticBatch, pre_logits: bool = False) -> Tensor:
        """Return logits, or what the head's linear layer sees, of encoded tokens.

        Args:
            x: what `forward_features` returned.
            pre_logits: whether to leave the linear layer out.
        """
        check_kind("x", x, ElasticBatch)
        head, pooled = self.adatape.head, self.adatape._pool(x)
        if isinstance(head, NormedHead):
            pooled = F.dropout(head.norm(pooled), self.drop_rate, self.training)
            return pooled if pre_logits else F.linear(pooled, head.weight, head.bias)
        if self.num_classes == 0:  # `head` is an Identity, or the norm alone
            return F.dropout(head(pooled), self.drop_rate, self.training)
        pooled = F.dropout(pooled, self.drop_rate, self.training)
        return pooled if pre_logits else head(pooled)

    def get_classifier(self) -> nn.Module:
        """Return the head; where num_classes is 0, what is left of it."""
        return self.adatape.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new head, whose weights are zero.

        Args:
            num_classes: number of logits; 0 for no head.
            global_pool: None, or the pooling that the model has.

        Raises:
            ValueError: another pooling is asked for, or the number is negative.
            TypeError: num_classes is no whole number.
        """
        num_classes = check_int("num_classes", num_classes)
        if global_pool not in (None, self.global_pool):
            raise ValueError(
                f"global_pool: expected {self.global_pool!r}, which the model was made with, "
                f"got {shown(global_pool)}"
            )
        adatape: Any = self.adatape
        like = adatape.position
        config, norm = adatape.config, getattr(adatape.head, "norm", None)
        head: nn.Module
        if num_classes == 0:
            head = nn.Identity() if norm is None else nn.Sequential(OrderedDict(norm=norm))
        else:
            adatape.config = dataclasses.replace(config, num_classes=num_classes)
            head = nn.Linear(config.dim, num_classes)
            if norm is not None:
                head = NormedHead(config.dim, num_classes, config.norm_eps)
            head.to(like.device, like.dtype)
            for parameter in (head.weight, head.bias):
                nn.init.zeros_(parameter)
            if norm is not None:
                head.norm = norm
        adatape.head = head.train(self.training)
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether training computes the layers once more in the backward pass."""
        check_flag("enable", enable)
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of tokens and positions, whose sizes weight decay should leave."""
        own = ("position", "class_token", "registers", "bank_position")
        readers = self.adatape.encoder.readers
        names = {f"adatape.{name}" for name in own}
        return names | {f"adatape.encoder.readers.{layer}.tape_tokens" for layer in readers}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return expressions that group parameters by layer, as timm's optimizers take them.

        A reader belongs to the layer that it runs before.

        Args:
            coarse: of no consequence, as there are no coarser groups.
        """
        stem = (
            "class_token|registers|position|patch_embed|pre_norm|bank_embed|bank_position|pre_bank"
        )
        return {
            "stem": rf"^adatape\.(?:{stem})",
            "blocks": [
                (r"^adatape\.encoder\.(?:layers|readers)\.(\d+)", None),
                (r"^adatape\.encoder\.norm", (99999,)),
            ],
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_output": None}

    def _encoded(self, images: ModelInputs) -> tuple[ElasticBatch, tuple[TapeSelection, ...]]:
        """Return the encoded tokens, and what each read selected."""
        encoder = self.adatape.encoder
        x, bank, bank_lens = self.adatape.embed_elastic(images)
        if not (self.grad_checkpointing and self.training):
            return encoder(x, bank, bank_lens=bank_lens)
        x, reads = x.round_rows(encoder.row_multiple) if encoder.row_multiple > 1 else x, []
        for layer, reader in encoder.stages():
            if reader is not None:
                x, selection = reader(x, bank, bank_lens=bank_lens)
                reads.append(selection)
            x = checkpoint(layer, x, use_reentrant=False)
        return x.with_data(encoder.norm(x.data)), tuple(reads)


class PonderLoss(nn.Module):
    """A criterion of logits and labels that adds the ponder loss of a model's last call.

    `PonderLoss(model, torch.nn.CrossEntropyLoss())` gives what `AdaTape.loss` gives. Make it of the
    model before that is wrapped or compiled.

    Args:
        model: the model whose logits come.
        criterion: what gives the loss of logits and labels; any of timm's, for instance.

    Raises:
        TypeError: model is no TimmAdaTape, or criterion cannot be called.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> from adatape_kernels.models.timm_protocol import PonderLoss, TimmAdaTape
        >>> model = TimmAdaTape(ak.models.adatape_vit("Ti/8", image_size=16, num_classes=5))
        >>> criterion = PonderLoss(model, torch.nn.CrossEntropyLoss())
        >>> criterion(model(torch.zeros(2, 3, 16, 16)), torch.tensor([0, 4])).shape
        torch.Size([])
    """

    def __init__(self, model: TimmAdaTape, criterion: Callable[[Tensor, Any], Tensor]):
        check_kind("model", model, TimmAdaTape)
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
        ponder = last.ponder.sum(1).mean()
        return self.criterion(output, target) + model.adatape.config.ponder_weight * ponder

    if TYPE_CHECKING:
        __call__ = forward
