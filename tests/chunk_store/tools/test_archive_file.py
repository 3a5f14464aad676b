"""The file of an archive: plain members within bounds, and a signature over all of it."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from chunk_store.tools.archive_file import (
    ArchiveError,
    Member,
    check_signature,
    each_member,
    next_member,
    read_member,
    read_sign_key,
    signature,
    signature_path,
    skip_member,
    write_end,
    write_member,
)

KEY = b"sixteen bytes or more"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "some.tar"
    with open(path, "wb") as file:
        for name, raw in (("one", b"1" * 700), ("empty", b""), ("two", b"22")):
            write_member(file, name, raw)
        write_end(file)
    return path


def test_members_come_back_and_any_tar_reads_them(archive: Path) -> None:
    with open(archive, "rb") as file:
        assert [(member.name, read_member(file, member)) for member in each_member(file)] == [
            ("one", b"1" * 700),
            ("empty", b""),
            ("two", b"22"),
        ]
    with tarfile.open(archive) as tar:
        assert [(member.name, member.size) for member in tar] == [("one", 700), ("empty", 0), ("two", 2)]


def test_a_skipped_member_is_passed(archive: Path) -> None:
    with open(archive, "rb") as file:
        member = next_member(file)
        assert member == Member("one", 700)
        skip_member(file, member)
        assert next_member(file) == Member("empty", 0)


def test_what_is_cut_or_no_plain_file_is_refused(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(archive.read_bytes()[:600])
    with open(tmp_path / "cut", "rb") as file:
        member = next_member(file)
        assert member is not None
        with pytest.raises(ArchiveError, match="one is cut"):
            read_member(file, member)
    link = tarfile.TarInfo("link")
    link.type = tarfile.SYMTYPE
    (tmp_path / "link").write_bytes(link.tobuf())
    (tmp_path / "rubbish").write_bytes(b"\x07" * 512)
    for name, words in (("link", "not a plain file"), ("rubbish", "not an archive")):
        with open(tmp_path / name, "rb") as file, pytest.raises(ArchiveError, match=words):
            next_member(file)


def test_a_signature_covers_every_byte(archive: Path) -> None:
    def check() -> None:
        with open(archive, "rb") as file:
            check_signature(file, archive, KEY)

    with pytest.raises(ArchiveError, match="no signature"):
        check()
    with open(archive, "rb") as file:
        signature_path(archive).write_text(signature(file, KEY) + "\n")
        assert file.tell() == 0
    check()
    raw = archive.read_bytes()
    for position in (0, 511, 512, len(raw) - 1):
        archive.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        with pytest.raises(ArchiveError, match="does not fit"):
            check()


@pytest.mark.parametrize(
    ("content", "fits"), [(b"a" * 15, False), (b" " + b"a" * 16 + b"\n", True), (b"a" * 4097, False)]
)
def test_a_signing_key_has_a_size(content: bytes, fits: bool, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    if fits:
        assert read_sign_key(tmp_path / "key") == b"a" * 16
        return
    with pytest.raises(ValueError, match="16 to 4096 bytes"):
        read_sign_key(tmp_path / "key")
