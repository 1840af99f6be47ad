"""What a caller of `train.run` asks for, before anything is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adatape_kernels.arguments import check_kind, check_path
from adatape_kernels.models.value_checks import as_flag
from adatape_kernels.recipes.run_folder import folder_argument


@dataclass(frozen=True)
class RunRequest:
    """The arguments of `train.run`, each of its own kind; `of` makes one of any objects."""

    folder: Path
    """The run's folder."""
    options: Mapping[str, Any]
    """Values by field of TrainConfig."""
    data_dir: str | Path | None
    """The image set's folder, if it is given."""
    source: Path | None
    """A file with the parameters of a ViT of timm or torchvision, to begin with."""
    init: Path | None
    """A model's file or a run's folder, of this package, to begin with."""
    resume: bool
    """Whether to go on from the folder's checkpoint."""
    execution: Mapping[str, Any]
    """Values by field of Execution."""
    loading: Mapping[str, Any]
    """Values by field of Loading."""
    tensorboard: bool | None
    """Whether TensorBoard's events are written; None for whatever the run has done so far."""

    @classmethod
    def of(
        cls,
        out: object,
        options: Mapping[str, Any],
        data_dir: str | Path | None,
        source: object,
        init: object,
        resume: bool,
        execution: Mapping[str, Any] | None,
        loading: Mapping[str, Any] | None,
        tensorboard: bool | None,
    ) -> "RunRequest":
        """Return the arguments as a request.

        Raises:
            TypeError: a mapping is none.
            ValueError: another argument is of another kind, or there is one beginning too many.
        """
        folder = folder_argument("out", out)
        execution = {} if execution is None else execution
        loading = {} if loading is None else loading
        for name, value in (("options", options), ("execution", execution), ("loading", loading)):
            check_kind(name, value, Mapping)
        as_flag("resume", resume)
        if tensorboard is not None:
            as_flag("tensorboard", tensorboard)
        if data_dir is not None:
            folder_argument("data-dir", data_dir)
        source_file, init_file = (
            None if value is None else check_path(name, value)
            for name, value in (("source", source), ("init", init))
        )
        if source_file is not None and init_file is not None:
            raise ValueError("init: expected none beside --source, got both")
        return cls(
            folder,
            options,
            data_dir,
            source_file,
            init_file,
            resume,
            execution,
            loading,
            tensorboard,
        )
