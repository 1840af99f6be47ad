"""Measures in a process of its own: what ends that process costs its own rows, and no others.

A compiled peer may end a process by a signal, as wrong code does, and nothing in that process can
catch it. So a second one waits, which has computed nothing. It knows what ran, from memory that
both share, and has the case measured again without that provider, and then all cases that follow.
"""

import contextlib
import ctypes
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Mapping

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130

_NUMBERS = struct.Struct("<qq?i")  # cases done, faults, whether it came to its end, name's bytes
_MOST_NAME = 256
_OUTSIDE = -1  # instead of the bytes of a name: no case is measured
# Whoever sends these wants all of it to end.
_ASKED_TO_END = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE}
_PR_SET_PDEATHSIG = 1


class CasesDone:
    """How far the measurements have come, in memory that outlives the process that measures.

    Attributes:
        start: when they began, as `time.perf_counter` tells it.
        ended: what became of a provider that has ended a process, in words, by the number of the
            case and the name of the provider; "" stands for what none of them did.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.ended: dict[tuple[int, str], str] = {}
        self._memory = mmap.mmap(-1, _NUMBERS.size + _MOST_NAME)
        self._write(0, 0, False, _OUTSIDE)

    def _write(self, *numbers: int) -> None:
        _NUMBERS.pack_into(self._memory, 0, *numbers)

    @property
    def done(self) -> int:
        """How many cases are measured."""
        return int(_NUMBERS.unpack_from(self._memory)[0])

    @property
    def faults(self) -> int:
        """How many of these have a fault."""
        return int(_NUMBERS.unpack_from(self._memory)[1])

    @property
    def finished(self) -> bool:
        """Whether the process that measures has come to its own end."""
        return bool(_NUMBERS.unpack_from(self._memory)[2])

    @property
    def running(self) -> str | None:
        """The provider that runs now, "" for what a case does itself, None between cases."""
        size = _NUMBERS.unpack_from(self._memory)[3]
        if size == _OUTSIDE:
            return None
        return self._memory[_NUMBERS.size : _NUMBERS.size + size].decode(errors="replace")

    def runs(self, provider: str) -> None:
        """Note that a provider of the next case runs from here on, or the case itself: ""."""
        name = provider.encode()[:_MOST_NAME]
        self._memory[_NUMBERS.size : _NUMBERS.size + len(name)] = name
        self._write(self.done, self.faults, False, len(name))

    def case_done(self, fault: bool) -> None:
        """Note that the next case is measured and written."""
        self._write(self.done + 1, self.faults + fault, False, _OUTSIDE)

    def finish(self) -> None:
        """Note that the process ends by itself."""
        self._write(self.done, self.faults, True, _OUTSIDE)

    def ended_in(self, case: int) -> Mapping[str, str]:
        """Return what became of the providers that have ended a process in a case."""
        return {name: words for (number, name), words in self.ended.items() if number == case}


def in_own_process(measure: Callable[[CasesDone], int]) -> int:
    """Measure in a process of its own, and in another one without the provider that has ended it.

    It returns in each process: the first returns the last one's exit code when all have ended, and
    those that measure return their own. No kernel may have run before, as threads are not forked.
    Where processes are not forked safely, this one measures.

    Args:
        measure: goes on from `CasesDone.done` and returns the exit code.
    """
    progress = CasesDone()
    if sys.platform != "linux":
        return measure(progress)
    while True:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        progress._write(progress.done, progress.faults, False, _OUTSIDE)
        process = os.fork()
        if not process:
            _end_with_parent()
            try:
                return measure(progress)
            finally:
                progress.finish()
        code = _exit_code(process)
        if progress.finished and code >= 0:
            return code
        if -code in _ASKED_TO_END:
            _say("interrupted; the rows of every finished case are kept")
            return EXIT_INTERRUPTED
        words = _words(code)
        name = progress.running
        if progress.finished or name is None or (progress.done, name) in progress.ended:
            when = "after all was measured" if progress.finished else "between two cases"
            _say(f"the process was ended {when}: {words}")
            return EXIT_FAILED
        progress.ended[progress.done, name] = f"the process was ended while it ran: {words}"
        whose = f"while {name} ran" if name else "while no provider ran"
        _say(f"the process was ended {whose}: {words}; the other rows are measured in a new one")


def _words(code: int) -> str:
    """Say how a process has ended that did not come to its end."""
    if code >= 0:
        return f"exit code {code}"
    number = signal.Signals(-code)
    return f"{number.name} ({signal.strsignal(number)})"


def _say(words: str) -> None:
    print(f"bench: {words}", file=sys.stderr, flush=True)


def _end_with_parent() -> None:
    """Ask Linux to end this process when the one that waits for it is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _exit_code(process: int) -> int:
    """Wait for a process; return its exit code, or the number of the signal that ended it, negated.

    Whoever asks this process to end asks that one.
    """
    try:
        status = os.waitpid(process, 0)[1]
    except KeyboardInterrupt:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
        status = os.waitpid(process, 0)[1]
    return os.waitstatus_to_exitcode(status)
