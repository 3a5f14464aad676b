"""The file of an archive: plain tar members read within bounds, and a signature over all of its bytes.

Only what an export writes is read: regular members behind one 512-byte header each. Links, sparse files, long-name and
extended headers are refused, because a reader that follows them can be made to allocate what a few bytes ask for.

The signature is HMAC-SHA256 with a secret that both sides have, in a file of its own beside the archive
(``FILE.sig``, hexadecimal). It is checked before anything is read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from chunk_store.errors import StoreError

BLOCK_NBYTES = 512
READ_NBYTES = 2**20
SIGN_KEY_NBYTES_MIN = 16
SIGN_KEY_NBYTES_MAX = 4096
_DOMAIN = b"cairn.archive.v1\0"
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)


class ArchiveError(StoreError):
    """The file is no archive that this version reads, it is cut, or its signature does not fit."""


class MemberRefused(Exception):
    """A member does not verify; the import goes on without it."""


@dataclass(frozen=True)
class Member:
    """One member as its header announces it; ``nbytes`` follow."""

    name: str
    nbytes: int


def write_member(file: BinaryIO, name: str, raw: bytes) -> None:
    """Adds a member of at most 100 bytes of name."""
    info = tarfile.TarInfo(name)
    info.size = len(raw)
    info.mode = 0o600
    file.write(info.tobuf(tarfile.GNU_FORMAT))
    file.write(raw)
    file.write(bytes(-len(raw) % BLOCK_NBYTES))


def write_end(file: BinaryIO) -> None:
    """Two empty blocks end a tar."""
    file.write(bytes(2 * BLOCK_NBYTES))


def next_member(file: BinaryIO) -> Member | None:
    """The header that follows; None at the end. Raises ``ArchiveError``."""
    block = file.read(BLOCK_NBYTES)
    if not block or block == bytes(BLOCK_NBYTES):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.TarError, ValueError) as error:
        raise ArchiveError(f"not an archive, or cut: {error}") from error
    if info.type not in _PLAIN or info.size < 0:
        raise ArchiveError(f"unexpected member {info.name[:100]!r}: not a plain file")
    return Member(info.name, info.size)


def read_member(file: BinaryIO, member: Member) -> bytes:
    """The bytes behind a member's header. Raises ``ArchiveError`` if there are fewer."""
    padding = -member.nbytes % BLOCK_NBYTES
    left = os.fstat(file.fileno()).st_size - file.tell()
    if member.nbytes + padding > left:  # looked at first: a read allocates what it is asked for
        raise ArchiveError(f"{member.name} is cut")
    raw = file.read(member.nbytes)
    file.read(padding)
    return raw


def skip_member(file: BinaryIO, member: Member) -> None:
    """Goes on behind a member. A cut is found when its end is missed."""
    file.seek(member.nbytes + -member.nbytes % BLOCK_NBYTES, 1)


def read_sign_key(path: Path) -> bytes:
    """The secret in ``path``: all its bytes but white space at the ends.

    Raises ``ValueError`` for one of fewer than 16 or more than 4096 bytes, ``OSError``.
    """
    with open(path, "rb") as file:
        key = file.read(SIGN_KEY_NBYTES_MAX + 2).strip()
    if not SIGN_KEY_NBYTES_MIN <= len(key) <= SIGN_KEY_NBYTES_MAX:
        bounds = f"{SIGN_KEY_NBYTES_MIN} to {SIGN_KEY_NBYTES_MAX}"
        raise ValueError(f"{path}: a signing key has {bounds} bytes, not {len(key)}: try openssl rand -hex 32")
    return key


def signature_path(path: Path) -> Path:
    """Where the signature of an archive lies."""
    return path.with_name(path.name + ".sig")


def signature(file: BinaryIO, key: bytes) -> str:
    """HMAC-SHA256 over what ``file`` holds from its start, in hexadecimal; goes back to the start."""
    state = hmac.new(key, _DOMAIN, hashlib.sha256)
    file.seek(0)
    while read := file.read(READ_NBYTES):
        state.update(read)
    file.seek(0)
    return state.hexdigest()


def check_signature(file: BinaryIO, path: Path, key: bytes) -> None:
    """Raises ``ArchiveError`` unless ``FILE.sig`` is the signature of ``file`` under ``key``."""
    try:
        with open(signature_path(path), "rb") as signed:
            found = signed.read(256).strip()
    except OSError as error:
        raise ArchiveError(f"no signature: cannot read {signature_path(path)}: {error.strerror}") from error
    if not hmac.compare_digest(found, signature(file, key).encode()):
        raise ArchiveError("the signature does not fit: another key, or the archive was changed")


def each_member(file: BinaryIO) -> Iterator[Member]:
    """Members in order; the caller reads or skips each before it asks for the next."""
    while (member := next_member(file)) is not None:
        yield member
