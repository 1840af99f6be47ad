"""The fields of TrainConfig: every option of `train` that decides the curve."""

from dataclasses import dataclass

from adatape_kernels.recipes.training.drawn_thresholds import ThresholdRange
from adatape_kernels.recipes.training.loading_options import LoadingOptions
from adatape_kernels.recipes.training.model_options import ModelOptions
from adatape_kernels.recipes.training.training_options import TrainingOptions


@dataclass(frozen=True)
class CurveFields(ModelOptions, TrainingOptions, LoadingOptions):
    """What decides the curve, by the names of the command's options."""

    data: str
    """Name of the image set."""
    epochs: int
    """Number of passes over the training images."""
    batch: int | None
    """Number of images in a step of the optimizer, None until `with_batch_for` chooses it."""
    lr: float
    """The highest learning rate."""
    weight_decay: float
    """AdamW's weight decay."""
    seed: int
    """Decides the split, the parameters, the order of the images and their augmentation."""
    limit: int | None
    """Number of training images that are used; None for all."""
    drop_rest: bool
    """Whether an epoch leaves out the images that do not fill a last batch. No option sets it: it
    is the case in runs of version 0.1 only, which go on as they began."""
    split_seed: int | None
    """Decides the split and the `limit` in the place of `seed`; None for `seed` itself."""
    halt_threshold_range: ThresholdRange | None
    """Draw the halting threshold of each training step from this range, so that the model can be
    run at any; it is tested at `halt_threshold`; None for that one in all steps."""
    dtype: str
    """What products are computed in: float32, or bf16 by autocast; the parameters are float32."""
