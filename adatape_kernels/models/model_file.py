"""A model in one file: safetensors, whose metadata holds all that is needed to build it again.

Besides the tensors the file holds, as JSON in its metadata, the model's class and configuration,
the names of its classes and its preprocessing where they are known, and a SHA-256 over all of that
and over every tensor's name, dtype, shape and bytes. Nothing in a file is ever executed.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adatape_kernels.arguments import check_kind, check_path, shown
from adatape_kernels.data.preprocessing import Preprocessing
from adatape_kernels.data.printable import printable
from adatape_kernels.layers import ElasticModule
from adatape_kernels.models.encoder_config import EncoderConfig
from adatape_kernels.ops.implementation import FLOAT_DTYPES

FILE = "model.safetensors"
"""Name of a model's file in a folder."""
FORMAT = 1
"""Version of the format; files of a newer one are refused."""

_METADATA, _CHECKSUM = "adatape_kernels", "adatape_kernels_sha256"


class SavedModel(ElasticModule):
    """What a model that can be saved has, beside its parameters."""

    config: EncoderConfig
    """Sizes and choices; the model is made of nothing else."""
    class_names: tuple[str, ...] | None = None
    """The name of each class, where it is known; saved with the model."""
    preprocessing: Preprocessing | None = None
    """What makes the input of image files, where it is known; saved with the model."""


_Model = TypeVar("_Model", bound=type[SavedModel])
_MODELS: dict[str, tuple[type[SavedModel], type[EncoderConfig]]] = {}


def saved_with(config_class: type[EncoderConfig]) -> Callable[[_Model], _Model]:
    """Return a decorator of a model that is built of one configuration of this class alone."""

    def register(model_class: _Model) -> _Model:
        _MODELS[model_class.__name__] = model_class, config_class
        return model_class

    return register


@dataclass(frozen=True)
class Description:
    """What a file says of its model, without the tensors."""

    config: EncoderConfig
    """The model's configuration, whose class decides the model's."""
    class_names: tuple[str, ...] | None = None
    """The name of each class; None where they are not known."""
    preprocessing: Preprocessing | None = None
    """What makes the model's input of image files; None where it is not known."""

    def build(self, tensors: Mapping[str, Tensor], file: Path) -> SavedModel:
        """Return the model with these parameters, in the mode for evaluation.

        Raises:
            ValueError: the tensors' names or shapes are not the model's, or one is of a dtype that
                no parameter has; the error names the file.
        """
        found = [m for m, config in _MODELS.values() if type(self.config) is config]
        if not found:
            raise ValueError(
                f"config: expected that of {' or '.join(_MODELS)}, got {type(self.config).__name__}"
            )
        make: Callable[[EncoderConfig], SavedModel] = found[0]
        with torch.device("meta"):
            model = make(self.config)
        expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        check_names_and_shapes(file, expected, {n: tuple(t.shape) for n, t in tensors.items()})
        for name, tensor in tensors.items():
            if tensor.dtype not in FLOAT_DTYPES:
                raise ValueError(
                    f"{printable(file)}: expected floating-point of 16 to 64 bits for {name}, "
                    f"got {tensor.dtype}"
                )
        model.load_state_dict(dict(tensors), assign=True)
        model.class_names, model.preprocessing = self.class_names, self.preprocessing
        return model.eval()


def save(
    model: SavedModel,
    target: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
) -> Path:
    """Write a model into one safetensors file, from which `load` builds it again.

    Args:
        model: one of `adatape_kernels.models`, on any device and in any dtype.
        target: a file whose name ends in .safetensors, or a folder, made if it is missing, in which
            the file is called model.safetensors. A file of this name is replaced.
        class_names: the name of each class; None for those that the model has, if any.
        preprocessing: what makes the model's input of image files; None for the model's own.

    Returns:
        The path of the file.

    Raises:
        TypeError: the model is of another class, or another argument of another type.
        ValueError: there are not as many names as classes, or the preprocessing makes images of
            another size than the model's.
        OSError: the file cannot be written; an earlier one stays.

    Example:
        >>> import tempfile, adatape_kernels as ak
        >>> model = ak.models.adatape_vit("Ti/4", image_size=8, depth=1, num_classes=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = ak.save(model, folder, class_names=["cat", "dog"])
        ...     ak.load(folder).class_names
        ('cat', 'dog')
    """
    file = check_path("target", target)
    content = serialised(model, class_names=class_names, preprocessing=preprocessing)
    if file.suffix != ".safetensors":
        file.mkdir(parents=True, exist_ok=True)
        file = file / FILE
    # Renaming replaces a file at once, so that nobody ever reads half of one.
    part = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(content)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return file


