"""The plan of a comparison: which runs there are, and by what options each is trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adatape_kernels.arguments import shown
from adatape_kernels.data import load
from adatape_kernels.recipes.finetune.finetune_report import KINDS
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.loading_options import Loading, with_draws
from adatape_kernels.recipes.training.source_file import SourceFile
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.training_options import TRAINING_OPTIONS
from adatape_kernels.recipes.training.unused_options import OF_A_READ, check_loading_used

# Options of `train` that make the ViT, which a source brings with it.
_OF_THE_VIT = ("variant", "image_size", "patch", "dim", "depth", "heads", "ffn", "activation")
# Options of `train` that change nothing of a kind, as it reads nothing, or from another bank.
_UNUSED: dict[str, tuple[str, ...]] = {
    "plain": OF_A_READ,
    "input": ("bank_size",),
    "learn": ("bank_patch",),
}
# Options of `train` by which both the source and what is fine-tuned from it are trained.
_OF_BOTH = (
    *("data", "limit", "batch", "weight_decay", "seed", "dtype", *TRAINING_OPTIONS),
    *("unreadable", "unreadable_limit"),
)


@dataclass(frozen=True)
class FinetunePlan:
    """What a comparison was started with, as its folder keeps it."""

    options: dict[str, Any]
    """Options of `train` that were given."""
    data_dir: str | None
    source: str | None
    """The file of the source; None for one that is trained here."""
    source_epochs: int | None
    seeds: int
    execution: dict[str, Any] = field(default_factory=dict)
    """What was asked for of how steps are computed, by field of Execution."""
    loading: dict[str, Any] = field(default_factory=dict)
    """What was asked for of how images are read, by field of Loading."""

    def source_options(self) -> dict[str, Any]:
        """Return the options of the run that trains the source."""
        names = (*_OF_BOTH, *_OF_THE_VIT)
        given = {name: self.options[name] for name in names if name in self.options}
        own = {"num_tape_tokens": 0, "epochs": self.source_epochs, "activation": "gelu"}
        return {**own, **given, "split_seed": self._split()}

    def kind_options(self, kind: str, number: int) -> dict[str, Any]:
        """Return the options of one run that begins with the source."""
        options = {n: v for n, v in self.options.items() if n not in _UNUSED[kind]}
        options |= KINDS[kind]
        if self.source is None:  # all but two of the ViT's are in its file
            made = TrainConfig.of(self.source_options())
            vit = made.vit_config(num_classes=1, in_channels=3)
            options = {name: v for name, v in options.items() if name not in _OF_THE_VIT}
            options |= {"heads": vit.num_heads, "activation": vit.activation}
        seed = self.options.get("seed", 0) + number
        return {**options, "seed": seed, "split_seed": self._split()}

    def _split(self) -> int:
        """Return the seed of the split, which all runs have in common."""
        return self.options.get("split_seed", self.options.get("seed", 0))

    def check(self) -> None:
        """Raise ValueError where options are wrong, before any training."""
        self.check_execution()
        bank = self.options.get("bank")
        if bank is not None:
            raise ValueError(f"bank: expected none, as both kinds are compared, got {shown(bank)}")
        recipe = self.options.get("recipe")
        if recipe is not None:
            raise ValueError(f"recipe: expected none for a fine-tuning, got {shown(recipe)}")
        model = self.options.get("model_name", "adatape")
        if model != "adatape":
            raise ValueError(f"model: expected adatape, which is compared, got {shown(model)}")
        if self.options.get("num_tape_tokens") == 0:
            raise ValueError("num-tape-tokens: expected 1 or more, as the control has none, got 0")
        last = self.options.get("seed", 0) + self.seeds - 1
        if self.source is None:
            self._check_run(self.source_options())
            for kind in KINDS:
                options = {**self.options, **KINDS[kind], "seed": last}
                # What changes nothing for one kind is there for another one.
                self._check_run(options, usual=self.options)
        else:
            if self.source_epochs is not None:
                raise ValueError(
                    f"source-epochs: expected none with a source, got {self.source_epochs}"
                )
            start = read_source(Path(self.source), self.options)
            for kind in KINDS:
                self._check_run(self.kind_options(kind, self.seeds - 1), start)

    def _check_run(
        self,
        options: Mapping[str, Any],
        start: SourceFile | None = None,
        usual: Mapping[str, Any] | None = None,
    ) -> None:
        """Raise ValueError where `train` would refuse a run's options."""
        config = TrainConfig.of(with_draws(options, self.loading), start, usual=usual)
        check_loading_used(self.loading, config.data)
        Loading.of_run(self.loading).check_options(config)

    def check_execution(self) -> None:
        """Raise ValueError where a run could not be computed as was asked for."""
        drawn = self.options.get("halt_threshold_range")
        Execution.of_run("float32", self.execution).check_thresholds(drawn)

    def check_data(self) -> None:
        """Refuse an image set that cannot be read, before anything is written.

        Raises:
            ValueError: it cannot.
            RuntimeError: a package that an option needs is not installed.
        """
        if self.source is None:
            config = TrainConfig.of(self.source_options())
        else:
            start = read_source(Path(self.source), self.options)
            config = TrainConfig.of(self.kind_options("plain", 0), start)
        config.require_packages()
        load(config.data, self.data_dir, image_size=config.image_size, seed=config.split)


def read_source(file: Path, options: Mapping[str, Any]) -> SourceFile:
    """Return the file of a source. Raises ValueError where it is none."""
    return SourceFile.read(file, heads=options.get("heads"), activation=options.get("activation"))
