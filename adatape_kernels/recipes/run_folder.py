"""The folder of a run: one process writes into it at a time, each file whole or not at all.

The process holds a lock of the system (flock) on a file of its own, which the system takes away
when the process ends, in whatever way. So a process is at work exactly where another one cannot get
the lock: no process number is looked up, which another process may have by then, and no age of the
file. That file also names the files that the process has begun to write, or is about to remove, so
that what a killed process leaves behind is known by name; it is left behind for that alone.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

from adatape_kernels.arguments import shown
from adatape_kernels.data.printable import printable
from adatape_kernels.recipes.terminal import say

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows has no such locks, and there this package is not supported
    fcntl = None

LOCK = "adatape-kernels.lock"
"""Name of the file that is locked, which is gone when no process is at work and none was killed."""

_FIRST_LINE = b"adatape-kernels, lock of a run\n"
_MOST_RECORD = 1 << 20
_MOST_TRIES = 1000
# The names of files that this module removes: parts of files, and tensors of a checkpoint.
_REMOVABLE = re.compile(
    r"[\w.-]+\.[0-9]+-[0-9a-f]{8}\.part|checkpoint-[0-9]+(-[0-9a-f]{8})?\.safetensors"
)
_DIGEST = re.compile(rb"^[0-9a-f]{64}$", re.MULTILINE)
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
# Answers by which a file system says that it has no locks.
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

# Answers by which a file system says that it cannot flush, and not that flushing failed. Network
# mounts, folders shared with a virtual machine and those that programs provide give them.
_CANNOT_FLUSH = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EACCES,
    errno.EPERM,
    errno.EBADF,
    errno.EISDIR,
    errno.ENOTTY,
    errno.EROFS,
}


class RunFolder:
    """A folder that this process writes into, as `claim` yields it."""

    def __init__(self, folder: Path, descriptor: int | None, left: tuple[str, ...] = ()):
        self.folder = folder
        self.noted = list(left)
        """Names of files that are begun or to be removed; at first, what a dead process left."""
        self._descriptor = descriptor
        _claimed.add(self)
        self._token = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._record()

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all, as `write_file` does.

        Raises:
            OSError: it cannot be written; the error names it.
        """
        part = f"{name}.{self._token}.part"
        self.note(part)
        try:
            write_file(self.folder / name, content, self.folder / part)
        finally:
            if not os.path.lexists(self.folder / part):
                self.noted.remove(part)
                self._record()

    def note(self, *names: str) -> None:
        """Note files that are begun or to be removed, before either happens."""
        self.noted += [name for name in names if name not in self.noted]
        self._record()

    def clear(self, keep: Collection[str]) -> None:
        """Remove the noted files, except those that are to stay."""
        for name in self.noted:
            if name not in keep:
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink(missing_ok=True)
        self.noted = []
        self._record()

    def unused_name(self, stem: str, suffix: str) -> str:
        """Return a file name that no file has, nor another process will choose."""
        plain = f"{stem}{suffix}"
        if self._descriptor is not None and not os.path.lexists(self.folder / plain):
            return plain
        return f"{stem}-{secrets.token_hex(4)}{suffix}"

    def _record(self) -> None:
        """Write into the lock file who holds it, and what is noted."""
        if self._descriptor is None:
            return
        lines = [f"process {os.getpid()}", *self.noted]
        content = _FIRST_LINE + "".join(f"{line}\n" for line in lines).encode()
        content += hashlib.sha256(content).hexdigest().encode() + b"\n"
        # A full disk must not end a run for this; what is left behind is then not known by name.
        with contextlib.suppress(OSError):
            # One call writes all, so that a kill leaves the former content or this one, perhaps
            # with a rest of the former behind it.
            os.pwrite(self._descriptor, content, 0)
            os.ftruncate(self._descriptor, len(content))

    def _release(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            file = self.folder / LOCK
            if not self.noted and _is_at(self._descriptor, file):
                file.unlink()
        os.close(self._descriptor)
        self._descriptor = None


_claimed: "WeakSet[RunFolder]" = WeakSet()


def _let_go() -> None:
    """Let go, in a process that was forked, of the locks that the process before it holds.

    A worker that outlives it by a moment would otherwise keep a run from going on.
    """
    for run in [*_claimed]:
        if run._descriptor is not None:
            os.close(run._descriptor)
            run._descriptor = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[RunFolder]:
    """Hold the lock of a folder, and yield what writes into it.

    On a file system without locks the run goes on, which standard error says once.

    Raises:
        ValueError: another process holds the lock, or its file is something else.
        OSError: the folder cannot be written.
    """
    descriptor = _locked(folder)
    if descriptor is None:
        say(
            f"adatape-kernels: note: {printable(folder)} is on a file system without locks; "
            "no second run may write into it"
        )
    left = () if descriptor is None else _names(os.pread(descriptor, _MOST_RECORD, 0))
    run = RunFolder(folder, descriptor, left)
    try:
        yield run
    finally:
        run._release()


@contextlib.contextmanager
def appending_alone(stream: Any) -> Iterator[None]:
    """Wait until no other process appends to an open file, and stand at its end.

    Where there are no locks nothing is waited for.
    """
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX)
    stream.seek(0, os.SEEK_END)
    # The lock ends when the file is closed.
    yield


