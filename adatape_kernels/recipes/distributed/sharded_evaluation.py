"""Evaluation of a test set by all ranks, which gives the numbers of one process."""

from typing import NamedTuple

import torch

from adatape_kernels.data.image_set import ImageSet, Normaliser, Subset
from adatape_kernels.models import AdaTapeViT, ImageClassifier
from adatape_kernels.recipes.devices import device_of
from adatape_kernels.recipes.distributed.divided_parameters import divide_again, is_divided
from adatape_kernels.recipes.distributed.ranks import ALONE, Ranks
from adatape_kernels.recipes.model_comparison import rows_by_layer
from adatape_kernels.recipes.training.train_loop import PREDICT_BATCH, accuracy, predict


class Evaluation(NamedTuple):
    """What a model does on a test set."""

    accuracy: float
    """Share of the images, 0 to 1, whose largest logit is that of their label."""
    work: float
    """Mean number of tape tokens that an image reads, or of rows in all layers of a model that
    reads none."""


def evaluated(
    model: ImageClassifier,
    data: ImageSet,
    normalise: Normaliser,
    dtype: str = "float32",
    ranks: Ranks = ALONE,
    when: str = "",
) -> Evaluation:
    """Evaluate a model on the test half of a set, of which each rank predicts some batches.

    The batches are those of one process, and what is added up are integers, so that every rank gets
    the numbers of one process.

    Args:
        model: the model, equal on all ranks.
        data: its test half is used.
        normalise: what the model was trained with.
        dtype: what products are computed in, one of `execution.DTYPES`.
        ranks: the processes.
        when: stands in the error.

    Raises:
        RuntimeError: a logit is not finite.
    """
    images = len(data.test_labels)
    batches = torch.arange(images).split(PREDICT_BATCH)
    own = batches[ranks.number :: ranks.count]
    right = work = 0
    if own:
        indices = torch.cat(own)
        output = predict(model, Subset(data.test_images, indices), normalise, dtype=dtype)
        right = round(accuracy(output, data.test_labels[indices], when) * len(indices))
        if isinstance(model, AdaTapeViT):
            work = int(output.tape_lens.sum())
        else:
            work = sum(rows_by_layer(model, output))
    if is_divided(model):
        if len(own) < len(batches[:: ranks.count]):
            # Rank 0 has a batch more, for which it needs the parameters of all.
            one = Subset(data.test_images, torch.arange(1))
            predict(model, one, normalise, dtype=dtype)
        divide_again(model)
    sums = ranks.summed(torch.tensor([right, work], device=device_of(model))).tolist()
    return Evaluation(sums[0] / images, sums[1] / images)
