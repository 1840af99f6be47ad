"""torch's DistributedDataParallel around a model and its loss."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adatape_kernels.models import AdaTapeOutput, Classifier
from adatape_kernels.recipes.quiet_stderr import quiet_stderr

Compute = Callable[[Callable[..., AdaTapeOutput]], tuple[Tensor, AdaTapeOutput]]
"""What calls a model once, and returns the loss and, without gradients, the output."""

_OF_THE_LAYERS = ("encoder", "layers", "norm", "head")


class LossOfModel(nn.Module):
    """A model whose loss is computed within its call.

    DistributedDataParallel waits for the gradient of each parameter that what it returns depends
    on. Of a model's output the loss may use a part alone, and so the loss is what is returned.

    It sends gradients in parts, of parameters in the opposite of the order in which modules have
    them. A model has what makes and reads its rows behind its layers. Their gradients come last,
    and with one of these no part would be sent before all is computed. So they come first here.
    """

    def __init__(self, model: Classifier):
        super().__init__()
        parts = [*model.named_children(), *model.encoder.named_children()]
        late = [part for name, part in parts if name not in _OF_THE_LAYERS]
        self.whose_gradients_come_last = nn.ModuleList(late)
        self.model = model

    def forward(self, compute: Compute, **limits: Any) -> tuple[Tensor, AdaTapeOutput]:
        """Return what `compute` does when it is given the model.

        Args:
            compute: called once.
            limits: given to the model beside what `compute` gives to it.
        """
        return compute(functools.partial(self.model, **limits))


@functools.cache
def _warn_unheard(device: torch.device) -> None:
    """Bring on what torch warns of once in a process: no parameter was unused in a step.

    It writes that past Python's streams, in whichever step it is first so, and on every rank.
    """
    with quiet_stderr():
        norm = nn.LayerNorm(1, device=device)  # which draws nothing from torch's generator
        used = DistributedDataParallel(norm, broadcast_buffers=False, find_unused_parameters=True)
        used(torch.zeros(1, 1, device=device)).sum().backward()


class SharedGradients(DistributedDataParallel):
    """Makes the gradients of all ranks their mean, while a loss's backward pass runs.

    Which parameters a step uses may differ from step to step and from rank to rank: an image may
    halt before the last layers. A parameter that no rank has used keeps the gradient None.

    Args:
        model: the model on this rank's device; rank 0's parameters are given to all.
    """

    def __init__(self, model: Classifier):
        _warn_unheard(next(model.parameters()).device)
        super().__init__(LossOfModel(model), broadcast_buffers=False, find_unused_parameters=True)

    def backward_pass(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a part's backward pass; gradients travel with the last part."""
        return contextlib.nullcontext() if last else self.no_sync()
