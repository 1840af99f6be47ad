"""The cross entropy of logits and labels, which are checked."""

import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels.arguments import check_tensor
from adatape_kernels.models.value_checks import as_number
from adatape_kernels.offsets import can_be_seen

_NOT_COUNTED = -100


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean cross entropy, a scalar.

    Args:
        logits: (batch, num_classes).
        labels: (batch,) int64, 0 to num_classes - 1, or -100 where an example does not count; or
            (batch, num_classes), a probability of each class, of the logits' dtype.
        label_smoothing: the share of the target that is spread over all classes, 0 to 1.

    Raises:
        ValueError: label_smoothing is out of range, or the labels have another shape or dtype or,
            where they lie on the host, are none of the classes.
        TypeError: labels is no tensor.
    """
    label_smoothing = as_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    _check_labels(labels, logits)
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse what are no labels of these logits; values on the host alone, as they can be seen."""
    check_tensor("labels", labels)
    batch, num_classes = logits.shape
    if labels.dtype == logits.dtype and labels.shape == logits.shape:
        return  # a probability of each class
    if labels.dtype != torch.int64 or labels.shape != (batch,):
        raise ValueError(
            f"labels: expected torch.int64 ({batch},) or {logits.dtype} ({batch}, {num_classes}), "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels: expected a tensor on {logits.device}, got {labels.device}")
    if not can_be_seen(labels):
        return
    wrong = labels[((labels < 0) | (labels >= num_classes)) & (labels != _NOT_COUNTED)]
    if len(wrong):
        raise ValueError(f"labels: expected 0 to {num_classes - 1}, got {int(wrong[0])}")
