"""What a run trains: the model, its optimizer and the average of its parameters."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from adatape_kernels.data import Preprocessing
from adatape_kernels.data.image_set import Subset, unit_range
from adatape_kernels.models import ImageClassifier
from adatape_kernels.models.model_file import Description
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.checkpoint import Checkpoint
from adatape_kernels.recipes.devices import moved
from adatape_kernels.recipes.distributed.dealing import rows_tensors, saved_rows
from adatape_kernels.recipes.machine import attention_backend
from adatape_kernels.recipes.training.averaged_model import averaged_model, evaluated_model
from adatape_kernels.recipes.training.deterministic_mode import repeatable
from adatape_kernels.recipes.training.initial_model import InitialModel
from adatape_kernels.recipes.training.run_setup import RunSetup, TrainingImages
from adatape_kernels.recipes.training.source_file import SourceFile
from adatape_kernels.recipes.training.train_loop import predict


@dataclass(frozen=True)
class TrainedModel:
    """A model on its device, with what a step changes beside it."""

    model: ImageClassifier
    optimizer: Optimizer
    averaged: AveragedModel | None
    """The moving average of the parameters, if the run has one."""
    rows: Tensor
    """(images,) int64, how many rows each training image took when it was last seen, or 0."""

    @property
    def final(self) -> ImageClassifier:
        """The model that is evaluated and written."""
        return evaluated_model(self.model, self.averaged)

    @classmethod
    def of(cls, setup: RunSetup, images: TrainingImages) -> "TrainedModel":
        """Make what a run begins with, before a checkpoint is put into it.

        Raises:
            ValueError: the parameters that it begins with do not fit, or the model cannot be
                computed in this way.
        """
        config, data, start = images.config, images.data, setup.start
        torch.manual_seed(config.seed)
        source = start if isinstance(start, SourceFile) else None
        # Parameters are drawn on the CPU, so that a seed gives the same ones on every device.
        model = config.model(data.num_classes, len(images.normalise.mean), source)
        if isinstance(start, InitialModel):
            start.put_into(model, data.class_names)
        model = model.to(setup.device)
        setup.execution.check_model(model)
        optimizer = images.plan.optimizer(model)
        averaged = averaged_model(model, config.ema) if config.ema else None
        rows = torch.zeros(len(data.train_labels), dtype=torch.long)
        return cls(model, optimizer, averaged, rows)

    def backend_of_a_step(self, setup: RunSetup, images: TrainingImages) -> str:
        """Compute a step that nobody uses, and return which backend serves the attention.

        What cannot be computed shows here, before anything is written.

        Raises:
            RuntimeError: torch's compiler is asked for, and is not there or fails.
            NotServed: no backend serves a call.
        """
        execution, sample = setup.execution, images.looked.sample
        # A compiler makes graphs for ranges of sizes, and should make that of the batches here.
        tried = -(-images.plan.batch // execution.accumulate) if execution.compiled else 2
        first = Subset(sample, torch.arange(min(tried, len(sample))))
        pixels = images.normalise(unit_range(first[torch.arange(len(first))]))
        with repeatable():  # as in training, since a compiled graph is one of its mode
            execution.try_step(self.model, moved(pixels, setup.device))
        return attention_backend(lambda: predict(self.model, first, images.normalise))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of it."""
        tensors = checkpoint.tensors_of(self.model, self.optimizer, self.averaged)
        return tensors | rows_tensors(self.rows)

    def restore(self, folder: Path, saved: Checkpoint) -> None:
        """Put a checkpoint's tensors into it. Raises ValueError where they are another model's."""
        checkpoint.restore(folder, saved.tensors, self.model, self.optimizer, self.averaged)
        self.rows.copy_(saved_rows(folder / checkpoint.INDEX, saved.tensors, len(self.rows)))

    def description(self, images: TrainingImages) -> Description:
        """Return what a file of the final parameters says of the model."""
        config = self.final.config
        preprocessing = Preprocessing.of(config.image_size, images.normalise)
        return Description(config, images.data.class_names, preprocessing)
