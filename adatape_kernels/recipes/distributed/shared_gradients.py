"""torch's DistributedDataParallel around a model and its loss."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adatape_kernels.models import AdaTapeOutput
from adatape_kernels.recipes.measure import quiet_stderr

Compute = Callable[[Callable[..., AdaTapeOutput]], tuple[Tensor, AdaTapeOutput]]
"""What calls a model once, and returns the loss and, without gradients, the output."""


class LossOfModel(nn.Module):
    """A model whose loss is computed within its call.

    DistributedDataParallel waits for the gradient of each parameter that what it returns depends
    on. Of a model's output the loss may use a part alone, and so the loss is what is returned.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, compute: Compute, **limits: Any) -> tuple[Tensor, AdaTapeOutput]:
        """Return what `compute` does when it is given the model.

        Args:
            compute: called once.
            limits: given to the model beside what `compute` gives to it.
        """
        return compute(functools.partial(self.model, **limits))


class SharedGradients(DistributedDataParallel):
    """Makes the gradients of all ranks their mean, while a loss's backward pass runs.

    Which parameters a step uses may differ from step to step and from rank to rank: an image may
    halt before the last layers. A parameter that no rank has used keeps the gradient None.

    Args:
        model: the model on this rank's device; rank 0's parameters are given to all.
    """

    def __init__(self, model: nn.Module):
        super().__init__(LossOfModel(model), broadcast_buffers=False, find_unused_parameters=True)
        self._called = False

    def forward(self, *inputs: Any, **names: Any) -> Any:
        """Call the model, as LossOfModel does."""
        if self._called:
            return super().forward(*inputs, **names)
        self._called = True
        # torch warns in the first call that its search for unused parameters has found none.
        with quiet_stderr():
            return super().forward(*inputs, **names)

    def backward_pass(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a part's backward pass; gradients travel with the last part."""
        return contextlib.nullcontext() if last else self.no_sync()
