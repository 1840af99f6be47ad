"""Heads that do something with what they see before their linear layer."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adatape_kernels.models.encoder_config import EncoderConfig


class NormedHead(nn.Linear):
    """A linear module that normalises its input first, by the LayerNorm `norm`.

    Args:
        dim: width of the input.
        num_classes: width of the output.
        norm_eps: epsilon of the LayerNorm.
    """

    def __init__(self, dim: int, num_classes: int, norm_eps: float):
        super().__init__(dim, num_classes)
        self.norm = nn.LayerNorm(dim, norm_eps)

    def prepared(self, input: Tensor) -> Tensor:
        """Return what the linear layer sees of pooled rows (batch, dim)."""
        return self.norm(input)

    def forward(self, input: Tensor) -> Tensor:
        """Return (batch, num_classes) for pooled rows (batch, dim)."""
        return F.linear(self.norm(input), self.weight, self.bias)


class RepresentedHead(nn.Linear):
    """A linear module whose input passes the dense layer `pre_logits` and tanh first (SPEC 11).

    Args:
        dim: width of the input.
        num_classes: width of the output.
        representation_size: width of what is between.
    """

    def __init__(self, dim: int, num_classes: int, representation_size: int):
        super().__init__(representation_size, num_classes)
        self.pre_logits = nn.Linear(dim, representation_size)
        nn.init.normal_(self.pre_logits.weight, std=dim**-0.5)
        nn.init.zeros_(self.pre_logits.bias)

    def prepared(self, input: Tensor) -> Tensor:
        """Return what the linear layer sees of pooled rows (batch, dim)."""
        return torch.tanh(self.pre_logits(input))

    def forward(self, input: Tensor) -> Tensor:
        """Return (batch, num_classes) for pooled rows (batch, dim)."""
        return F.linear(self.prepared(input), self.weight, self.bias)


def new_head(config: EncoderConfig) -> nn.Linear:
    """Return the head of a model, whose weights are zero but for those before its linear layer."""
    c = config
    head = nn.Linear(c.dim, c.num_classes)
    if c.norm_after_pooling:
        head = NormedHead(c.dim, c.num_classes, c.norm_eps)
    elif c.representation_size:
        head = RepresentedHead(c.dim, c.num_classes, c.representation_size)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def without_classes(head: nn.Module) -> nn.Module:
    """Return what a head, or what was left of one, has before its linear layer."""
    norm, dense = getattr(head, "norm", None), getattr(head, "pre_logits", None)
    if isinstance(norm, nn.Module):
        return nn.Sequential(OrderedDict(norm=norm))
    if isinstance(dense, nn.Module):
        return nn.Sequential(OrderedDict(pre_logits=dense, tanh=nn.Tanh()))
    return nn.Identity()


def keep_parts(head: nn.Module, former: nn.Module) -> None:
    """Let a new head have what a former one, or what was left of that, has before its classes."""
    for name in ("norm", "pre_logits"):
        if hasattr(former, name):
            setattr(head, name, getattr(former, name))
