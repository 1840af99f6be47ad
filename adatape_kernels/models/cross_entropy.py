"""The losses of a classifier, of logits and labels, which are checked."""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from adatape_kernels.arguments import check_tensor
from adatape_kernels.models.value_checks import as_choice, as_number
from adatape_kernels.offsets import can_be_seen

LossKind = Literal["softmax", "sigmoid"]
"""How logits are classified: "softmax", as one distribution over the classes, or "sigmoid", each
class by itself, as scenic trains AdaTape on images."""
LOSS_KINDS: tuple[LossKind, ...] = ("softmax", "sigmoid")
SIGMOID_HEAD_BIAS = -6.9
"""Where scenic starts the bias of a head that is trained by the loss "sigmoid", which is -ln 1000:
of 1,000 classes each then begins with a probability of about 1/1000."""

_NOT_COUNTED = -100


def classification_loss(
    logits: Tensor, labels: Tensor, label_smoothing: float, kind: LossKind = "softmax"
) -> Tensor:
    """Return the mean cross entropy, a scalar.

    Args:
        logits: (batch, num_classes).
        labels: (batch,) int64, 0 to num_classes - 1, or -100 where an example does not count; or
            (batch, num_classes), a probability of each class, of the logits' dtype.
        label_smoothing: the share of the target that is spread over all classes, 0 to 1.
        kind: "softmax" for the cross entropy of the classes' distribution, "sigmoid" for that of
            each class by itself, summed over the classes.

    Raises:
        ValueError: label_smoothing is out of range, the kind is unknown, or the labels have another
            shape or dtype or, where they lie on the host, are none of the classes.
        TypeError: labels is no tensor.
    """
    label_smoothing = as_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    kind = cast(LossKind, as_choice("kind", kind, LOSS_KINDS))
    _check_labels(labels, logits)
    if kind == "softmax":
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return _sigmoid_cross_entropy(logits, labels, label_smoothing)


def _sigmoid_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Return the cross entropy of each class by itself, summed over classes, mean of examples.

    Source: SPEC 7; scenic model_lib/base_models/model_utils.py, weighted_sigmoid_cross_entropy.
    """
    counts, targets = None, labels
    if labels.dim() == 1:
        counts = labels != _NOT_COUNTED
        ones = labels.where(counts, 0).unsqueeze(1)
        targets = torch.zeros_like(logits).scatter(1, ones, 1)
    targets = (1 - label_smoothing) * targets + label_smoothing / max(1, logits.shape[1])
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
    if counts is None:
        return losses.mean()
    return losses.where(counts, 0).sum() / counts.sum()


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
