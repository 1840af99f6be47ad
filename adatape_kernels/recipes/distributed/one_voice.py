"""What several ranks say: one of them speaks."""

import contextlib
import io
import signal
import threading
from collections.abc import Iterator

from adatape_kernels.recipes.distributed import last_words
from adatape_kernels.recipes.distributed.rank_watch import is_first_to_fail
from adatape_kernels.recipes.distributed.ranks import Ranks
from adatape_kernels.recipes.interruptions import ignore
from adatape_kernels.recipes.terminal import say


def say_why(line: str) -> None:
    """Print why this process ends, unless it has said so, or another rank has before it.

    What is wrong with a command is wrong on every rank of it, but a file may be missing on one
    machine alone, and so the first that fails speaks, whichever it is. Ranks that torchrun has not
    started know nothing of each other before they have joined, and each says its own line.

    Args:
        line: what is printed to standard error.

    Raises:
        KeyboardInterrupt: the process was asked to end before anything was said; whoever catches it
            may say a line then, as no other such request is heeded.
    """
    _heed_no_more()
    if last_words.begin() and _is_first():
        say(line)


def _heed_no_more() -> None:
    """Let no request to end cut off what is about to be said.

    torchrun asks this rank to end as soon as it sees another one end. A request that has come and
    was not heeded yet is heeded here.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    # Where a handler is there, `interruptible` has put it there, and takes it away.
    if callable(signal.getsignal(signal.SIGTERM)) or _of_several():
        ignore([signal.SIGTERM, signal.SIGINT])


def _of_several() -> bool:
    try:
        return Ranks.of_environment().several
    except ValueError:  # what torchrun sets is damaged, as the line says
        return False


def _is_first() -> bool:
    """Return whether no other rank has failed before."""
    if not _of_several():
        return True
    ranks = Ranks.of_environment()
    return is_first_to_fail(ranks.number, ranks.restarts)


@contextlib.contextmanager
def spoken_by_rank_0() -> Iterator[None]:
    """Drop what other ranks than rank 0 print to standard output, such as `--help`.

    What a command before has said at its end does not keep this one from saying why it ends.
    """
    last_words.forget()
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
