"""Which runs this torchrun has begun, so that they alone go on when it starts all ranks anew."""

from pathlib import Path

from adatape_kernels.recipes.distributed.rank_watch import store_of_torchrun
from adatape_kernels.recipes.distributed.ranks import Ranks

_BEGUN = b"begun"


def note_begun(folder: Path) -> None:
    """Note, in torchrun's store, that a folder belongs to what torchrun has started.

    Args:
        folder: the folder, which this process has claimed, before a file says that it holds a run.
    """
    store = store_of_torchrun("runs")
    if store is not None:
        store.set(_key(folder), _BEGUN)


def goes_on(file: Path, ranks: Ranks) -> bool:
    """Return, on every rank, whether torchrun has started all anew to go on with a run.

    A run that was there before is not gone on with: the first start has refused to overwrite it,
    and torchrun starts all anew whatever the reason was that they ended.

    Args:
        file: a file by which the run's folder holds a run; all ranks get what rank 0 sees.
        ranks: the processes.
    """
    if not ranks.restarts:
        return False
    return ranks.of_first(lambda: file.exists() and _is_begun(file.parent))


def _is_begun(folder: Path) -> bool:
    store = store_of_torchrun("runs")
    # Where torchrun has no store of its own, nothing is known of the starts before.
    return store is None or store.check([_key(folder)])


def _key(folder: Path) -> str:
    return str(folder.resolve())
