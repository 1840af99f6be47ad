"""Checkpoints as version 0.1 wrote them."""

import json
import re

_ADDED = ("sha256 of this file", "best")


def in_format_1(index):
    """Return the content of a checkpoint.json of format 1, from the entries of a present one."""
    old = {key: value for key, value in index.items() if key not in _ADDED}
    old["format"] = re.sub(r"[0-9]+$", "1", old["format"])
    old["data"] = {key: value for key, value in old["data"].items() if "sha256" not in key}
    old["config"] = {key: value for key, value in old["config"].items() if key != "activation"}
    return json.dumps(old, indent=1).encode()
