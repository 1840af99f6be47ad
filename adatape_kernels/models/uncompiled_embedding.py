"""Embedding outside of the graphs of `torch.compile`; imported only while such a graph is traced.

Torch's compiler, which the decorator imports, takes as long to import as all the rest of torch.
"""

from collections.abc import Callable

import torch

from adatape_kernels.models.embedding import Embedded


@torch.compiler.disable(reason="images of many sizes are embedded outside of a graph")
def embed_uncompiled(embed: Callable[..., Embedded], inputs: object) -> Embedded:
    """Return what `embed` makes of inputs, without tracing it.

    The compiler would make a program for each list of sizes.
    """
    return embed(inputs)
