"""What several ranks say: one of them speaks."""

import contextlib
import io
import signal
import threading
from collections.abc import Iterator

from adatape_kernels.recipes.distributed.rank_watch import is_first_to_fail
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.terminal import say


def say_why(line: str) -> None:
    """Print why this process ends, unless another rank has ended before it and has said why.

    What is wrong with a command is wrong on every rank of it, but a file may be missing on one
    machine alone, and so the first that fails speaks, whichever it is. Ranks that torchrun has not
    started know nothing of each other before they have joined, and each says its own line.

    Args:
        line: what is printed to standard error.
    """
    if _is_first():
        say(line)


def _is_first() -> bool:
    """Return whether no other rank has failed before; from here on this process ends untroubled."""
    try:
        ranks = Ranks.of_environment()
    except ValueError:  # what torchrun sets is damaged, as the line says
        return True
    if not ranks.several:
        return True
    # torchrun ends this rank as soon as it sees another one end, and the line is still to come.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return is_first_to_fail(ranks.number, ranks.restarts)


@contextlib.contextmanager
def spoken_by_rank_0() -> Iterator[None]:
    """Drop what other ranks than rank 0 print to standard output, such as `--help`."""
    try:
        leads = Ranks.of_environment().leads
    except ValueError:  # which the command says itself
        leads = True
    if leads:
        yield
        return
    with contextlib.redirect_stdout(Nowhere()):
        yield


class Nowhere(io.TextIOBase):
    """A text stream that keeps nothing."""

    def write(self, text: str) -> int:
        """Return the length of a text."""
        return len(text)

    def writable(self) -> bool:
        """Return that it takes texts."""
        return True
