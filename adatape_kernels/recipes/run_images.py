"""The images that a run was trained on, found again by what its folder says."""

import json
from pathlib import Path

from adatape_kernels.arguments import shown
from adatape_kernels.data import ImageSet, Normaliser, digits, load
from adatape_kernels.data.printable import printable
from adatape_kernels.models.model_file import SavedModel
from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.report_file import REPORT
from adatape_kernels.recipes.training.saved_options import with_present_names
from adatape_kernels.recipes.training.train_config import TrainConfig


def images_of_run(folder: Path, data_dir: Path | None = None) -> ImageSet:
    """Return the image set of a run of `train`, finished or not, or of the demo.

    Args:
        folder: the run's folder.
        data_dir: the set's folder; None for where it was.

    Raises:
        ValueError: the folder holds no run, or the images are no longer there.
        OSError: a file cannot be read.
    """
    if (folder / checkpoint.INDEX).exists():
        saved = checkpoint.load(folder)
        options = saved.config if saved.format > 1 else with_present_names(saved.config)
        config = TrainConfig.of_saved(options)
        return load(
            config.data,
            data_dir or folder_of_images(folder, saved),
            image_size=config.image_size,
            seed=config.split,
        )
    try:
        report = json.loads((folder / REPORT).read_bytes())
        seed = report["seed"]
        known = "config" not in report and type(seed) is int and seed >= 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise ValueError(
            f"run: expected the folder of a run, with {checkpoint.INDEX}, got {printable(folder)}"
        )
    if data_dir is not None:
        raise ValueError(f"data-dir: expected none for the demo, got {printable(data_dir)}")
    return digits(seed)


def folder_of_images(folder: Path, saved: checkpoint.Checkpoint) -> str | None:
    """Return where the images of a run were, None of a set without files.

    Args:
        folder: the run's folder, for errors.
        saved: the run's checkpoint.

    Raises:
        ValueError: that is no folder now.
    """
    found = saved.environment.get("data_dir")
    if found is None:
        return None
    if not isinstance(found, str) or not found or "\0" in found or not Path(found).is_dir():
        raise ValueError(
            f"data-dir: expected the folder that {printable(folder / checkpoint.INDEX)} names, "
            f"got {shown(found)}, which is none"
        )
    return found


def normaliser_of(model: SavedModel) -> Normaliser:
    """Return what a model was trained with. Raises ValueError where that is not known."""
    known = model.preprocessing
    if known is None:
        raise ValueError("run: expected a model with its preprocessing, got one without")
    return Normaliser(known.mean, known.std)
