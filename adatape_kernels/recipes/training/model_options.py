"""The options of `train` that decide the model: which one, its sizes, its tape and its halting."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from adatape_kernels.arguments import shown
from adatape_kernels.models import AdaTapeViTConfig, ImageClassifier, ViTConfig
from adatape_kernels.models.compared.halting_config import HaltingLevel
from adatape_kernels.models.config import BankKind
from adatape_kernels.models.factory import image_model
from adatape_kernels.op_types import Activation
from adatape_kernels.recipes.training.init_facts import InitFacts, in_options
from adatape_kernels.recipes.training.source_file import SourceFacts, SourceFile

SIZES_OF_A_VARIANT = ("dim", "depth", "heads", "ffn", "patch")
"""The sizes that a variant, or a whole name of a model, decides."""
TAPE_OPTIONS = (
    "num_tape_tokens",
    "topk",
    "halt_threshold",
    "halt_threshold_range",
    "bank",
    "bank_size",
    "bank_patch",
)
"""Options of models that read a tape, which others do not take."""
HALTING_OPTIONS = (
    "act_epsilon",
    "act_level",
    "leave",
    "distinct_layers",
    "gate_scale",
    "gate_center",
    "ponder_weight",
    "distribution_weight",
)
"""Options that are fields of some models' configurations; None for what the model has anyway."""


@dataclass(frozen=True)
class ModelOptions:
    """What decides the model, by the names of the command's options.

    Sizes that are None are those of `variant` or, where `model_name` is a whole one, of that name.
    """

    model_name: str
    """Adatape, vit, uvit, u2t or avit, or a whole name as list_models() has it."""
    image_size: int
    """Side of an image in pixels, which those of imagefolder and shards are brought to."""
    variant: str | None
    """A ViT's size and patch, as in Ti/4, in the place of sizes one by one."""
    patch: int | None
    """Side of an input patch in pixels."""
    bank_patch: int
    """Side of a bank patch in pixels."""
    dim: int | None
    """Width of a token."""
    depth: int | None
    """Number of encoder layers."""
    heads: int | None
    """Number of attention heads."""
    ffn: int | None
    """Hidden width of the feed-forward for input rows."""
    num_tape_tokens: int
    """Most tape tokens that an image reads; 0 for a ViT that has neither bank nor tape."""
    topk: int
    """Number of bank tokens that are merged into one tape token."""
    halt_threshold: float
    """An image reads on while its halting score is below this."""
    activation: Activation
    """That of the feed-forward for input rows."""
    bank: BankKind
    """What the tape is read from: input, the image's own patches, or learn, learned tokens."""
    bank_size: int
    """Number of tokens of a learnable bank."""
    act_epsilon: float | None
    """Uvit, u2t, avit: what halts has a score above 1 - act_epsilon."""
    act_level: HaltingLevel | None
    """Uvit, u2t: what halts on its own, an image (example) or each of its tokens (row)."""
    leave: HaltingLevel | None
    """Uvit, u2t: whether tokens leave with all of their image (example) or each at once (row)."""
    distinct_layers: int | None
    """Uvit, u2t: number of layers that take turns; 0 for one a step."""
    gate_scale: float | None
    """Avit: factor of a token's first feature in its probability to halt."""
    gate_center: float | None
    """Avit: what is taken away from that product before the sigmoid."""
    ponder_weight: float | None
    """Factor of the ponder loss, which charges reading or halting."""
    distribution_weight: float | None
    """Avit: factor of the distribution loss within the loss."""
    source: SourceFacts | None
    """Of a model that began with pretrained parameters, what their file decides."""
    init: InitFacts | None
    """Of a model that began with one of this package, which that was, and what it decides."""

    @property
    def has_variant(self) -> bool:
        """Whether sizes that are None have a value, by a variant or by the model's whole name."""
        return self.variant is not None or image_model(self.model_name).variant is not None

    @property
    def reads(self) -> bool:
        """Whether the model is an AdaTape."""
        return issubclass(image_model(self.model_name).config, AdaTapeViTConfig)

    def model(
        self, num_classes: int, in_channels: int, source: SourceFile | None = None
    ) -> ImageClassifier:
        """Return a new model, with the source's parameters if there is one.

        Raises:
            ValueError: sizes do not fit.
        """
        config, make = self.vit_config(num_classes, in_channels), image_model(self.model_name).model
        if source is not None and isinstance(config, AdaTapeViTConfig):
            return source.model(config)
        made: Any = make
        return made(config)

    def vit_config(self, num_classes: int, in_channels: int) -> ViTConfig:
        """Return the model's configuration.

        Raises:
            ValueError: values do not fit; the error names the options.
        """
        named = image_model(self.model_name)
        options: dict[str, Any] = {
            **named.choices,
            "image_size": self.image_size,
            "in_channels": in_channels,
            "num_classes": num_classes,
            "activation": self.activation,
        }
        if self.reads:
            options |= self._tape_fields()
        if self.source is not None:
            options |= self.source.fields()
        if self.init is not None:
            options |= self.init.fields
            if self.reads and not self.num_tape_tokens:
                options["read_layers"] = ()
        for field, value in (
            ("dim", self.dim),
            ("depth", self.depth),
            ("num_heads", self.heads),
            ("ffn_dim", self.ffn),
            ("patch_size", self.patch),
            *((name, getattr(self, name)) for name in HALTING_OPTIONS),
        ):
            if value is not None:
                options[field] = value
        variant = named.variant if self.variant is None else self.variant
        try:
            return named.config.of(f"Ti/{self.patch}" if variant is None else variant, **options)
        except ValueError as error:
            raise ValueError(in_options(str(error))) from None

    def _tape_fields(self) -> dict[str, Any]:
        """Return the fields of an AdaTapeViTConfig beside those of any ViT."""
        fields = {
            "bank_patch_size": self.bank_patch,
            "num_tape_tokens": self.num_tape_tokens,
            "topk": self.topk,
            "halt_threshold": self.halt_threshold,
            "key_split": 2,
            "pooling": "mean",
            "query": "gap",
            "bank": self.bank,
            "bank_size": self.bank_size,
        }
        if self.num_tape_tokens == 0:
            fields |= {"bank": "learn", "read_layers": ()}  # which needs no parameters
        return fields