def leftovers(folder: Path) -> set[str]:
    """Return the names that a lock file does not keep from being an empty folder's.

    They are the lock file's own, and those of what a killed process has begun to write.
    """
    file = folder / LOCK
    try:
        content = file.read_bytes() if file.is_file() else b""
    except OSError:
        content = b""
    return {LOCK, *_names(content)}


def check_empty_folder(folder: Path) -> None:
    """Raise ValueError unless a folder is absent, or empty but for what a killed start has left."""
    names = {inner.name for inner in folder.iterdir()} if folder.exists() else set()
    found = min(names - leftovers(folder), default=None)
    if found is not None:
        raise ValueError(
            f"out: expected a new or empty folder, got {printable(folder)}, which holds "
            f"{printable(found)}"
        )


def folder_argument(name: str, value: object) -> Path:
    """Return an argument as a path, of which nothing is known yet.

    Raises:
        ValueError: it is none.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text:
        raise ValueError(f"{name}: expected a folder, got {shown(value)}")
    return Path(text)


def _locked(folder: Path) -> int | None:
    """Return a descriptor of the lock file that holds its lock, or None where there are no locks.

    Raises:
        ValueError: another process holds the lock, or the file is something else.
        OSError: the file cannot be opened.
    """
    if fcntl is None:
        return None
    file = folder / LOCK
    for _ in range(_MOST_TRIES):
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(file, flags, 0o666)
        except OSError as error:
            raise OSError(
                f"out: expected a folder that can be written, got {error.strerror} for "
                f"{printable(file)}"
            ) from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError(f"{printable(file)}: expected a lock file, got something else")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = os.pread(descriptor, len(_FIRST_LINE), 0)
            if content and content != _FIRST_LINE:
                raise ValueError(
                    f"{printable(file)}: expected the lock file of a run, got another file"
                )
        except OSError as error:
            holder = _holder(descriptor)
            empty = os.fstat(descriptor).st_size == 0
            # Some of these file systems keep a file that is open from being removed.
            os.close(descriptor)
            if error.errno in _CANNOT_LOCK and empty:
                file.unlink(missing_ok=True)
            if error.errno in _HELD:
                raise ValueError(
                    "out: expected a folder that no other process writes into, got "
                    f"{printable(folder)}, where {holder} is at work"
                ) from None
            if error.errno in _CANNOT_LOCK:
                return None
            raise OSError(f"{printable(file)}: expected to lock it, got {error.strerror}") from None
        except ValueError:
            os.close(descriptor)
            raise
        # Its former holder may have removed the file after we opened it.
        if _is_at(descriptor, file):
            return descriptor
        os.close(descriptor)
    # The numbers by which this file system tells files apart do not stay, so that no lock is sure.
    return None


def _is_at(descriptor: int, file: Path) -> bool:
    """Return whether an open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    found = re.search(rb"^process ([0-9]{1,12})$", os.pread(descriptor, 200, 0), re.MULTILINE)
    return f"process {found[1].decode()}" if found else "another process"


def _names(content: bytes) -> tuple[str, ...]:
    """Return the names that a lock file holds; none where its content is not whole."""
    found = _DIGEST.search(content)
    if found is None or not content.startswith(_FIRST_LINE):
        return ()
    body = content[: found.start()]
    if hashlib.sha256(body).hexdigest().encode() != found[0]:
        return ()
    lines = body.decode("utf-8", "replace").splitlines()[2:]
    return tuple(line for line in lines if _REMOVABLE.fullmatch(line))


def write_file(path: Path, content: bytes, part: Path | None = None) -> None:
    """Write a file whole or not at all, and through to the disk.

    Args:
        path: the file.
        content: what it shall hold.
        part: a file in the same folder that is written first and then renamed; None for one that
            no other process chooses.

    Raises:
        OSError: it cannot be written; the error names it, and an earlier file of that name stays.
    """
    part = part or path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            _flush(stream.fileno())
        os.replace(part, path)
        _flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(
            f"{path}: expected to write {len(content)} bytes, got {error.strerror or error}"
        ) from None


def _flush_folder(folder: Path) -> None:
    """Flush a folder to the disk, and so a rename within it; only POSIX systems can."""
    if os.name == "posix":
        with _where_it_can_be_done():
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                _flush(descriptor)
            finally:
                os.close(descriptor)


def _flush(descriptor: int) -> None:
    """Flush a file or a folder to the disk, where its file system can."""
    with _where_it_can_be_done():
        os.fsync(descriptor)


@contextlib.contextmanager
def _where_it_can_be_done() -> Iterator[None]:
    """Go on where a file system answers that it cannot flush; other errors are raised."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
