"""The head of a model whose last LayerNorm comes after pooling."""

import torch.nn.functional as F
from torch import Tensor, nn


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

    def forward(self, input: Tensor) -> Tensor:
        """Return (batch, num_classes) for pooled rows (batch, dim)."""
        return F.linear(self.norm(input), self.weight, self.bias)
