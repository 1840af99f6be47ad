"""Which form the products of `dual_ffn` have in Triton: `ffn_products`."""

import contextlib
from collections.abc import Iterator

from adatape_kernels.ops.carried_choice import carry
from adatape_kernels.ops.choice import Choice, Chosen
from adatape_kernels.ops.registration import kept

FFN_PRODUCTS = ("cublas", "grouped", "epilogue")
"""The forms of the products in Triton."""

chosen: Choice[str | None] = kept("ffn_products", lambda: Choice[str | None](None))
"""The form that `ffn_products` asks for on this thread, or None."""
carry("ffn_products", chosen, gives_way=False)


def chosen_products() -> str | None:
    """Return the form that `ffn_products` asks for on this thread, or None."""
    return chosen.value


_recorders: list[list[str]] = kept("form_recorders", list)


def note_form(form: str) -> None:
    """Tell all who record it which form serves a call, forward or backward."""
    for recorder in _recorders:
        recorder.append(form)


@contextlib.contextmanager
def recorded_forms() -> Iterator[list[str]]:
    """Collect which form served each call in Triton, of every thread, in their order."""
    ran: list[str] = []
    _recorders.append(ran)
    try:
        yield ran
    finally:
        # By identity: two records that hold the same are equal.
        del _recorders[next(i for i, other in enumerate(_recorders) if other is ran)]


def ffn_products(name: str | None) -> contextlib.AbstractContextManager[None]:
    """Choose, on this thread, how the Triton backend of `dual_ffn` runs its products.

    "cublas": torch's products on the two slices of rows, one Triton kernel between them.
    "epilogue": the first product in Triton, for both kinds of rows, ends in bias and activation; so
    does its gradient; torch's products do the rest. Both need num_input_rows on the host, and
    Triton does not serve a call without. "grouped": both kinds of rows in one Triton launch a
    product. None, the default: where num_input_rows is on the host the one of the first two that
    arithmetic expects to be faster (docs/gpu-performance.md), else "grouped". A backward takes its
    forward's. Inside a compiled function it ends the graph, as `use_backend` does.

    Raises:
        ValueError: the name is none of these.

    Example:
        >>> import adatape_kernels as ak
        >>> with ak.ops.ffn_products("grouped"):
        ...     pass  # calls of ak.ops.dual_ffn that Triton serves
    """
    if name is not None and name not in FFN_PRODUCTS:
        raise ValueError(f"ffn_products: expected one of {', '.join(FFN_PRODUCTS)}, got {name!r}")
    return Chosen(chosen, name, "ffn_products")
