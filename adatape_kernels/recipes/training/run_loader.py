"""What a run reads of its images before training, and the loader of its batches."""

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adatape_kernels.data import ImageSet, Normaliser
from adatape_kernels.data.image_set import STATISTICS_IMAGES, Images, Subset, evenly_spaced, look_at
from adatape_kernels.data.loading import BatchLoader, BatchMaker, UnreadableImages, decoded_ahead
from adatape_kernels.data.loading.unreadable_images import count_unreadable
from adatape_kernels.recipes.distributed.ranks import ALONE, Ranks
from adatape_kernels.recipes.terminal import say
from adatape_kernels.recipes.training.loading_options import Loading, LoadingOptions
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_plan import TrainPlan


@dataclass(frozen=True)
class LookedAt:
    """The images of a run, as far as they can be read and were looked at."""

    data: ImageSet
    """The set without what was looked at and cannot be read."""
    sample: Images
    """Training images that can be read, which normalisation is measured over."""
    train_unreadable: UnreadableImages
    test_unreadable: UnreadableImages

    @classmethod
    def of(
        cls, data: ImageSet, options: LoadingOptions, loading: Loading, ranks: Ranks = ALONE
    ) -> "LookedAt":
        """Look at the images that are to be looked at, each rank at its share of them.

        Where images may be skipped, those are looked at besides that normalisation is measured
        over.

        Raises:
            ValueError: an image cannot be read and may not be skipped; the error names its file.
        """
        train, test = (UnreadableImages(options.unreadable_limit) for _ in range(2))
        if isinstance(data.train_images, torch.Tensor):
            return cls(data, data.train_images, train, test)
        looked = {"all": (data.train_images, data.test_images), "test": (data.test_images,)}
        if options.unreadable == "stop":
            parts = (decoded_ahead(part, loading.workers) for part in looked.get(loading.look, ()))
            look_at(Subset(part, ranks.own(len(part))) for part in parts)
            return cls(data, data.train_images, train, test)
        if loading.look != "none":
            tested = _readable(data.test_images, torch.arange(len(data.test_labels)), test, ranks)
            data = replace(data, test_images=tested, test_labels=data.test_labels[tested.chosen])
        images = len(data.train_labels)
        if loading.look != "all":
            some = evenly_spaced(images, STATISTICS_IMAGES)
            return cls(data, _readable(data.train_images, some, train, ranks), train, test)
        trained = _readable(data.train_images, torch.arange(images), train, ranks)
        labels = data.train_labels[trained.chosen]
        data = replace(data, train_images=trained, train_labels=labels)
        return cls(data, trained, train, test)

    def loader(
        self,
        config: TrainConfig,
        plan: TrainPlan,
        normalise: Normaliser,
        loading: Loading,
        device: torch.device,
    ) -> contextlib.AbstractContextManager[BatchLoader | None]:
        """Return the context of the loader; of None where training draws its batches itself."""
        if config.draws == "epoch":
            return contextlib.nullcontext()
        maker = BatchMaker(
            self.data.train_images,
            self.data.train_labels,
            num_classes=self.data.num_classes,
            batch=plan.batch,
            batches=plan.steps_per_epoch(len(self.data.train_labels)),
            seed=plan.seed,
            normalise=normalise,
            make_augment=config.augmentation,
            mixup=plan.mixup,
            skip=config.unreadable == "skip",
        )
        return BatchLoader(
            maker,
            loading.workers,
            pinned=device.type == "cuda",
            unreadable=self.train_unreadable,
        )

    def say_unreadable(self) -> None:
        """Print to stderr how many images were skipped, if any were."""
        for found, kind in (
            (self.train_unreadable, "training images"),
            (self.test_unreadable, "test images"),
        ):
            if line := found.line(kind):
                say(f"adatape-kernels: note: {line}")


def _readable(images: Images, asked: Tensor, unreadable: UnreadableImages, ranks: Ranks) -> Subset:
    """Return those of some images that can be read, each of which a rank reads for it.

    Args:
        images: the images that are chosen from.
        asked: (n,) int64, the numbers of those that are looked at.
        unreadable: counts the others; it has counted none.
        ranks: the processes, which all get the same images.

    Raises:
        ValueError: more cannot be read than the limit allows, or all of them.
    """
    found = UnreadableImages(unreadable.limit)
    count_unreadable(images, asked[ranks.own(len(asked))], found)
    unreadable.add(ranks.gathered([*found.reasons.items()]))
    kept = asked[~torch.isin(asked, torch.tensor([*unreadable.reasons], dtype=torch.long))]
    if not len(kept):
        raise ValueError(f"images: expected one that can be read, got {len(asked)} that cannot")
    return Subset(images, kept)
