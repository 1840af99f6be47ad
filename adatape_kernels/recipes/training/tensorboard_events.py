"""Scalars and pictures of a run for TensorBoard, in a folder of its own within the run's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from adatape_kernels.data.printable import printable

FOLDER = "tensorboard"
"""Name of the folder in a run's."""
PICTURES = ("heatmap", "shortest_longest", "tape_lengths", "rows_alive", "costs")
"""The pictures that a run may have, by the names of their files without .png."""


def require_tensorboard() -> Any:
    """Return torch's class that writes events.

    Raises:
        RuntimeError: the package tensorboard is missing or cannot be used.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[0], 200)
        raise RuntimeError(
            "tensorboard: expected tensorboard to be installed "
            f"(pip install 'adatape-kernels[tensorboard]'), got {reason}"
        ) from None
    return SummaryWriter


class TensorBoardEvents:
    """The events of a run, each at the number of its epoch.

    What a killed run has written behind its last checkpoint is hidden by TensorBoard, since the
    first event of this writer purges it.

    Args:
        run: the run's folder.
        history: the metrics of the epochs that the run has behind it. They are written where no
            events are there yet.

    Raises:
        RuntimeError: the package tensorboard is missing.
        OSError: the folder cannot be written.
    """

    def __init__(self, run: Path, history: Sequence[Mapping[str, Any]]):
        folder = run / FOLDER
        goes_on = any(folder.glob("events.out.tfevents.*"))
        purge = len(history) + 1 if goes_on else None
        self._writer = require_tensorboard()(str(folder), purge_step=purge)
        if not goes_on:
            for row in history:
                self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write the metrics of an epoch, and have them on the disk."""
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def add_pictures(self, run: Path, epoch: int) -> None:
        """Write the pictures that a run's folder holds."""
        from PIL import Image

        for name in PICTURES:
            file = run / f"{name}.png"
            if file.is_file():
                with Image.open(file) as opened:
                    pixels = numpy.asarray(opened.convert("RGB"))
                self._writer.add_image(name, pixels, epoch, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._writer.close()
