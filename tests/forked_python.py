"""Python programs in processes that are forked from one which has imported torch already.

`run` and `Popen` take what `subprocess`'s take for `[sys.executable, ...]`, and what comes is the
same but for two to four seconds of imports that every process of its own would spend. A process
that is forked ends as any other does: its streams are flushed, its exit code is its own, and a
signal kills it alone.

What is decided when an interpreter starts or torch is imported cannot be asked for: an encoding, a
time zone, a number of threads other than 1. And what is drawn then is the same for all, such as the
seed of strings' hashes. Tests of these start Python itself. A copy of the package can be asked for:
then a process is forked from another one, which has imported torch and not our package.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from importlib.util import find_spec
from pathlib import Path

CLOSED = object()
"""In the place of a stream: the process has none, as behind `>&-` in a shell."""

# What the commands import when they come to need it, the slowest first.
_IMPORTED = ("torch", "torch._dynamo", "sklearn.datasets", "sklearn.model_selection")
_IMPORTED += ("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.ticker")
_IMPORTED += ("jsonargparse", "docstring_parser", "safetensors.torch", "PIL.Image", "tqdm")
# What the tests of a copy of the package import.
_IMPORTED_FOR_A_COPY = ("torch", "torch._dynamo", "triton", "triton.language", "pytest")
_DECIDED_AT_THE_START = ("PYTHON", "OMP_", "MKL_", "ATEN_", "TORCH_", "TRITON_", "ADATAPE_")
_DECIDED_AT_THE_START += ("LC_", "LANG", "LD_", "MPL", "TMPDIR", "TZ")
_PART = 1 << 16  # bytes of a request that are received at a time
_SECONDS_TO_END = 10


def _import_installed(names):
    for name in names:
        if find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)


def import_what_commands_need():
    """Import what `adatape-kernels` imports while it works, as far as it is installed."""
    _import_installed(_IMPORTED)
    from adatape_kernels import cli

    if find_spec("jsonargparse") is not None:
        for file in Path(cli.__file__).parent.glob("*_command.py"):
            importlib.import_module(f"adatape_kernels.cli.{file.stem}")
        cli.command_line()


class Popen:
    """A process that runs Python, as `subprocess.Popen` starts it.

    Args:
        arguments: those of Python: `["-m", module, ...]`, `["-c", code, ...]` or `[file, ...]`.
        env: variables; this process's by default.
        cwd: where it runs; here by default.
        stdin, stdout, stderr: a descriptor, a file, `subprocess.DEVNULL` or `CLOSED`; this
            process's by default.
        copy: a folder with a copy of the package, which the program is to find.
    """

    def __init__(
        self, arguments, *, env=None, cwd=None, stdin=None, stdout=None, stderr=None, copy=None
    ):
        self.args, self.pid, self.returncode = [*map(str, arguments)], None, None
        variables = {**os.environ, "OMP_NUM_THREADS": "1"} if env is None else dict(env)
        server, started_with = _server(copy is not None)
        _check(variables, started_with)
        streams, closed = (stdin, stdout, stderr), []
        with contextlib.ExitStack() as stack:
            descriptors = []
            for number, stream in enumerate(streams):
                if stream is CLOSED or stream is subprocess.DEVNULL:
                    closed += [number] if stream is CLOSED else []
                    stream = stack.enter_context(open(os.devnull, "r+b"))
                elif stream is None:
                    stream = number
                descriptors.append(stream if isinstance(stream, int) else stream.fileno())
            self._status, status = os.pipe()
            descriptors.append(status)
            stack.callback(os.close, status)
            request = {"arguments": self.args, "env": variables, "closed": closed}
            request |= {"cwd": str(cwd or Path.cwd()), "copy": copy and str(copy)}
            content = json.dumps(request).encode() + b"\n"
            sent = socket.send_fds(server, [content], descriptors)
            server.sendall(content[sent:])
        self._words = b""
        while b" " not in self._words:
            self._read()
        self.pid = int(self._words.partition(b" ")[0])

    def _read(self):
        """Wait for a part of "PID RETURNCODE" from whoever waits for the process."""
        part = os.read(self._status, 100)
        if not part:
            raise RuntimeError("what forks Python programs has died")
        self._words += part
        if self._words.endswith(b"\n"):
            self.returncode = int(self._words.split()[1])
            os.close(self._status)

    def wait(self, timeout=None):
        """Wait for the end, as `subprocess` does, and return the exit code."""
        until = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not _readable(self._status, left):
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._read()
        return self.returncode

    def poll(self):
        """Return the exit code, or None if it has not ended."""
        if self.returncode is None and _readable(self._status, 0):
            self._read()
        return self.returncode

    def send_signal(self, number):
        """Send a signal to a process that has not ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self):
        """Kill it."""
        self.send_signal(signal.SIGKILL)


