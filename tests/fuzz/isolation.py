"""Runs code in a child process, whose end is noticed whatever it is."""

import json
import os
import resource
import select
import signal
import sys
import time

MEMORY = 4 << 30
"""Bytes that a child may map beyond what it has when it is forked."""
GROWTH = 1 << 29
"""Bytes by which one case may raise the most memory that its process ever held."""


def peak_bytes():
    """Return the most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_memory():
    """Bound the memory that this process may map. Sanitizers reserve terabytes: not there."""
    if "ADATAPE_SANITIZER" in os.environ:
        return
    with open("/proc/self/statm") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))


class Child:
    """A forked process that runs `function(say)`; what it says, JSON values, arrive in order."""

    def __init__(self, function, log):
        self.log = log
        receiving, sending = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run_and_exit(function, receiving, sending, log)
        os.close(sending)
        self.receiving = receiving
        self.said_last = time.monotonic()
        self._buffer = b""
        self.ended = None

    def hear(self, seconds):
        """Return what the child has said; wait for something for a while."""
        ready, _, _ = select.select([self.receiving], [], [], seconds)
        if not ready:
            return []
        data = os.read(self.receiving, 1 << 20)
        if not data:
            self._bury()
            return []
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self.said_last = time.monotonic()
        return [json.loads(line) for line in lines]

    def silent_for(self):
        """Return the seconds since the child said something."""
        return time.monotonic() - self.said_last

    def resident_bytes(self):
        """Return the memory that the child holds now."""
        try:
            with open(f"/proc/{self.pid}/statm") as statm:
                return int(statm.read().split()[1]) * resource.getpagesize()
        except (FileNotFoundError, ProcessLookupError, IndexError):
            return 0

    def kill(self):
        """End the child at once."""
        if self.ended is None:
            os.kill(self.pid, signal.SIGKILL)
            self._bury()

    def last_words(self):
        """Return the end of what the child wrote to its log, in a line or a few."""
        try:
            text = open(self.log, errors="replace").read()
        except FileNotFoundError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        marked = [line for line in lines if "ERROR: " in line or "runtime error" in line]
        return " | ".join((marked or lines[-3:])[:3])[:600]

    def _bury(self):
        os.close(self.receiving)
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self.ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit {code}"


def _run_and_exit(function, receiving, sending, log):
    code = 1
    try:
        os.close(receiving)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        limit_memory()

        def say(value):
            os.write(sending, json.dumps(value).encode() + b"\n")

        function(say)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)
