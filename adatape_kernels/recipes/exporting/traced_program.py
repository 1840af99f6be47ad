"""A model as a traced program: its batch is of any size, and its tape of a size known before."""

import functools
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from adatape_kernels._build import VERSION
from adatape_kernels.arguments import check_int, shown
from adatape_kernels.models import AdaTape, AdaTapeParity, AdaTapeViT
from adatape_kernels.models.padded import PaddedAdaTape, batched_topk_select
from adatape_kernels.ops.compiled_part import FACTS
from adatape_kernels.ops.implementation import HALF_AND_FLOAT, short
from adatape_kernels.ops.lowering import cpp_decompositions

DESCRIPTION = "adatape_kernels"
"""The name under which the description of a model stands in a file."""
INPUTS, OUTPUTS = "inputs", ("logits", "tape_lens")
"""Names of what an exported model takes and returns."""

_DESCRIPTION_FORMAT = 1
_EXAMPLE_BATCH = 4


@dataclass(frozen=True)
class Options:
    """What was asked for; `check_options` fills in what was left open."""

    format: str
    batch: int | None
    capacity: int | None
    backend: str | None

    @property
    def plain(self) -> bool:
        """Whether the program is plain torch."""
        return self.backend == "eager"


class ServedModel(nn.Module):
    """A model in capacity mode, which returns tensors only.

    Args:
        model: the model.
        capacity: tape rows that a read reserves for each example.
    """

    def __init__(self, model: AdaTape, capacity: int):
        super().__init__()
        self.model, self.capacity = model, capacity

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (batch, num_classes) and the tape tokens of each example (batch,)."""
        output = self.model(inputs, capacity=inputs.shape[0] * self.capacity)
        return output.logits, output.tape_lens


class PlainModel(nn.Module):
    """A model in plain torch, padded and masked, whose loops depend on no value.

    Args:
        model: the model.
    """

    def __init__(self, model: AdaTape):
        super().__init__()
        self.padded = PaddedAdaTape(model)
        if model.bank_repeats_rows:
            self.padded.select = functools.partial(batched_topk_select, in_order=True)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `ServedModel.forward` returns."""
        output = self.padded(inputs)
        return output.logits, output.tape_lens


def check_options(model: AdaTape, options: Options) -> Options:
    """Return the options with a backend and a capacity.

    Raises:
        ValueError: they do not go with each other or with the model.
        TypeError: the model is of a class whose inputs are not known here.
    """
    if not isinstance(model, AdaTapeViT | AdaTapeParity):
        raise TypeError(
            f"model: expected AdaTapeViT or AdaTapeParity, got {type(model).__name__}, whose "
            "inputs are not known here (torch.export.export takes it)"
        )
    parameter = next(model.parameters())
    backend = _backend(options, parameter)
    if options.format == "onnx" and (parameter.device.type, parameter.dtype) != (
        "cpu",
        torch.float32,
    ):
        raise ValueError(
            "model: expected torch.float32 on cpu for onnx, which is compared with onnxruntime on "
            f"a CPU, got {parameter.dtype} on {parameter.device}"
        )
    capacity = options.capacity
    if backend == "eager":
        if capacity is not None:
            raise ValueError(
                "capacity: expected none for plain torch, which pads every tape to "
                f"num_tape_tokens, got {shown(capacity)}"
            )
    else:
        most = model.config.num_tape_tokens
        capacity = most if capacity is None else check_int("capacity", capacity, 0)
        if capacity > most:
            raise ValueError(f"capacity: expected 0 to num_tape_tokens = {most}, got {capacity}")
    return replace(options, backend=backend, capacity=capacity)


def _backend(options: Options, parameter: Tensor) -> str | None:
    """Return whose ops the program calls, None for those that choose where they run."""
    format, given = options.format, options.backend
    if given not in (None, "eager", "cpp"):
        raise ValueError(
            "backend: expected eager or cpp, or none for ops that choose where they run, "
            f"got {shown(given)}"
        )
    if format == "onnx":
        if given == "cpp":
            raise ValueError("backend: expected eager for onnx, which has no ops of ours, got cpp")
        return "eager"
    serves = parameter.device.type == "cpu" and parameter.dtype in HALF_AND_FLOAT
    compiled = FACTS["compiled"] == "yes"
    if given == "cpp":
        if not serves:
            names = ", ".join(map(short, HALF_AND_FLOAT))
            raise ValueError(
                f"backend: expected a model in {names} on cpu for cpp, got "
                f"{short(parameter.dtype)} on {parameter.device}"
            )
        if not compiled:
            raise RuntimeError(f"backend: expected cpp to be installed, got none: {FACTS['why']}")
    if format == "aoti" and given is None:
        return "cpp" if serves and compiled else "eager"
    return given


def example_inputs(model: AdaTape, batch: int, seed: int = 0) -> Tensor:
    """Return random inputs of a model, of its dtype and on its device.

    Images are noise of mean 0 and deviation 1; sequences are random symbols, one-hot, so that bank
    tokens of equal scores occur.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, AdaTapeParity):
        symbols = torch.randint(config.element_dim, (batch, config.seq_len), generator=generator)
        inputs = F.one_hot(symbols, config.element_dim).float()
    else:
        shape = batch, config.in_channels, config.image_size, config.image_size
        inputs = torch.randn(shape, generator=generator)
    parameter = next(model.parameters())
    return inputs.to(parameter.device, parameter.dtype)


def trace(model: AdaTape, options: Options) -> torch.export.ExportedProgram:
    """Return the program of a model without gradients, in the mode for evaluation."""
    most = options.batch or _EXAMPLE_BATCH
    example = example_inputs(model, min(most, _EXAMPLE_BATCH))
    # A dimension of which there is one size only is none that varies.
    free = {} if options.batch == 1 else {0: Dim("batch", min=1, max=options.batch)}
    module: nn.Module
    if options.plain:
        module = PlainModel(model)
    else:
        assert options.capacity is not None
        module = ServedModel(model, options.capacity)
    with torch.no_grad():
        program = torch.export.export(
            module.eval(), (example,), dynamic_shapes={INPUTS: free}, strict=False
        )
        if options.backend == "cpp":
            program = program.run_decompositions(dict(cpp_decompositions()))
    return program


def description(model: AdaTape, options: Options) -> dict[str, Any]:
    """Return what a server needs to know of an exported model, in types that JSON has."""
    parameter = next(model.parameters())
    names, preprocessing = model.class_names, model.preprocessing
    return {
        "format": _DESCRIPTION_FORMAT,
        "model": type(model).__name__,
        "config": asdict(model.config),
        "class_names": None if names is None else list(names),
        "preprocessing": None if preprocessing is None else preprocessing.entries(),
        "input": {
            "name": INPUTS,
            "dtype": short(parameter.dtype),
            "shape": list(example_inputs(model, 1).shape[1:]),
            "most": options.batch,
        },
        "outputs": list(OUTPUTS),
        "backend": options.backend or "adatape",
        "device": parameter.device.type,
        "capacity": options.capacity,
        "adatape_kernels": VERSION,
        "torch": torch.__version__,
    }