BEGINNINGS: dict[str, type[SourceFacts] | type[InitFacts]] = {
    "source": SourceFacts,
    "init": InitFacts,
}
"""What a file that a model began with decides, by the option that names the file."""


def check_beginning(field: str, value: object) -> Any:
    """Return what a file decides, or None. Raises ValueError where a value is neither."""
    if value is not None and not isinstance(value, BEGINNINGS[field]):
        raise ValueError(f"{field}: expected what a file decides, or none, got {shown(value)}")
    return value


def with_beginnings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved options with what files decided. Raises ValueError where that is damaged."""
    found = {name: saved[name] for name in BEGINNINGS if saved[name] is not None}
    if len(found) > 1:
        raise ValueError("init: expected none beside a source, got both")
    return {**saved, **{name: BEGINNINGS[name].of_saved(value) for name, value in found.items()}}


def check_given(model: object, given: Mapping[str, Any]) -> None:
    """Check that options that are given are those of a model.

    Args:
        model: a kind or a name, as `ModelOptions.model_name` has it.
        given: values by option; other options than those of tapes and of halting are ignored.

    Raises:
        ValueError: the model is unknown, or does not take one of the options.
    """
    named = image_model(model)
    reads = issubclass(named.config, AdaTapeViTConfig)
    taken = {field.name for field in fields(named.config)} | {*(TAPE_OPTIONS if reads else ())}
    for name, value in given.items():
        of_some = name in (*TAPE_OPTIONS, *HALTING_OPTIONS)
        if of_some and value is not None and name not in taken:
            raise ValueError(
                f"{name.replace('_', '-')}: expected none for the model {model}, got {shown(value)}"
            )
    if named.variant is not None and given.get("variant") is not None:
        raise ValueError(
            f"variant: expected none beside the model {model}, got {shown(given['variant'])}"
        )
    if not reads and given.get("source") is not None:
        raise ValueError(f"source: expected none for the model {model}, got one")
