"""How steps are computed: in which dtype and how many parts, compiled or as a CUDA graph."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from adatape_kernels.arguments import shown
from adatape_kernels.data.printable import printable
from adatape_kernels.models import AdaTapeOutput, AViTConfig, Classifier, HaltingClassifier
from adatape_kernels.models.value_checks import as_choice, as_flag, as_integer
from adatape_kernels.recipes.compiled_code import kept_by_instructions
from adatape_kernels.recipes.distributed.divided_parameters import DividedParameters, check_fsdp
from adatape_kernels.recipes.distributed.ranks import ALONE, Ranks
from adatape_kernels.recipes.distributed.shared_gradients import SharedGradients
from adatape_kernels.recipes.training.chosen_values import chosen_values

DTYPES = ("float32", "bf16")
"""What products may be computed in; parameters are float32 in either case."""
MOST_PARTS = 1 << 20
PARALLEL = ("ddp", "fsdp")
"""What several processes may hold: all parameters each, or each a part of every one."""

Forward = Callable[..., AdaTapeOutput]
"""A model, or what torch's compiler made of it."""


@dataclass(frozen=True)
class Execution:
    """How steps are computed; but for the dtype this changes a curve by rounding alone.

    Raises:
        ValueError: a value is out of range.
    """

    dtype: str = "float32"
    """One of DTYPES; bf16 is torch's autocast, and the loss is computed in float32 behind it."""
    accumulate: int = 1
    """Number of parts that a step's batch is computed in, one after another, for less memory."""
    checkpoint_layers: bool = False
    """Compute each layer once more in the backward pass, for less memory."""
    compiled: bool = False
    """Make the training steps by torch.compile."""
    parallel: str = "ddp"
    """Under torchrun: ddp, every process holds all parameters, or fsdp, each a part of them."""
    graph: bool = False
    """On a GPU, capture a whole training step as a CUDA graph and replay it."""
    ranks: Ranks = ALONE
    """The processes that share each step."""

    def __post_init__(self) -> None:
        """Check the values."""
        as_choice("dtype", self.dtype, DTYPES)
        parts = as_integer("accumulate", self.accumulate, 1, MOST_PARTS)
        object.__setattr__(self, "accumulate", parts)
        as_flag("checkpoint-layers", self.checkpoint_layers)
        as_flag("compile", self.compiled)
        as_choice("parallel", self.parallel, PARALLEL)
        if self.parallel == "fsdp" and self.ranks.several:
            check_fsdp()
        if self.compiled and self.ranks.several:
            raise ValueError(
                f"compile: expected one process, got {self.ranks.count}; the gradients of several "
                "are brought together within the steps"
            )
        as_flag("graph", self.graph)
        if not self.graph:
            return
        if self.ranks.several:
            raise ValueError(
                f"graph: expected one process, got {self.ranks.count}; what several send each "
                "other is not captured"
            )
        if self.compiled:
            raise ValueError("graph: expected no compile beside it, got both")
        if self.checkpoint_layers:
            raise ValueError(
                "graph: expected no checkpoint-layers beside it, which asks a GPU's generator for "
                "its state within the step, got both"
            )

    @classmethod
    def of_run(
        cls, dtype: str, given: Mapping[str, Any], saved: Mapping[str, Any] | None = None
    ) -> "Execution":
        """Return how a run is computed.

        Args:
            dtype: what the run's configuration says.
            given: values by field; absent or None where nothing is asked for.
            saved: what `entries` returned when the run was last computed, among other entries;
                None for a new run.

        Raises:
            ValueError: a name is unknown, or a value is out of range.
        """
        chosen = chosen_values("execution", cls().entries(), given, saved)
        return cls(dtype, **chosen)

    def entries(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside the configuration."""
        return {
            "accumulate": self.accumulate,
            "checkpoint_layers": self.checkpoint_layers,
            "compiled": self.compiled,
            "parallel": self.parallel,
            "graph": self.graph,
        }

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError where the parts of a batch do not add up to it, or layers are missing.

        What is computed of a whole batch is another number for each part of it.
        """
        parts, option = self.accumulate, "accumulate"
        if parts == 1:
            parts, option = self.ranks.count, "processes"
        if parts > 1:
            for name, module in model.named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    raise ValueError(
                        f"{option}: expected 1 with the batch norm {name}, whose statistics are "
                        f"those of a whole batch, got {parts}"
                    )
            config = getattr(model, "config", None)
            if isinstance(config, AViTConfig) and config.distribution_weight:
                raise ValueError(
                    f"{option}: expected 1 for an A-ViT, whose distribution loss is that of a "
                    f"whole batch, or --distribution-weight 0, got {parts}"
                )
        if self.checkpoint_layers and not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(
                "checkpoint-layers: expected a model with set_grad_checkpointing, got "
                f"{type(model).__name__}"
            )

        if self.graph and isinstance(model, HaltingClassifier):
            raise ValueError(
                "graph: expected a model whose number of rows is fixed, got "
                f"{type(model).__name__}, which counts on the host what has halted"
            )

    def check_device(self, device: torch.device) -> None:
        """Raise ValueError where a CUDA graph is asked for on a device that has none."""
        if self.graph and device.type != "cuda":
            raise ValueError(f"graph: expected a GPU to compute on, or --no-graph, got {device}")

    def check_thresholds(self, drawn: object) -> None:
        """Raise ValueError where steps are compiled whose thresholds are drawn.

        Args:
            drawn: what they are drawn from; None where all steps have the model's own.
        """
        if self.compiled and drawn is not None:
            raise ValueError(
                "compile: expected no halt-threshold-range beside it, as each threshold would be "
                f"compiled anew, got {shown(drawn)}"
            )

    @contextlib.contextmanager
    def forward_of(
        self,
        model: Classifier,
        optimizer: Optimizer | None = None,
        averaged: AveragedModel | None = None,
    ) -> Iterator[Forward]:
        """Yield what computes a training step's output, with the model's own parameters.

        With fsdp they are divided in place, and stay so: `whole_model` makes a whole one.

        Args:
            model: the model.
            optimizer: the optimizer, whose state is divided with the parameters.
            averaged: the moving average of the parameters, which is divided too.

        Raises:
            RuntimeError: torch has no compiler here, and one is asked for.
        """
        forward: Forward = model
        if self.compiled:
            try:
                # Batches that differ in size, as the last of an epoch does, need one graph alone.
                forward = torch.compile(model, dynamic=True)
            except Exception as error:
                raise _no_compiler(error) from None
        before = getattr(model, "grad_checkpointing", False)
        if self.checkpoint_layers:
            model.set_grad_checkpointing(True)
        try:
            if self.ranks.several and self.parallel == "fsdp":
                yield DividedParameters(model, self.ranks, optimizer, averaged)
            else:
                with kept_by_instructions() if self.compiled else contextlib.nullcontext():
                    yield SharedGradients(model) if self.ranks.several else forward
        finally:
            if self.checkpoint_layers:
                model.set_grad_checkpointing(before)

    def try_step(self, model: Classifier, pixels: Tensor) -> None:
        """Compute a gradient that nobody uses, so that what cannot be had shows before training.

        Args:
            model: the model, on its device.
            pixels: some images for it.

        Raises:
            RuntimeError: the compiler is not there, or fails; the error says so in one line.
            NotServed: no backend serves a call.
        """
        device = pixels.device
        labels = torch.zeros(len(pixels), dtype=torch.long, device=device)

        def step(forward: Forward) -> None:
            with computing_in(self.dtype, device):
                output = forward(pixels)
            model.loss(in_float32(output), labels).backward()

        gpus = [device] if device.type == "cuda" else []
        alone = replace(self, ranks=ALONE)
        with torch.random.fork_rng(gpus), alone.forward_of(model) as forward:
            model.train()
            step(model)
            if self.compiled:
                try:
                    step(forward)
                except Exception as error:
                    raise _no_compiler(error) from None
            model.zero_grad()


def _no_compiler(error: Exception) -> RuntimeError:
    """Return the error that says in one line what torch's compiler has said in many."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return RuntimeError(
        f"compile: expected torch.compile to work here, got {printable(reason, 300)}"
    )


def computing_in(dtype: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the products of float32 parameters are computed in a dtype."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def in_float32(output: AdaTapeOutput) -> AdaTapeOutput:
    """Return an output whose logits are float32, as losses and comparisons ask for."""
    if output.logits.dtype != torch.bfloat16:
        return output
    return replace(output, logits=output.logits.float())
