"""The moving average of a model's parameters over the steps of its training."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adatape_kernels.models import ImageClassifier
from adatape_kernels.recipes.distributed.divided_parameters import is_part, part_of


class MovingAverage(AveragedModel):
    """A copy of a model, whose `update_parameters` moves it towards the model.

    After n updates the average keeps min(decay, (1 + n) / (10 + n)) of itself at the next, so that
    it soon leaves the parameters that the model began with; the first makes it a copy.

    Args:
        model: the model that is trained.
        decay: the most that the average keeps of itself at a step, 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay

    def next_share(self) -> float:
        """Return which share of the model the next update takes; nothing waits for the device."""
        before = int(self.n_averaged)  # on the CPU, wherever the model is
        return 1 - min(self.decay, (1 + before) / (10 + before)) if before else 1.0

    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the model, and count the update."""
        self.move(model, self.next_share())
        self.n_averaged += 1

    @torch.no_grad()
    def move(self, model: nn.Module, share: float | Tensor) -> None:
        """Take a share of a model's parameters, and all of its buffers, without counting it.

        Args:
            model: the model.
            share: 0 to 1, a number or a scalar on the model's device.
        """
        ours, theirs = _held(self.module.parameters()), _held(model.parameters())
        if isinstance(share, Tensor):
            for parameter, present in zip(ours, theirs, strict=True):
                parameter.lerp_(present, share)
        else:
            move: Callable[..., None] = get_ema_multi_avg_fn(1 - share)
            move(ours, theirs, None)
        for buffer, followed in zip(self.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(followed)


def _held(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return what this process holds of parameters, which several may divide among them."""
    return [part_of(each) if is_part(each) else each for each in parameters]


def averaged_model(model: nn.Module, decay: float) -> MovingAverage:
    """Return a new moving average of a model.

    Args:
        model, decay: as for MovingAverage.
    """
    return MovingAverage(model, decay)


def evaluated_model(model: ImageClassifier, averaged: AveragedModel | None) -> ImageClassifier:
    """Return the model that is evaluated and written: the average, where there is one."""
    return model if averaged is None else cast(ImageClassifier, averaged.module)
