"""What torch.compile keeps on disk, apart for each set of vector instructions.

torch finds a graph that it has compiled before by the graph and by its settings, and not by the
instructions for which the C++ was written (torch 2.13). Where ATEN_CPU_CAPABILITY is another one
than then, C++ for vectors of the one width is built with those of the other: sums come out wrong,
and FlexAttention's masks end in a segmentation fault.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def kept_by_instructions() -> Iterator[None]:
    """Have torch use, within the context, only code that was compiled for what it computes with.

    That is for the same vector instructions and the same number of threads, which older versions of
    torch write into the code, too.

    Example:
        >>> import torch
        >>> from adatape_kernels.recipes.compiled_code import kept_by_instructions
        >>> with kept_by_instructions():
        ...     torch.compiler.config.cache_key_tag.split()[-1]
        'threads'
    """
    config: Any = torch.compiler.config
    own = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    with config.patch(cache_key_tag=" ".join(filter(None, [config.cache_key_tag, own]))):
        yield
