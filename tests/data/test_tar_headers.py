import io
import os
import random
import tarfile

import pytest
from checks import refused

from adatape_kernels.data.tar_headers import TarHeaders, TarMember


def named(archive):
    """The regular files of an archive as tarfile finds them."""
    with tarfile.open(archive, "r:") as tar:
        return [
            TarMember(member.name, member.offset_data, member.size)
            for member in tar
            if member.isreg() and not member.issparse()
        ]


def found(archive):
    with TarHeaders(archive) as headers:
        return [*headers]


def write(archive, names, form, sizes=None):
    with tarfile.open(archive, "w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = number * 137 % 1200 if sizes is None else sizes[number]
            info.mtime = number + 0.5  # which POSIX's format keeps in a header of its own
            tar.addfile(info, io.BytesIO(bytes([number % 256]) * info.size))
    return archive


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_files_are_those_that_tarfile_finds(tmp_path, form):
    names = [f"part/{number:06d}.png" for number in range(20)]
    names += ["n" * 99, "n" * 100, f"{'d' * 120}/{'n' * 90}", "a.b.c", "grün/日本.jpg"]
    if form != tarfile.USTAR_FORMAT:
        names += ["n" * 101, "x" * 3000, f"{'é' * 200}/{'n' * 200}"]
    archive = write(tmp_path / "a.tar", names, form)
    members = found(archive)
    assert members == named(archive) and [member.name for member in members] == names
    content = archive.read_bytes()
    with TarHeaders(archive) as headers:
        for number, member in enumerate(headers):
            own = content[member.offset : member.offset + member.size]
            assert headers.content(member) == own == bytes([number]) * member.size


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_is_no_regular_file_is_passed_over(tmp_path, form):
    kinds = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"V", b"7")
    with tarfile.open(tmp_path / "a.tar", "w", format=form, pax_headers={"comment": "all"}) as tar:
        for number, kind in enumerate((b"0", *kinds, b"0")):
            info = tarfile.TarInfo(f"{number}{'n' * 120}")
            info.type, info.linkname = kind, "l" * 130
            info.size = 700 if kind in (b"0", b"7", b"V") else 0
            tar.addfile(info, io.BytesIO(bytes(info.size)))
        info = tarfile.TarInfo("1")
        info.type = tarfile.AREGTYPE
        tar.addfile(info)
    members = found(tmp_path / "a.tar")
    assert members == named(tmp_path / "a.tar")
    assert [member.name[0] for member in members] == ["0", "6", "7", "1"]


def changed(archive, place, header):
    """Put a header into an archive, with the checksum that it then has."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content = bytearray(archive.read_bytes())
    content[place : place + 512] = header
    archive.write_bytes(content)


def test_sparse_files_are_passed_over_with_their_maps(tmp_path):
    archive = write(tmp_path / "a.tar", "abc", tarfile.GNU_FORMAT, [5, 2048, 7])
    content = archive.read_bytes()
    header = bytearray(content[1024:1536])
    header[156:157], header[482] = b"S", 1
    header[124:136] = b"%011o\0" % 1024  # behind two blocks of the map
    header[386:482] = b"%011o\0%011o\0" % (0, 1024) + bytes(72)
    header[483:495] = b"%011o\0" % 4096
    changed(archive, 1024, header)
    whole = bytearray(archive.read_bytes())
    whole[1536 : 1536 + 1024] = bytes(504) + b"\1" + bytes(519)
    archive.write_bytes(whole)
    assert found(archive) == named(archive)
    assert [member.name for member in found(archive)] == ["a", "c"]


def test_numbers_may_be_in_base_256_and_sums_of_signed_bytes(tmp_path):
    archive = write(tmp_path / "a.tar", ["ä", "b"], tarfile.GNU_FORMAT, [600, 5])
    header = bytearray(archive.read_bytes()[:512])
    header[124:136] = b"\x80" + (600).to_bytes(11, "big")
    changed(archive, 0, header)
    assert found(archive) == named(archive)
    content = bytearray(archive.read_bytes())
    content[148:156] = b" " * 8
    signed = sum(byte - 256 * (byte > 127) for byte in content[:512])
    content[148:156] = b"%06o\0 " % signed
    archive.write_bytes(content)
    assert found(archive) == named(archive)


def test_a_changed_byte_of_a_header_is_one_line_that_names_archive_and_member(tmp_path):
    archive = write(tmp_path / "a.tar", ["one", "two"], tarfile.PAX_FORMAT, [5, 6])
    content, members = archive.read_bytes(), found(archive)
    draws = random.Random(0)
    seen = set()
    for place in (draws.randrange(members[1].offset) for _ in range(300)):
        spoiled = bytearray(content)
        spoiled[place] ^= 1 << draws.randrange(8)
        archive.write_bytes(spoiled)
        try:
            assert len(found(archive)) <= 2
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{archive}: expected a whole tar file")
            assert "\n" not in message and ("one" in message or "none" in message)
            seen.add(message.partition(", got ")[2].partition(" (")[0])
    assert "a header whose checksum is another" in seen


def test_an_additional_header_may_not_be_of_any_size(tmp_path):
    archive = write(tmp_path / "a.tar", ["n" * 200], tarfile.GNU_FORMAT, [5])
    header = bytearray(archive.read_bytes()[:512])
    header[124:136] = b"%011o\0" % (1 << 31)
    changed(archive, 0, header)
    with refused(str(archive), "a whole tar file", "header of 2147483648 bytes"):
        found(archive)


def test_a_header_costs_no_more_than_one_read(tmp_path, monkeypatch):
    names = [f"{number:06d}.{ending}" for number in range(50) for ending in ("jpg", "cls")]
    sizes = [20_000, 3] * 50
    archive = write(tmp_path / "a.tar", names, tarfile.USTAR_FORMAT, sizes)
    reads, read = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *rest: reads.append(rest) or read(*rest))
    assert len(found(archive)) == 100
    assert len(reads) <= 51
    assert sum(size for _, size, _ in reads) <= 51 * 4096


@pytest.mark.parametrize("sizes", [[10, 20], [9000, 30], [512, 4096]])
@pytest.mark.parametrize("gap", [0, 1, 20])
def test_what_lies_behind_the_end_of_an_archive_is_not_lost_without_a_word(tmp_path, sizes, gap):
    """`cat a.tar b.tar` makes a file of which programs read the first part alone."""
    one = write(tmp_path / "a.tar", "ab", tarfile.GNU_FORMAT, sizes)
    whole = one.read_bytes()
    one.write_bytes(whole + bytes(512 * gap))
    assert len(found(one)) == 2
    one.write_bytes(whole + bytes(512 * gap) + whole)
    with refused(one, "a whole tar file", "more behind its end"):
        found(one)
