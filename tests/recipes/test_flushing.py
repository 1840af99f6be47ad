"""File systems that cannot flush a folder, such as network mounts, still hold checkpoints."""

import errno
import os
import stat

import pytest

from adatape_kernels.recipes.run_folder import write_file


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
