"""Requests to end, by a terminal or by whoever runs jobs, which end in one line."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

EXIT_INTERRUPTED = 130
"""Exit code of a process that was interrupted."""


@contextlib.contextmanager
def interruptible(*, for_good: bool = False) -> Iterator[None]:
    """Raise KeyboardInterrupt over SIGTERM as over SIGINT, and over the first of them alone.

    A terminal and torchrun may both pass an interrupt on, and people press keys twice: what comes
    behind the first counts no more, as a line is still to be written, and files to be closed.
    Beside other threads than the main one, signals are left as they are.

    Args:
        for_good: whether the process ends behind the context where there was an interruption or an
            error: signals are then ignored from there on, so that none changes its exit code.
            Otherwise they do again behind the context what they did before it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Who starts a process in the background may have told it to ignore interrupts.
    asked = [signal.SIGTERM] + [signal.SIGINT] * callable(signal.getsignal(signal.SIGINT))

    def interrupt(number: int, frame: object) -> NoReturn:
        ignore(asked)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in asked}
    try:
        yield
    except BaseException:
        ignore(asked)
        raise
    finally:
        # They may also be ignored by a context within this one, which has met an interruption.
        if not (for_good and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN):
            for number, handler in before.items():
                signal.signal(number, handler)


def ignore(numbers: list[signal.Signals]) -> None:
    """Ignore signals from here on."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)
