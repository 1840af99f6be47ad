"""What a run keeps of each epoch: in its checkpoint, in metrics.csv, and in a line."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from adatape_kernels.models.value_checks import as_integer, as_number
from adatape_kernels.recipes.distributed.imbalance import RANK_METRICS
from adatape_kernels.recipes.training.train_config import TrainConfig

_TAPE, _ROWS = "mean_tape_length", "mean_rows"
METRICS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_accuracy",
    _TAPE,
    "images_per_second",
    "learning_rate",
)
"""Columns of metrics.csv, and the entries of each epoch's history in a checkpoint, in order; of a
model that reads no tape the fifth is "mean_rows", that an image has in all layers together."""
WORK = METRICS.index(_TAPE)
"""Which column says how much was computed for an image."""


def columns_of(config: TrainConfig) -> tuple[str, ...]:
    """Return METRICS, in which rows stand for tape tokens where the model reads none."""
    return METRICS if config.reads else tuple(_ROWS if name == _TAPE else name for name in METRICS)


def check_history(history: Sequence[Any], config: Mapping[str, Any]) -> None:
    """Raise ValueError unless each entry holds the metrics of an epoch of a run."""
    epochs, columns = config["epochs"], columns_of(TrainConfig.of_saved(config))
    if len(history) > epochs:
        raise ValueError(f"history: expected up to {epochs} epochs, got {len(history)}")
    for number, row in enumerate(history, start=1):
        names = tuple(row) if type(row) is dict else ()
        if names not in (columns, (*columns, *RANK_METRICS)):
            raise ValueError(f"history: expected {', '.join(columns)} for each epoch, got others")
        as_integer("history: epoch", row["epoch"], number, number)
        for name in names:
            if not math.isfinite(as_number(f"history: {name}", row[name])):
                raise ValueError(f"history: {name}: expected a finite number, got {row[name]}")


def metrics_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> bytes:
    """Return the content of metrics.csv, with further columns where ranks shared an epoch."""
    text = io.StringIO()
    if any(RANK_METRICS[0] in row for row in rows):
        columns = (*columns, *RANK_METRICS)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """Return the line that is printed after an epoch."""
    work = f"tape tokens {row[_TAPE]:.2f}" if _TAPE in row else f"rows {row[_ROWS]:.1f}"
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.3f}, "
        f"train {row['train_accuracy']:.2%}, test {row['test_accuracy']:.2%}, "
        f"{work}, {row['images_per_second']:,.0f} images/s"
    )
