"""`adatape-kernels finetune`: a pretrained ViT fine-tuned without and with tapes, side by side."""

from dataclasses import dataclass

from adatape_kernels.cli.option_parser import option
from adatape_kernels.cli.options import (
    BackendOption,
    DeviceOption,
    ExecutionOptions,
    LoadingWays,
    ReadingOptions,
    asked_device,
    asked_execution,
    asked_loading,
    chosen_backend,
)
from adatape_kernels.cli.train_options import CurveOptions, ImageOptions, curve_values


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand(
    DeviceOption,
    BackendOption,
    ReadingOptions,
    LoadingWays,
    ExecutionOptions,
    CurveOptions,
    ImageOptions,
):
    """Fine-tune a pretrained ViT without and with tapes, and compare them."""

    source: str | None = option(None, metavar="FILE", unset="one that is trained first")
    """The ViT: a safetensors file of timm or torchvision, with --heads."""
    source_epochs: int | None = option(None, unset="those of train")
    """Number of passes over the training images for the source that is trained first."""
    seeds: int | None = option(None, unset="3")
    """How often each kind is fine-tuned."""
    out: str = option("adatape-finetune", metavar="FOLDER")
    """The comparison's folder."""
    resume: bool = False
    """Go on with the comparison in --out."""


def run(options: FinetuneCommand) -> int:
    """Compare, or go on with a comparison."""
    from adatape_kernels.recipes.finetune import finetune

    with chosen_backend(options.backend):
        finetune.run(
            options.out,
            curve_values(options),
            data_dir=options.data_dir,
            source=options.source,
            source_epochs=options.source_epochs,
            seeds=options.seeds,
            resume=options.resume,
            device=asked_device(options),
            execution=asked_execution(options),
            loading=asked_loading(options),
        )
    return 0
