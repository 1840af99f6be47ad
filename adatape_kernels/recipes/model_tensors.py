"""The parameters within a checkpoint's tensors: those of the model, and their moving average."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

MODEL = "model."
"""What the names of a model's parameters begin with in a checkpoint."""
_AVERAGED, _UPDATES = "averaged.", "updates of averaged"


def evaluated_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters that a run is evaluated with: the averaged ones, where there are any.

    Args:
        tensors: those of a checkpoint.
    """
    return below(tensors, _AVERAGED) or below(tensors, MODEL)


def average_tensors(averaged: AveragedModel) -> dict[str, Tensor]:
    """Return what a checkpoint keeps of a moving average, by name."""
    weights = averaged.module.state_dict()
    return {
        _UPDATES: averaged.n_averaged,
        **{_AVERAGED + name: tensor for name, tensor in weights.items()},
    }


def restore_average(file: Path, tensors: Mapping[str, Tensor], averaged: AveragedModel) -> None:
    """Put a checkpoint's tensors into the moving average.

    Args:
        file: where the checkpoint was read, for errors.
        tensors: all of the checkpoint's.
        averaged: the average of a model of the same configuration.

    Raises:
        ValueError: the checkpoint holds no such average.
    """
    weights, updates = below(tensors, _AVERAGED), tensors.get(_UPDATES)
    check_like(file, weights, averaged.module)
    if updates is None or updates.shape or updates.dtype != torch.long:
        raise ValueError(f"{file}: expected the number of {_UPDATES} parameters, got none")
    averaged.module.load_state_dict(weights)
    averaged.n_averaged.copy_(updates)


def check_like(file: Path, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise ValueError unless tensors have the names, shapes and dtypes of a model's."""
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        ours, theirs = (
            f"{tuple(found[name].shape)} {found[name].dtype}" if name in found else "none"
            for found in (expected, tensors)
        )
        if ours != theirs:
            raise ValueError(
                f"{file}: expected {name} of shape {ours}, as the model has, got {theirs}"
            )


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
