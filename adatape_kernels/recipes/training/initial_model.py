"""A model of this package that `train --init` begins with: its parameters and its configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.arguments import shown
from adatape_kernels.data.printable import printable
from adatape_kernels.models import (
    AdaTapeViTConfig,
    AViTConfig,
    ImageClassifier,
    UViTConfig,
    ViTConfig,
)
from adatape_kernels.models.factory import image_model
from adatape_kernels.models.model_file import FILE
from adatape_kernels.recipes import checkpoint, model_loading
from adatape_kernels.recipes.model_tensors import check_like
from adatape_kernels.recipes.terminal import say
from adatape_kernels.recipes.training.init_facts import (
    InitFacts,
    fields_without_option,
    options_of,
)
from adatape_kernels.recipes.training.model_options import SIZES_OF_A_VARIANT
from adatape_kernels.recipes.training.source_file import sha256_of
from adatape_kernels.recipes.training.train_defaults import FINE_TUNING, FIXED_SIDES

_KINDS: dict[type, str] = {
    AdaTapeViTConfig: "adatape",
    UViTConfig: "uvit",
    AViTConfig: "avit",
    ViTConfig: "vit",
}
_HEAD = "head."


@dataclass(frozen=True)
class InitialModel:
    """A model that was read, whose parameters another one is to begin with."""

    path: Path
    """The file, or the run's folder, that it was read from."""
    facts: InitFacts
    config: ViTConfig
    class_names: tuple[str, ...] | None
    tensors: Mapping[str, Tensor] = field(repr=False)
    """Its parameters in float32, by name."""

    @classmethod
    def read(cls, path: Path) -> "InitialModel":
        """Read a model's file or the folder of a run, as `adatape_kernels.load` does.

        Raises:
            ValueError: there is no model of images; the error names the argument or the file.
            OSError: a file cannot be read.
        """
        try:
            file = file_of(path)
            model: Any = model_loading.load(path, dtype=torch.float32)
        except ValueError as error:
            text = str(error)
            if text.startswith("source: "):
                text = f"init: {text.removeprefix('source: ')}"
            raise ValueError(text) from None
        config = model.config
        if type(config) not in _KINDS:
            raise ValueError(
                f"init: expected a model of images, got {printable(path)}, a {type(model).__name__}"
            )
        name = path.resolve().name
        facts = InitFacts(name, sha256_of(file), fields_without_option(config))
        return cls(path, facts, config, model.class_names, model.state_dict())

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options of `train` that are given, and those of the model where none is given.

        Raises:
            ValueError: a model of another kind is given.
        """
        given = {name: value for name, value in given.items() if value is not None}
        kind = _KINDS[type(self.config)]
        named = image_model(given.get("model_name", kind))
        if named.config is not type(self.config):
            raise ValueError(
                f"model: expected {kind}, as in {printable(self.path)}, "
                f"got {shown(given['model_name'])}"
            )
        usual = {} if "recipe" in given else FINE_TUNING
        own = self.own_options(given)
        return {"model_name": kind, **usual, **own, **given, "init": self.facts}

    def own_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of `train` that are the model's where others are not given.

        Args:
            given: those that are given; None where one is not.
        """
        own = options_of(self.config)
        named = image_model(given.get("model_name") or _KINDS[type(self.config)])
        for name in named.choices:
            own.pop(name, None)
        if given.get("variant") is not None or named.variant is not None:
            for name in SIZES_OF_A_VARIANT:
                del own[name]
        if given.get("data") in FIXED_SIDES:
            del own["image_size"]
        return own

    def put_into(self, model: ImageClassifier, class_names: tuple[str, ...]) -> None:
        """Give a model these parameters; of another number of classes it keeps its new head.

        Standard error says where the head is new, or now stands for classes of other names.

        Args:
            model: a new model on the CPU.
            class_names: those of the images.

        Raises:
            ValueError: a parameter is of another shape or missing, or would be computed with
                otherwise; the error names it.
        """
        name = printable(self.path)
        ours, theirs = model.config, self.config
        tensors, note = dict(self.tensors), None
        if ours.num_classes != theirs.num_classes:
            note = (
                f"{theirs.num_classes} classes and the images {ours.num_classes}: the head is new"
            )
            tensors |= {
                key: new
                for key, new in model.state_dict().items()
                if key.startswith(_HEAD) and key in tensors and tensors[key].shape != new.shape
            }
        elif self.class_names not in (None, class_names):
            note = (
                f"other names for its {theirs.num_classes} classes: the head begins with its "
                "parameters all the same"
            )
        check_like(self.path, tensors, model)
        # The shapes of parameters do not tell these two.
        for attribute, option in (("num_heads", "heads"), ("activation", "activation")):
            expected, came = getattr(theirs, attribute), getattr(ours, attribute)
            if came != expected:
                raise ValueError(f"{option}: expected {expected}, as in {name}, got {came}")
        model.load_state_dict(tensors)
        if note is not None:
            say(f"adatape-kernels: note: {name} has {note}")


def file_of(path: Path) -> Path:
    """Return the file by whose hash a model is known, which is there or not.

    Args:
        path: a model's file, or the folder of a run; of one that has not finished, the file is its
            checkpoint.json, which holds the hash of the parameters.
    """
    if not path.is_dir():
        return path
    model = path / FILE
    return model if model.exists() else path / checkpoint.INDEX
