"""What gives the halting probabilities of examples or rows (SPEC 11 and 12)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adatape_kernels.arguments import check_number
from adatape_kernels.halting import HaltingState
from adatape_kernels.layers.layer_checks import check_size
from adatape_kernels.layers.without_autocast import without_autocast


class MeanHaltingUnit(nn.Module):
    """A halting probability for each example, or row: sigmoid(a · row + b), averaged by example.

    The parameters, and what is computed of them, are float32.

    Args:
        dim: width of a token.
        bias_init: b at first; a is 0.

    Raises:
        ValueError: dim is below 1, or bias_init is not finite.
        TypeError: an argument is of another type altogether.

    Source: SPEC 11.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> unit = ak.layers.MeanHaltingUnit(4, bias_init=0.0)
        >>> state = ak.halting.Halting.act().start(ak.ElasticBatch.from_padded(torch.ones(2, 3, 4)))
        >>> unit(state).tolist()
        [0.5, 0.5]
    """

    def __init__(self, dim: int, bias_init: float = -1.0):
        super().__init__()
        check_number("bias_init", bias_init)
        self.projection = nn.Linear(check_size("dim", dim), 1)
        nn.init.zeros_(self.projection.weight)
        nn.init.constant_(self.projection.bias, float(bias_init))

    def forward(self, state: HaltingState) -> Tensor:
        """Return (examples,) or (rows,) probabilities of the running batch, by the rule's level.

        Args:
            state: the state before the step, whose batch is what the step's layer computes on.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> rule = ak.halting.Halting.act(level="row")
            >>> state = rule.start(ak.ElasticBatch.from_padded(torch.ones(1, 3, 4)))
            >>> ak.layers.MeanHaltingUnit(4, bias_init=0.0)(state).tolist()
            [0.5, 0.5, 0.5]
        """
        batch, weight = state.batch, self.projection.weight
        # Products would be computed in another dtype under autocast.
        with without_autocast(weight.device):
            rows = torch.sigmoid(self.projection(batch.data.to(weight.dtype)))
        return rows.squeeze(1) if state.of_rows else batch.with_data(rows).pool("mean").squeeze(1)

    if TYPE_CHECKING:
        __call__ = forward


class FeatureGate(nn.Module):
    """A halting probability for each row, sigmoid(scale · row[0] − center).

    Args:
        scale, center: the factor and what is taken away.
        keep_class_token: whether the first row of each example runs to the last layer.

    Raises:
        ValueError: a number is not finite.
        TypeError: an argument is of another type altogether.

    Source: SPEC 12.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> gate = ak.layers.FeatureGate(scale=2.0, center=1.0)
        >>> batch = ak.ElasticBatch.from_padded(torch.ones(1, 2, 4))
        >>> state = ak.halting.Halting.avit().start(batch)
        >>> gate(state, torch.full((2, 4), 0.5)).tolist()
        [0.5, 0.5]
    """

    def __init__(self, scale: float = 10.0, center: float = 30.0):
        super().__init__()
        check_number("scale", scale)
        check_number("center", center)
        self.scale, self.center = float(scale), float(center)

    def forward(self, state: HaltingState, data: Tensor) -> Tensor:
        """Return (rows,) probabilities.

        Args:
            state: the state before the step.
            data: (rows, dim), what the step's layer made of the rows of its batch.

        Example:
            >>> import torch, adatape_kernels as ak
            >>> batch = ak.ElasticBatch.from_padded(torch.ones(1, 2, 4))
            >>> state = ak.halting.Halting.avit().start(batch)
            >>> ak.layers.FeatureGate(scale=9.0, center=9.0)(state, batch.data).tolist()
            [0.5, 0.5]
        """
        return torch.sigmoid(self.scale * data[:, 0].to(state.total.dtype) - self.center)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        """Return the factor and what is taken away, as a printed module shows them.

        Example:
            >>> import adatape_kernels as ak
            >>> ak.layers.FeatureGate().extra_repr()
            'scale=10, center=30'
        """
        return f"scale={self.scale:g}, center={self.center:g}"
