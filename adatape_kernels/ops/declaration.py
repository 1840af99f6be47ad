"""How an op of ours is declared to torch."""

from collections.abc import Callable
from typing import Any

import torch

from adatape_kernels.ops import fast_autograd
from adatape_kernels.ops.op_checks import check_one_device
from adatape_kernels.ops.registration import Namespace
from adatape_kernels.ops.vmap_rule import one_by_one

ADATAPE = Namespace("adatape")
"""Where the ops that everybody calls are."""


def declare(schema: str, library: Any, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Declare an op of `adatape`: its schema, its kernel, its fake and its rule for vmap.

    Args:
        schema: as torch's op schemas are written.
        library: what the op's kernels are registered with.
        run: serves a call.
        fake: returns empty results of the right shapes, dtypes and device.

    Returns:
        The op, as torch calls it.
    """
    name = schema[: schema.index("(")]
    overload = ADATAPE.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, _kernel(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"adatape::{name}", _on_one_device(name, fake), lib=library)
    torch.library.register_vmap(f"adatape::{name}", one_by_one(name, overload), lib=library)
    return overload


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Return the fake with a check without which one tensor on meta would make a result of none."""

    def checked(*args: Any) -> Any:
        check_one_device(name, args)
        return fake(*args)

    return checked


def _kernel(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel of the dispatcher, which `torch.compile` does not trace."""
    return fast_autograd.untraced(lambda *args: run(*args))
