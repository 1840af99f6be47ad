"""The moving average of a model's parameters over the steps of its training."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adatape_kernels.models import ImageClassifier

_Tensors = tuple[Tensor, ...] | list[Tensor]


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of a model, whose `update_parameters` moves it towards the model.

    After n updates the average keeps min(decay, (1 + n) / (10 + n)) of itself at the next, so that
    it soon leaves the parameters that the model began with.

    Args:
        model: the model that is trained.
        decay: the most that the average keeps of itself at a step, 0 to below 1.
    """

    def average(averaged: _Tensors, present: _Tensors, updates: Tensor | int) -> None:
        before = int(updates)
        kept = min(decay, (1 + before) / (10 + before))
        move: Callable[..., None] = get_ema_multi_avg_fn(kept)
        move(averaged, present, updates)

    return AveragedModel(model, multi_avg_fn=average)


def evaluated_model(model: ImageClassifier, averaged: AveragedModel | None) -> ImageClassifier:
    """Return the model that is evaluated and written: the average, where there is one."""
    return model if averaged is None else cast(ImageClassifier, averaged.module)