def run(
    arguments,
    *,
    env=None,
    cwd=None,
    stdin=None,
    stdout=None,
    stderr=None,
    capture_output=False,
    text=False,
    timeout=None,
    copy=None,
):
    """Run Python to its end, as `subprocess.run` does; see Popen for the arguments."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if capture_output:
            stdout = out if stdout is None else stdout
            stderr = err if stderr is None else stderr
        streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
        process = Popen(arguments, env=env, cwd=cwd, copy=copy, **streams)
        try:
            process.wait(timeout)
        finally:
            process.kill()
        said = []
        for file in (out, err):
            file.seek(0)
            content = file.read()
            said.append(content.decode() if text else content)
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def _readable(descriptor, seconds):
    return bool(select.select([descriptor], [], [], seconds)[0])


def _check(variables, started_with):
    """Refuse variables that a process which has begun already would not heed.

    Raises:
        ValueError: one is other than when the server was started.
    """
    for name in {*variables, *started_with}:
        if name.startswith(_DECIDED_AT_THE_START):
            expected, got = started_with.get(name), variables.get(name)
            if got != expected:
                raise ValueError(f"env: expected {name} to be {expected!r}, got {got!r}")


@functools.cache
def _server(of_copies):
    """The socket of the process that forks, and the variables that it was started with."""
    ours, theirs = socket.socketpair()
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, str(theirs.fileno()), *["of copies"] * of_copies]
    process = subprocess.Popen(words, env=variables, pass_fds=[theirs.fileno()])
    theirs.close()

    def end():
        ours.close()
        # It waits for what it has forked, which may be what a test that failed has left running.
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    atexit.register(end)
    return ours, variables


def _serve(own):
    """Fork a process for each request, until nobody is left who could send one."""
    while True:
        content, descriptors, _, _ = socket.recv_fds(own, _PART, 4)
        while content and not content.endswith(b"\n"):
            content += own.recv(_PART)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, 0 if not content else os.WNOHANG)[0]:
                pass
        if not content:
            return None
        if not os.fork():  # who waits for the process and says how it has ended
            own.close()
            child = os.fork()
            if not child:
                return json.loads(content), descriptors
            status = descriptors.pop()
            for descriptor in descriptors:
                os.close(descriptor)
            os.write(status, b"%d " % child)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with contextlib.suppress(BrokenPipeError):
                os.write(status, b"%d\n" % code)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _become(request, descriptors):
    """Make this process one that Python has just started, and run what is asked for."""
    *streams, status = descriptors
    os.close(status)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    for descriptor in streams:
        os.close(descriptor)
    for number in request["closed"]:
        os.close(number)
    # As the interpreter opens them.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = None
        if number not in request["closed"]:
            errors = "backslashreplace" if name == "stderr" else "strict"
            mode = "w" if number else "r"
            stream = open(number, mode, encoding="utf-8", errors=errors, closefd=False)
            stream.reconfigure(line_buffering=name == "stderr" or stream.isatty())
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if request["copy"]:
        os.environ["PYTHONPATH"] = request["copy"]  # for what it starts itself
        sys.path.insert(1, request["copy"])
    first, *rest = request["arguments"]
    if first == "-m":
        sys.argv, sys.path[0] = rest, request["cwd"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = [first, *rest[1:]], ""
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(module))
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    own_socket = socket.socket(fileno=int(sys.argv[1]))
    if sys.argv[2:]:
        _import_installed(_IMPORTED_FOR_A_COPY)
    else:
        import_what_commands_need()
    # A process that ends collects garbage once more: not among all that was imported before it,
    # which takes more than a second, and a copy of every page.
    gc.collect()
    gc.freeze()
    asked = _serve(own_socket)
    if asked is not None:
        _become(*asked)
