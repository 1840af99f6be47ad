"""What a run is computed with: what is asked for, else what it was last computed with."""

from collections.abc import Mapping
from typing import Any

from adatape_kernels.arguments import shown


def chosen_values(
    name: str,
    plain: Mapping[str, Any],
    given: Mapping[str, Any],
    saved: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return a value for each field.

    Args:
        name: what the fields are together, for the error.
        plain: the fields, with the values of a new run that asks for nothing.
        given: values by field; absent or None where nothing is asked for.
        saved: what the run was last computed with, among other entries; None for a new run.

    Raises:
        ValueError: a field is unknown.
    """
    for field in given:
        if field not in plain:
            raise ValueError(f"{name}: expected {', '.join(plain)}, got {shown(field)}")
    chosen = {field: (saved or {}).get(field, value) for field, value in plain.items()}
    return chosen | {field: value for field, value in given.items() if value is not None}
