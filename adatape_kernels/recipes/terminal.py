"""Output of long runs: whatever is wrong with a terminal, the run goes on.

A stream may be closed, a pipe without a reader or with one that does not read, a full disk, or of
an encoding that lacks a character; none of this is a reason to lose hours of training.
"""

import contextlib
import os
import select
import stat
import sys
from collections.abc import Iterator
from typing import Any

_STREAMS = ("stdout", "stderr")
# How long a reader of a full pipe may take before texts are dropped; once they are, it is not
# waited for again until it reads.
_PATIENCE_MS = 1000


class LenientStream:
    """A text stream that writes what another one can take, and drops what it cannot.

    Characters that the other's encoding lacks become escapes. Each line is passed on at once.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.patience_ms = _PATIENCE_MS

    def write(self, text: str) -> int:
        """Write a text; return its length, whatever became of it."""
        if self.stream is None or not self._takes_more():
            return len(text)
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = getattr(self.stream, "encoding", None) or "ascii"
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            if "\n" in text:
                self.stream.flush()
        except (OSError, ValueError):  # Python raises ValueError over a file that it has closed
            pass
        return len(text)

    def flush(self) -> None:
        """Pass on what is held back."""
        if self.stream is not None and self._takes_more():
            with contextlib.suppress(OSError, ValueError):
                self.stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        try:
            return self.stream is not None and self.stream.isatty()
        except ValueError:
            return False

    def _takes_more(self) -> bool:
        """Return whether a line can be written now without waiting for a reader."""
        ready = _takes_more(self.stream, self.patience_ms)
        self.patience_ms = _PATIENCE_MS if ready else 0
        return ready

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def lenient_output() -> Iterator[None]:
    """Run with a standard output and a standard error that never raise."""
    _occupy_descriptors()
    before = {name: getattr(sys, name) for name in _STREAMS}
    for name, stream in before.items():
        if not isinstance(stream, LenientStream):
            setattr(sys, name, LenientStream(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream)
            if stream is not None and not isinstance(stream, LenientStream):
                _settle(stream)


def say(text: str) -> None:
    """Print a line to standard error, if it can be."""
    with lenient_output():
        print(text, file=sys.stderr)


def _occupy_descriptors() -> None:
    """Open the null device where a standard stream is closed.

    Otherwise the next file, a checkpoint perhaps, would get the descriptor of the standard error,
    and libraries would write their messages into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _settle(stream: Any) -> None:
    """Flush a stream for the last time; what cannot be written is dropped.

    The interpreter flushes again when it ends, and a failure then would change the exit code.
    """
    with contextlib.suppress(OSError, ValueError):
        if _takes_more(stream, 0):
            try:
                stream.flush()
                return
            except OSError:
                pass
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        stream.flush()


def _takes_more(stream: Any, patience_ms: int) -> bool:
    """Return whether a stream can take a line at once; only a full pipe or socket cannot."""
    try:
        descriptor = stream.fileno()
        mode = os.fstat(descriptor).st_mode
    except (OSError, ValueError, AttributeError):
        return True
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)) or not hasattr(select, "poll"):
        return True
    waiting = select.poll()
    waiting.register(descriptor, select.POLLOUT)
    return bool(waiting.poll(patience_ms))
