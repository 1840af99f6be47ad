"""Why a process ends is said once, by whichever of its threads comes to that first.

The main thread meets with an error, or is asked to end by torchrun, while the thread that watches
the other ranks may find that one of them is gone: all of these have the same cause.
"""

import threading

_said = threading.Lock()


def begin() -> bool:
    """Return whether the caller is to say why the process ends, and nobody else from here on."""
    return _said.acquire(blocking=False)


def forget() -> None:
    """Let another command of the same process say why it ends."""
    if _said.locked():
        _said.release()
