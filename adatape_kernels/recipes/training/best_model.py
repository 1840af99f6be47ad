"""The parameters of the epoch that was best on the test images, in a file beside the last ones.

A checkpoint names the best epoch and the hash of the file, and is written before the file. Where a
run was killed between the two, the checkpoint's own parameters are those of the best epoch.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from adatape_kernels.arguments import shown
from adatape_kernels.models.model_file import Description, serialised
from adatape_kernels.models.value_checks import as_integer

BEST = "best.safetensors"
"""Name of the file."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENTRIES = ("epoch", "since", "sha256")


def best_epoch(history: Sequence[Mapping[str, Any]], since: int = 1) -> int:
    """Return the number of the first epoch with the highest test accuracy, from `since` on."""
    return max(history[since - 1 :], key=lambda row: row["test_accuracy"])["epoch"]


def best_content(weights: Mapping[str, Tensor], description: Description) -> bytes:
    """Return the content of the file.

    Args:
        weights: the parameters that the model had in the best epoch, as it was evaluated.
        description: what the file says of the model.
    """
    model = description.build(weights, Path(BEST))
    return serialised(model)


def best_entry(epoch: int, since: int, content: bytes) -> dict[str, Any]:
    """Return what a checkpoint keeps of the best epoch.

    Args:
        epoch: its number.
        since: the first epoch that was compared: 1 but for runs that an earlier version began, or
            whose file was lost.
        content: that of its file.
    """
    return {"epoch": epoch, "since": since, "sha256": hashlib.sha256(content).hexdigest()}


def check_best(entry: Any, history: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless an entry is None or fits the metrics of a checkpoint's epochs."""
    if entry is None:
        return
    if not isinstance(entry, dict) or tuple(entry) != _ENTRIES:
        raise ValueError(f"best: expected {', '.join(_ENTRIES)}, got {shown(entry)}")
    if not history:
        raise ValueError(f"best: expected none before the first epoch, got {shown(entry)}")
    since = as_integer("best: since", entry["since"], 1, len(history))
    epoch = as_integer("best: epoch", entry["epoch"], since, len(history))
    if epoch != best_epoch(history, since):
        raise ValueError(f"best: expected epoch {best_epoch(history, since)}, got {epoch}")
    if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
        raise ValueError(f"best: expected a SHA-256, got {shown(entry['sha256'])}")