def serialised(
    model: SavedModel,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
) -> bytes:
    """Return the content of the file that `save` writes. Raises what `save` raises."""
    found = _MODELS.get(type(model).__name__)
    if found is None or type(model) is not found[0]:
        raise TypeError(
            f"model: expected {' or '.join(_MODELS)}, as a file holds no code, "
            f"got {type(model).__name__}"
        )
    if class_names is not None and not isinstance(class_names, Sequence):
        raise TypeError(f"class_names: expected a sequence of names, got {shown(class_names)}")
    if preprocessing is not None:
        check_kind("preprocessing", preprocessing, Preprocessing)
    names = model.class_names if class_names is None else tuple(map(str, class_names))
    preprocess = model.preprocessing if preprocessing is None else preprocessing
    if names is not None and len(names) != model.config.num_classes:
        raise ValueError(
            f"class_names: expected {model.config.num_classes} names, got {len(names)}"
        )
    _check_images(preprocess, model.config)
    if isinstance(getattr(model, "head", None), nn.Identity):
        raise ValueError(
            "model: expected one with its head, got one that reset_classifier(0) took it from"
        )
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    entries = {
        "format": FORMAT,
        "model": type(model).__name__,
        "config": asdict(model.config),
        "class_names": None if names is None else list(names),
        "preprocessing": None if preprocess is None else preprocess.entries(),
    }
    text = json.dumps(entries)
    metadata = {"format": "pt", _METADATA: text}
    import safetensors.torch

    return safetensors.torch.save(tensors, {**metadata, _CHECKSUM: _checksum(metadata, tensors)})


def read(file: Path) -> tuple[Description | None, dict[str, Tensor]]:
    """Read a model's file.

    Returns:
        What it says of the model, None for a file of tensors alone, as version 0.1 wrote; and the
        tensors by name.

    Raises:
        ValueError: the file is cut, altered, of a newer format or no safetensors file; the error
            names it.
        OSError: it cannot be read.
    """
    # The kernels can be tested and measured without safetensors.
    from safetensors import SafetensorError, safe_open

    name = printable(file)
    try:
        with safe_open(os.fspath(file), framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    # Sizes that no tensor can have make torch raise TypeError, OverflowError or RuntimeError.
    except (SafetensorError, UnicodeDecodeError, TypeError, OverflowError, RuntimeError) as error:
        reason = printable((str(error).splitlines() or ["damage"])[0], 200)
        raise ValueError(f"{name}: expected a whole safetensors file, got {reason}") from None
    description = _description(file, metadata) if _METADATA in metadata else None
    if description is not None:
        came = _checksum(metadata, tensors)
        if came != metadata.get(_CHECKSUM):
            raise ValueError(
                f"{name}: expected the SHA-256 that it states, "
                f"{shown(metadata.get(_CHECKSUM, 'none'))}, got {came[:16]}…"
            )
    return description, tensors


def check_names_and_shapes(
    file: Path, expected: Mapping[str, tuple[int, ...]], came: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare what a model has with what a file holds.

    Raises:
        ValueError: they differ; the error names the file, the first three tensors that do and how
            many more there are.
    """
    wrong = [
        f"{name} {expected.get(name, 'none')} / {came.get(name, 'none')}"
        for name in sorted(expected.keys() | came.keys())
        if expected.get(name) != came.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{printable(file)}: expected the tensors of the model, got others (name, the model's "
            f"shape / the file's): {printable('; '.join(wrong[:3]), 400)}{more}"
        )


def _description(file: Path, metadata: Mapping[str, str]) -> Description:
    """Return what the metadata of a file say. Raises ValueError."""
    name = printable(file)
    try:
        entries = json.loads(metadata[_METADATA])
    except (ValueError, RecursionError):
        raise ValueError(f"{name}: expected JSON in its metadata, got something else") from None
    version = entries.get("format") if isinstance(entries, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"{name}: expected a format of 1 or more, got {shown(version)}")
    if version > FORMAT:
        raise ValueError(
            f"{name}: expected a format of at most {FORMAT}, got {version}, "
            "which a newer version of adatape-kernels wrote"
        )
    model, config = entries.get("model"), entries.get("config")
    if not isinstance(model, str) or model not in _MODELS or not isinstance(config, dict):
        raise ValueError(
            f"{name}: expected a model of {', '.join(_MODELS)} and its configuration, "
            f"got {shown(model)}"
        )
    try:
        names, preprocessing = entries.get("class_names"), entries.get("preprocessing")
        description = Description(
            _config(_MODELS[model][1], config),
            None if names is None else tuple(map(str, names)),
            None if preprocessing is None else Preprocessing.from_entries(preprocessing),
        )
        _check_images(description.preprocessing, description.config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {printable(error, 300)}") from None
    count = description.config.num_classes
    if description.class_names is not None and len(description.class_names) != count:
        raise ValueError(
            f"{name}: expected {count} class names, got {len(description.class_names)}"
        )
    return description


def _check_images(preprocessing: Preprocessing | None, config: EncoderConfig) -> None:
    """Raise ValueError where the preprocessing makes other images than a model takes."""
    if preprocessing is None:
        return
    takes = getattr(config, "in_channels", None), getattr(config, "image_size", None)
    makes = preprocessing.channels, preprocessing.image_size
    if makes != takes:
        raise ValueError(
            f"preprocessing: expected the model's channels and image size, {takes}, got {makes}"
        )


def _config(config_class: type[EncoderConfig], entries: Mapping[str, Any]) -> EncoderConfig:
    """Return a configuration from JSON. Raises ValueError."""
    known = {field.name for field in fields(config_class)}
    unknown = sorted(set(entries) - known)
    if unknown:
        raise ValueError(f"config: expected fields of {config_class.__name__}, got {unknown[0]!r}")
    layers = entries.get("read_layers")
    given = {**entries, "read_layers": tuple(layers)} if isinstance(layers, list) else {**entries}
    return config_class(**given)


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over all other metadata and the tensors, as hexadecimal digits."""
    others = sorted(item for item in metadata.items() if item[0] != _CHECKSUM)
    digest = hashlib.sha256(json.dumps(others).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
