"""Options as the text of a file that `--config` takes."""

import json
from collections.abc import Mapping
from typing import Any


def options_text(values: Mapping[str, Any]) -> str:
    """Return a line of YAML for each option that is not None.

    Args:
        values: bools, numbers, texts, and tuples or lists of them, by option; `_` between words
            becomes `-`.

    Example:
        >>> from adatape_kernels.recipes.options_text import options_text
        >>> print(options_text({"data_dir": "photos", "limit": None, "seeds": (0, 1)}), end="")
        data-dir: "photos"
        seeds: [0, 1]
    """
    return "".join(
        f"{name.replace('_', '-')}: {_escaped(json.dumps(value, ensure_ascii=False))}\n"
        for name, value in values.items()
        if value is not None
    )


def _escaped(text: str) -> str:
    """Return JSON whose texts YAML reads as they are, whatever characters or bytes they are of."""
    return "".join(
        each
        if each.isprintable()
        else f"\\U{ord(each):08x}"
        if ord(each) > 0xFFFF
        else f"\\u{ord(each):04x}"
        for each in text
    )
