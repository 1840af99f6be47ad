"""How a traced program comes to call the C++ ops of the CPU themselves, not our dispatcher.

The kernels of `torch.ops.adatape.*` choose a backend in Python. A program that is to run where
there is no Python calls `torch.ops.adatape_cpu.*`, whose kernels csrc/cpu registers. What is here
translates the former into the latter, and names the schemas that a program in C++ has to declare.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from adatape_kernels.ops.composition import compositions
from adatape_kernels.ops.op import operation, registered_ops
from adatape_kernels.ops.registration import Namespace

_CPU = "adatape_cpu"


def cpp_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Return what `torch.export.ExportedProgram.run_decompositions` takes, for the ops' forwards.

    Raises:
        RuntimeError: this installation has no compiled ops.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> from adatape_kernels.ops.lowering import cpp_decompositions
        >>> torch.ops.adatape.dual_ffn.default in cpp_decompositions()
        True
    """
    table: dict[Any, Callable[..., Any]] = {
        composition.overload: composition.function for composition in compositions()
    }
    for name in registered_ops():
        found = operation(name).implementations.get("cpp")
        if found is None or name.endswith("_bwd"):
            continue
        if found.absent is not None:
            raise RuntimeError(f"backend: expected cpp to be installed, got none: {found.absent}")
        library = Namespace(_CPU).kernels_of(name)
        torch.library.register_fake(f"{_CPU}::{name}", operation(name).fake, lib=library)
        table[operation(name).overload] = _call(getattr(getattr(torch.ops, _CPU), name).default)
    return table


def cpp_schemas(program: torch.export.ExportedProgram) -> list[str]:
    """Return the schemas of the ops `adatape_cpu::*` that a program calls, each without namespace.

    Args:
        program: what `run_decompositions` returned.

    Example:
        >>> import torch, adatape_kernels as ak
        >>> from adatape_kernels.ops.lowering import cpp_schemas
        >>> cpp_schemas(torch.export.export(torch.nn.ReLU(), (torch.ones(2),)))
        []
    """
    # As torch writes an overload: "adatape_cpu.dual_ffn.default".
    targets = [str(node.target).split(".") for node in program.graph.nodes]
    names = {target[1] for target in targets if target[0] == _CPU}
    return [operation(name).schema for name in sorted(names)]


def _call(op: Any) -> Callable[..., Any]:
    """Return a function around an op, which a table of decompositions may hold."""
    return lambda *args: op(*args)
