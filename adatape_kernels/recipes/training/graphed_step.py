"""A whole step of training as a CUDA graph, which is captured once and replayed for each batch.

A graph holds addresses and numbers, and no Python. So images and labels are copied into tensors
that stay, and what differs from step to step lies in tensors that are written before a replay: the
learning rate, the halting threshold where it is drawn, and the share by which a moving average
follows the model. The model runs in capacity mode, in which no size depends on what was read.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from adatape_kernels.arguments import check_kind
from adatape_kernels.data.printable import printable
from adatape_kernels.models import AdaTape
from adatape_kernels.recipes.training.averaged_model import MovingAverage
from adatape_kernels.recipes.training.epoch_batches import StepBatch
from adatape_kernels.recipes.training.train_step import EagerSteps, StepSums

WARM_UPS = 3
"""Number of times that a step runs before it is captured, so that its kernels are compiled and
libraries have their workspaces."""

Step = Callable[[], StepSums]


class GraphedSteps:
    """Steps of training, of which those of a full batch are replays of one graph.

    The first full batch is captured. A batch of another size, such as the last of an epoch, is
    computed as without a graph, and so in the rows that it reads.

    Args:
        eager: the steps as they are computed without a graph; their optimizer gets its learning
            rate in a tensor.
        images: number of images in a full batch.

    Raises:
        TypeError: the steps average the parameters in another way than MovingAverage does.
    """

    def __init__(self, eager: EagerSteps, images: int):
        if eager.averaged is not None:
            check_kind("averaged", eager.averaged, MovingAverage)
        self.eager, self.images, self.device = eager, images, eager.device
        # AdamW's kernel takes a learning rate of this dtype.
        self._rate, self._share, self._threshold = torch.zeros(3, device=self.device).unbind()
        for group in eager.optimizer.param_groups:
            group["lr"] = self._rate
        self._pixels = self._labels = torch.empty(0)  # of a full batch, from the first one on
        self._limits: dict[str, Any] = {}
        self._replay: Step | None = None

    def __call__(
        self,
        batch: StepBatch,
        rate: float,
        limits: Mapping[str, Any],
        told: Callable[[StepSums], None],
    ) -> None:
        """Compute a step, as EagerSteps does; `told` is called when parameters have changed.

        Raises:
            RuntimeError: the step cannot be captured.
        """
        if len(batch.inputs) != self.images:
            self.eager(batch, rate, limits, told)
            return
        averaged = cast(MovingAverage | None, self.eager.averaged)
        self._rate.fill_(rate)
        if averaged is not None:
            self._share.fill_(averaged.next_share())
        if limits:
            self._threshold.fill_(limits["halt_threshold"])
        if self._replay is None:
            self._pixels = torch.empty_like(batch.inputs, device=self.device)
            self._labels = torch.empty_like(batch.targets, device=self.device)
            self._limits = _capacity(self.eager, self.images)
            if limits:
                self._limits["halt_threshold"] = self._threshold
        _write(self._pixels, batch.inputs)
        _write(self._labels, batch.targets)
        if self._replay is None:
            self._replay = self._captured()
        told(self._replay())
        if averaged is not None:
            averaged.n_averaged += 1

    def _captured(self) -> Step:
        """Return what replays a graph of a step, and leave all as it was before."""
        graph = StepGraph(self.device)
        with _put_back(self.eager):
            graph.warm_up(self._step)
        with _capturable(self.eager):
            return graph.captured(self._step)

    def _step(self) -> StepSums:
        """Compute what a graph holds, on the tensors that stay."""
        eager = self.eager
        sums = eager.gradients(self._pixels, self._labels, self._limits)
        eager.update()
        if eager.averaged is not None:
            cast(MovingAverage, eager.averaged).move(eager.model, self._share)
        return sums


class StepGraph:
    """A CUDA graph of a step.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def warm_up(self, step: Step) -> None:
        """Compute a step a few times, beside the stream on which all else is computed."""
        with torch.cuda.device(self.device):
            stream, present = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(present)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    step()
            present.wait_stream(stream)

    def captured(self, step: Step) -> Step:
        """Return what computes the step once more by replaying a graph of it.

        What it returns is overwritten by the next replay.

        Raises:
            RuntimeError: the step does what no graph holds, such as waiting for a value.
        """
        with torch.cuda.device(self.device):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            try:
                # Other threads may pin memory meanwhile, as that of a loader does.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    sums = step()
            except RuntimeError as error:
                # The end of a capture that failed raises an error of its own.
                raise _not_captured(error.__context__ or error) from None

        def replay() -> StepSums:
            graph.replay()
            return sums

        return replay


def _not_captured(error: BaseException) -> RuntimeError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return RuntimeError(
        f"graph: expected a step that a CUDA graph can hold, got {printable(reason, 300)}"
    )


def _capacity(eager: EagerSteps, images: int) -> dict[str, Any]:
    """Return how many tape rows a model reserves: as many as a part of the batch can read.

    Fewer would be a guess, which has to be looked at on the host in each step. The rows that nobody
    reads are memory alone: attention and feed-forwards skip them.
    """
    if not isinstance(eager.model, AdaTape):
        return {}
    readers = [reader for _, reader in eager.model.encoder.stages() if reader is not None]
    part = -(-images // eager.execution.accumulate)
    return {"capacity": part * max((each.num_tape_tokens for each in readers), default=0)}


@contextlib.contextmanager
def _put_back(eager: EagerSteps) -> Iterator[None]:
    """Undo what steps within the context have done: to parameters, moments, averages and draws."""
    models = [eager.model] if eager.averaged is None else [eager.model, eager.averaged]
    lasting = [each for model in models for each in (*model.parameters(), *model.buffers())]
    lasting += _moments(eager)
    before = [(tensor, tensor.detach().clone()) for tensor in lasting]
    gpus = [eager.device] if eager.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        yield
    known = {id(tensor) for tensor in lasting}
    with torch.no_grad():
        for tensor, values in before:
            tensor.copy_(values)
        for tensor in _moments(eager):
            if id(tensor) not in known:
                tensor.zero_()  # as the optimizer's first step finds them


@contextlib.contextmanager
def _capturable(eager: EagerSteps) -> Iterator[None]:
    """Let the optimizer be captured, which it warns about where a step is computed as usual."""
    groups = eager.optimizer.param_groups
    before = [group.get("capturable", False) for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
            group["capturable"] = value


def _moments(eager: EagerSteps) -> list[Tensor]:
    """Return the tensors that the optimizer keeps from step to step."""
    states = eager.optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def _write(target: Tensor, source: Tensor) -> None:
    """Copy a tensor into one that stays, without waiting for the device."""
    if target.device.type == "cuda" and source.device.type == "cpu":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)
