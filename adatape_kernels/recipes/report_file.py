"""The report that a command leaves in its folder, and the form of all its JSON files."""

import json
from collections.abc import Mapping
from typing import Any

REPORT = "report.json"
"""Name of the report's file."""


def json_bytes(entries: Mapping[str, Any]) -> bytes:
    """Return the content of a JSON file for people to read."""
    return (json.dumps(entries, indent=2) + "\n").encode()
