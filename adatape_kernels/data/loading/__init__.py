"""Batches of training images that worker processes prepare, and sets that do not fit in memory.

A `BatchMaker` prepares one batch, or a part of it: it decodes, augments, normalises and mixes. What
is random for an image depends on the seed, the number of the epoch and the image's own alone, so
that any process may prepare any part of any batch. A `BatchLoader` has the batches of an epoch
prepared in their order, in this process or ahead of it in torch's DataLoader workers. `ReadAhead`
has the images of an evaluation decoded by such workers. `UnreadableImages` counts the images that
were skipped, and `LoadingTimes` says how long training waited.
"""

from adatape_kernels.data.loading.batch_loader import BatchLoader
from adatape_kernels.data.loading.batch_maker import BatchMaker, BatchPlace, PreparedBatch
from adatape_kernels.data.loading.loading_times import LoadingTimes
from adatape_kernels.data.loading.read_ahead import ReadAhead, decoded_ahead
from adatape_kernels.data.loading.unreadable_images import UnreadableImages

__all__ = [
    "BatchLoader",
    "BatchMaker",
    "BatchPlace",
    "LoadingTimes",
    "PreparedBatch",
    "ReadAhead",
    "UnreadableImages",
    "decoded_ahead",
]
