"""`adatape-kernels demo`: training on real digits, and what elasticity saves there."""

from dataclasses import dataclass

from adatape_kernels.cli.option_parser import option
from adatape_kernels.cli.options import DeviceOption, asked_device


@dataclass(frozen=True, kw_only=True)
class DemoCommand(DeviceOption):
    """Train on real digits, compare elastic with padded."""

    out: str = option("adatape-demo", metavar="FOLDER")
    """Where the report, the model and the pictures are written."""
    epochs: int | None = option(None, unset="about a minute on two cores")
    """Passes over the training images."""
    seed: int = 0
    """Decides the split, the parameters and the batches."""
    dtype: str = "float32"
    """What products are computed in: float32, or bf16 by autocast; the parameters are float32."""


def run(options: DemoCommand) -> int:
    """Run the demo."""
    from adatape_kernels.recipes import demo

    demo.run(
        options.out,
        epochs=demo.EPOCHS if options.epochs is None else options.epochs,
        seed=options.seed,
        device=asked_device(options),
        dtype=options.dtype,
    )
    return 0
