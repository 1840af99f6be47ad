"""The three formats: how each is written, and how it is loaded and called again."""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.data.printable import printable
from adatape_kernels.ops.lowering import cpp_schemas
from adatape_kernels.recipes.exporting.traced_program import (
    DESCRIPTION,
    INPUTS,
    OUTPUTS,
    Options,
)

FORMATS = ("torch.export", "aoti", "onnx")
"""What a model is exported to."""

Served = Callable[[Tensor], tuple[Tensor, Tensor]]
"""What was loaded: from inputs to the logits and the tape tokens of each."""

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def suffix_of(format: str) -> str:
    """Return how the name of a file in a format ends."""
    return ".onnx" if format == "onnx" else ".pt2"


def check_installed(format: str) -> None:
    """Raise RuntimeError where a package is missing that a format needs."""
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if format == "onnx" and missing:
        raise RuntimeError(
            f"onnx: expected the packages {', '.join(_ONNX_PACKAGES)}, got none for "
            f"{', '.join(missing)} (pip install 'adatape-kernels[export]')"
        )


def write_artefact(
    program: torch.export.ExportedProgram, file: Path, options: Options, facts: Mapping[str, Any]
) -> None:
    """Write a program and the description that goes with it.

    Raises:
        RuntimeError: torch cannot compile or translate it.
        OSError: the file cannot be written.
    """
    text = json.dumps(facts)
    if options.format == "torch.export":
        torch.export.save(program, file, extra_files={DESCRIPTION: text})
    elif options.format == "aoti":
        _write_compiled(program, file, text, facts["input"])
    else:
        _write_onnx(program, file, text)


def _write_compiled(
    program: torch.export.ExportedProgram, file: Path, text: str, inputs: Mapping[str, Any]
) -> None:
    """Compile a program. What a server in C++ reads stands beside the JSON, a key each."""
    metadata = {
        DESCRIPTION: text,
        f"{DESCRIPTION}.ops": "\n".join(cpp_schemas(program)),
        f"{DESCRIPTION}.input_shape": " ".join(map(str, inputs["shape"])),
        f"{DESCRIPTION}.input_dtype": inputs["dtype"],
    }
    from torch._inductor import aoti_compile_and_package

    with _one_line("aoti: expected torch to compile the model"):
        aoti_compile_and_package(
            program,
            package_path=os.fspath(file),
            inductor_configs={"aot_inductor.metadata": metadata},
        )


def _write_onnx(program: torch.export.ExportedProgram, file: Path, text: str) -> None:
    with _one_line("onnx: expected torch to translate the model"):
        made = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUTS],
            output_names=list(OUTPUTS),
            verbose=False,
        )
    assert made is not None
    made.model.metadata_props[DESCRIPTION] = text
    made.save(file)


@contextlib.contextmanager
def _one_line(expected: str) -> Iterator[None]:
    """Raise what torch's compilers raise, pages of text, as a RuntimeError of its first cause."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next((line for line in str(cause).splitlines() if line), type(cause).__name__)
        raise RuntimeError(f"{expected}, got: {printable(reason, 300)}") from None


def load_artefact(file: Path, format: str) -> Served:
    """Load what was written, in the way in which a server would."""
    if format == "torch.export":
        return torch.export.load(file).module()
    if format == "aoti":
        from torch._inductor import aoti_load_package

        return aoti_load_package(os.fspath(file))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        os.fspath(file), options, providers=["CPUExecutionProvider"]
    )

    def call(inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits, tape_lens = session.run(list(OUTPUTS), {INPUTS: inputs.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(tape_lens)

    return call


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what exporters tell of themselves; what goes wrong, they raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
