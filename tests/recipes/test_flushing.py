"""File systems that cannot flush a folder, such as network mounts, still hold checkpoints."""

import errno
import os
import stat

import pytest

from adatape_kernels.recipes import run_folder
from adatape_kernels.recipes.output_folder import check_output_folder
from adatape_kernels.recipes.run_folder import LOCK, claim, write_file


@pytest.mark.parametrize(
    "answer", ["EINVAL", "ENOTSUP", "EOPNOTSUPP", "EACCES", "EPERM", "ENOSYS", "EBADF"]
)
@pytest.mark.parametrize("call", ["open", "fsync a folder", "fsync anything"])
def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch, answer, call):
    fsync, opening = os.fsync, os.open

    def refuse():
        number = getattr(errno, answer)
        raise OSError(number, os.strerror(number))

    def fsync_or_refuse(descriptor):
        if call == "fsync anything" or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refuse()
        fsync(descriptor)

    def open_or_refuse(path, *rest):
        if os.path.isdir(path):
            refuse()
        return opening(path, *rest)

    if call == "open":
        monkeypatch.setattr(os, "open", open_or_refuse)
    else:
        monkeypatch.setattr(os, "fsync", fsync_or_refuse)
    write_file(tmp_path / "file", b"content")
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"content"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("answer", ["EIO", "ENOSPC", "EDQUOT"])
def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch, answer):
    def fsync(descriptor):
        number = getattr(errno, answer)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="expected to write 7 bytes"):
        write_file(tmp_path / "file", b"content")


@pytest.fixture
def open_files_stay(monkeypatch):
    """Files that are open cannot be removed, and files need names, as on a shared folder."""
    unlink, opening = os.unlink, os.open

    def unlink_or_refuse(path, **names):
        for descriptor in os.listdir("/proc/self/fd"):
            try:
                if os.path.samestat(os.fstat(int(descriptor)), os.lstat(path)):
                    raise OSError(errno.ETXTBSY, os.strerror(errno.ETXTBSY))
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno == errno.ETXTBSY:
                    raise
        unlink(path, **names)

    def open_or_refuse(path, flags, *rest, **names):
        if flags & getattr(os, "O_TMPFILE", 0) == getattr(os, "O_TMPFILE", -1):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return opening(path, flags, *rest, **names)

    monkeypatch.setattr(os, "unlink", unlink_or_refuse)
    monkeypatch.setattr(os, "open", open_or_refuse)


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")


@needs_proc
@pytest.mark.parametrize("locks", [True, False])
def test_files_that_cannot_be_removed_while_they_are_open(
    tmp_path, monkeypatch, open_files_stay, locks
):
    def flock(descriptor, operation):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    if not locks:
        monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    check_output_folder(tmp_path)
    assert not list(tmp_path.iterdir())
    for content in (b"first", b"second"):
        with claim(tmp_path) as run:
            run.write("file", content)
        assert (tmp_path / "file").read_bytes() == content
        names = {path.name for path in tmp_path.iterdir()}
        assert names <= {"file", LOCK} and run_folder.leftovers(tmp_path) == {LOCK}


def test_files_whose_numbers_do_not_stay_are_not_locked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os.path, "samestat", lambda first, second: False)
    with claim(tmp_path) as run:
        run.write("file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert "no second run may write into it" in capsys.readouterr().err
