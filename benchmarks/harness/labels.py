"""Whether a row's label tells what ran: labels are compared with the dispatcher's record."""

from collections.abc import Iterable, Sequence

from adatape_kernels.ops.op import Ran

PREFIX = "label: "
"""The note of a row whose label differs from what ran begins so."""

ANY_BACKEND = "any"
"""The label of a provider that leaves the choice of the backend to the dispatcher."""


def difference(ran: Iterable[Ran], label: str | None, measured_ops: Sequence[str]) -> str | None:
    """Return how a label differs from what ran, or None where it tells the truth.

    Args:
        ran: every call of our ops that a provider made, forward and backward.
        label: the backend that the provider names; ANY_BACKEND where it names none of them, and
            None for a peer, which must not call any op of ours.
        measured_ops: the ops that the case measures; each of them must have been called.
    """
    called = sorted(set(ran))
    found = ", ".join(f"{op} on {backend}" for op, backend in called) or "no op of ours"
    if label is None:
        return f"{PREFIX}expected a peer that calls no op of ours, got {found}" if called else None
    missing = [op for op in measured_ops if op not in {op for op, _ in called}]
    if missing:
        return f"{PREFIX}expected {' and '.join(missing)} to run, got {found}"
    if label != ANY_BACKEND and any(backend != label for _, backend in called):
        return f"{PREFIX}expected every op to run on {label}, got {found}"
    return None


def in_forms(forms: Iterable[str]) -> str:
    """Return in words which forms of `dual_ffn` in Triton served, if any did."""
    names = " and ".join(sorted(set(forms)))
    return f"dual_ffn: {names}" if names else ""


def served_by(ran: Iterable[Ran]) -> str:
    """Return in words which backend served, and which op where there were several backends."""
    ops_of: dict[str, list[str]] = {}
    for op, backend in sorted(set(ran)):
        ops_of.setdefault(backend, []).append(op)
    if len(ops_of) == 1:
        return f"served by {next(iter(ops_of))}"
    parts = [f"{backend} ({', '.join(ops)})" for backend, ops in ops_of.items()]
    return f"served by {' and '.join(parts)}" if parts else ""
