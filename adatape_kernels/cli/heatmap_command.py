"""`adatape-kernels heatmap`: what a trained model reads, in pictures and numbers."""

from dataclasses import KW_ONLY, dataclass

from adatape_kernels.cli.option_parser import option
from adatape_kernels.cli.options import (
    BackendOption,
    DeviceOption,
    asked_device,
    chosen_backend,
)


@dataclass(frozen=True)
class HeatmapCommand(DeviceOption, BackendOption):
    """Draw what a trained model reads."""

    source: str = option(metavar="RUN", positional=True)
    """Folder of a run of train, or of the demo."""
    images: tuple[str, ...] = option((), metavar="IMAGE", positional=True, by_word=True)
    """Image files to draw in place of test images."""
    _: KW_ONLY
    beside: tuple[str, ...] = option((), metavar="RUN", by_word=True)
    """Further runs, with patches of another size perhaps, drawn side by side with RUN."""
    no_images: bool = False
    """Show no image of the set, only what is read."""
    data_dir: str | None = option(None, metavar="FOLDER", unset="where they were")
    """The set's files."""
    out: str = option("adatape-heatmap", metavar="FOLDER")
    """Where the pictures are written."""


def run(options: HeatmapCommand) -> int:
    """Draw the pictures."""
    from adatape_kernels.recipes.heatmap import heatmap

    with chosen_backend(options.backend):
        heatmap.run(
            options.source,
            options.out,
            images=options.images,
            beside=options.beside,
            data_dir=options.data_dir,
            device=asked_device(options),
            show_images=not options.no_images,
        )
    return 0
