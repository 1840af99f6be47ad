"""The methods and attributes that timm's scripts ask of a ViT, of every model."""

import dataclasses
from typing import Any, cast

from torch import nn

from adatape_kernels.arguments import check_flag, check_int, shown
from adatape_kernels.models.head import keep_parts, new_head, without_classes
from adatape_kernels.models.hub import HubModel

_POOLINGS = {"token": "token", "mean": "avg", "max": "max", "sum": "sum"}
"""timm's names of poolings, by ours; it has none for a sum."""


class TimmMethods(HubModel):
    """A new head, groups of parameters and facts of a model, by the names that timm gives them.

    Attributes:
        num_classes: number of logits; 0 after `reset_classifier(0)`.
        grad_checkpointing: whether training computes the layers once more in the backward pass.

    Example:
        >>> import adatape_kernels as ak
        >>> ak.models.create_model("vit_tiny_patch16_224", depth=1).num_classes
        1000
    """

    num_classes: int
    grad_checkpointing = False
    encoder: nn.Module
    head: nn.Linear

    def get_classifier(self) -> nn.Module:
        """Return the head; where num_classes is 0, what is left of it.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.create_model("vit_tiny_patch16_224", depth=1).get_classifier()
            Linear(in_features=192, out_features=1000, bias=True)
        """
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new head, whose weights are zero.

        The names of another number of classes are forgotten.

        Args:
            num_classes: number of logits; 0 for no head, without which a model cannot be saved.
            global_pool: None, or the pooling that the model has, as `global_pool` names it.

        Raises:
            ValueError: another pooling is asked for, or the number is negative.
            TypeError: num_classes is no whole number.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> model = ak.models.create_model("vit_tiny_patch16_224", image_size=32, depth=1)
            >>> model.reset_classifier(7)
            >>> model(torch.zeros(2, 3, 32, 32)).logits.shape
            torch.Size([2, 7])
        """
        num_classes = check_int("num_classes", num_classes)
        if global_pool not in (None, self.global_pool):
            raise ValueError(
                f"global_pool: expected {self.global_pool!r}, which the model was made with, "
                f"got {shown(global_pool)}"
            )
        like = next(self.encoder.parameters())
        head: Any = without_classes(self.head)
        if num_classes:
            self.config = dataclasses.replace(self.config, num_classes=num_classes)
            head = new_head(self.config).to(like.device, like.dtype)
            keep_parts(head, self.head)
        own: Any = self
        own.head = head.train(self.training)
        if num_classes != self.num_classes:
            self.class_names = None
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether training computes the layers once more in the backward pass.

        Args:
            enable: whether it does.

        Raises:
            TypeError: it is no flag.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.create_model("vit_tiny_patch16_224", depth=1).set_grad_checkpointing()
        """
        check_flag("enable", enable)
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of tokens and positions, whose sizes weight decay should leave.

        Example:
            >>> import adatape_kernels as ak
            >>> model = ak.models.create_model("vit_tiny_patch16_224", depth=1)
            >>> sorted(model.no_weight_decay())
            ['class_token', 'position']
        """
        named = dict(self.named_parameters())
        return {name for name in self._unscaled() if name in named}

    def _unscaled(self) -> tuple[str, ...]:
        """Return the names of parameters that weight decay should leave, where there are such."""
        return ("class_token", "registers")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return expressions that group parameters by layer, as timm's optimizers take them.

        A reader belongs to the layer that it runs before.

        Args:
            coarse: of no consequence, as there are no coarser groups.

        Example:
            >>> import adatape_kernels as ak
            >>> sorted(ak.models.create_model("vit_tiny_patch16_224", depth=1).group_matcher())
            ['blocks', 'stem']
        """
        return self._groups("")

    def _groups(self, prefix: str) -> dict[str, Any]:
        """Return `group_matcher`'s expressions for parameters whose names have a prefix."""
        return {
            "stem": rf"^{prefix}(?:{'|'.join(self._stem())})",
            "blocks": [
                (rf"^{prefix}encoder\.(?:layers|readers)\.(\d+)", None),
                (rf"^{prefix}encoder\.(?:norm|unit)", (99999,)),
            ],
        }

    def _stem(self) -> tuple[str, ...]:
        """Return the beginnings of the names of the parameters that are in front of all layers."""
        return ("class_token", "registers")

    @property
    def num_features(self) -> int:
        """Width of a token; `embed_dim` is the same, by another of timm's names.

        Example:
            >>> import adatape_kernels as ak
            >>> model = ak.models.create_model("vit_tiny_patch16_224", depth=1)
            >>> model.num_features, model.embed_dim
            (192, 192)
        """
        return self.config.dim

    embed_dim = num_features

    @property
    def head_hidden_size(self) -> int:
        """Width of what the head's linear layer sees, which `forward_head` gives as pre_logits.

        Example:
            >>> import adatape_kernels as ak
            >>> small = {"depth": 1, "representation_size": 64}
            >>> ak.models.create_model("vit_tiny_patch16_224", **small).head_hidden_size
            64
        """
        return self.config.representation_size or self.config.dim

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before those of the input: the class token and the registers.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.create_model("vit_tiny_patch16_224", depth=1).num_prefix_tokens
            1
        """
        return self.config.num_registers + self.config.has_class_token

    @property
    def global_pool(self) -> str:
        """What the head sees, by timm's names: "token", "avg", "max" or "sum".

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.create_model("vit_tiny_patch16_224", depth=1).global_pool
            'token'
        """
        return _POOLINGS[self.config.pooling]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """A dict for each layer, as timm's ViTs have it: its name, width and pixels per token.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.models.create_model("vit_tiny_patch16_224", depth=1).feature_info
            [{'module': 'encoder.layers.0', 'num_chs': 192, 'reduction': 16}]
        """
        layers = len(cast(nn.ModuleList, self.encoder.layers))
        return [
            {
                "module": f"encoder.layers.{layer}",
                "num_chs": self.config.dim,
                "reduction": self._pixels_per_token,
            }
            for layer in range(layers)
        ]

    @property
    def _pixels_per_token(self) -> int:
        return 1
