"""Members of an archive: read back as they were written, and nothing in them is believed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from chunk_store.errors import BlobBad
from chunk_store.format.header import BLOCK_NBYTES, checksum, encode_header, split_blocks
from chunk_store.key import ChunkKey, ModelIdentity
from chunk_store.tenant import DEFAULT_TENANT, tenant_of
from chunk_store.tools.archive_file import ArchiveError, MemberRefused
from chunk_store.tools.archive_members import (
    check_entry_content,
    check_entry_key,
    decode_entry,
    decode_manifest,
    decode_record,
    encode_manifest,
    encode_record,
    member_of,
    tokens_digest,
)
from tests.chunk_store.contract import Sample, sample

RECORD = sample(1).record(name="name", tags=("a", "b"), created_at=1.5, last_used_at=2.5, expires_at=3.5)


def entry_bytes(entry: Sample) -> bytes:
    sums = [checksum(block) for block in split_blocks(entry.views, BLOCK_NBYTES)]
    return b"".join([encode_header(entry.header, sums), *entry.data])


def test_a_record_comes_back() -> None:
    for record in (RECORD, replace(RECORD, pinned=True, transient=True, expires_at=None, tenant=tenant_of("a"))):
        assert decode_record(encode_record(record)) == record
    assert member_of(RECORD) != member_of(replace(RECORD, tenant=tenant_of("a"))), "two tenants, two members"


def test_an_older_record_names_no_tenant_and_did_not_only_pass_through() -> None:
    fields = asdict(RECORD)
    del fields["tenant"], fields["transient"]
    assert decode_record(json.dumps(fields).encode()) == RECORD


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": [1, 2]},
        {"token_ids": [1.0]},
        {"type": "song"},
        {"tags": "ab"},
        {"tags": ["a\n"]},
        {"name": "x" * 257},
        {"name": "\ud800"},
        {"pinned": 1},
        {"created_at": -1.0},
        {"expires_at": float("nan")},
        {"chunk_id": None},
        {"tenant": 3},
    ],
)
def test_a_record_that_was_changed_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MemberRefused):
        decode_record(json.dumps({**asdict(RECORD), **change}).encode())


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"null", b"[" * 100_000])
def test_what_is_no_record_or_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(MemberRefused):
        decode_record(raw)
    with pytest.raises(ArchiveError):
        decode_manifest(raw)


def test_a_manifest_says_how_many_follow() -> None:
    assert decode_manifest(encode_manifest(7)) == 7
    for wrong in ({"format": "x"}, {"version": 9}, {"members": "7"}):
        with pytest.raises(ArchiveError):
            decode_manifest(json.dumps({**json.loads(encode_manifest(7)), **wrong}).encode())


def test_an_entry_comes_back_and_a_flipped_byte_does_not() -> None:
    raw = entry_bytes(sample(1))
    header, planes = decode_entry(raw)
    assert header == sample(1).header and tuple(map(bytes, planes)) == sample(1).data
    for wrong in (raw[:-1] + bytes([raw[-1] ^ 1]), raw[:-1], raw + b"\0"):
        with pytest.raises(BlobBad):
            decode_entry(wrong)


@pytest.mark.parametrize(
    "change", [{"key": ChunkKey("../x")}, {"model": ModelIdentity("")}, {"model": ModelIdentity("a\nb")}]
)
def test_a_header_that_names_no_entry_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MemberRefused):
        decode_entry(entry_bytes(replace(sample(1), header=replace(sample(1).header, **change))))


def test_a_key_must_be_that_of_its_content_under_its_salt() -> None:
    plain, salted = sample(1).header, sample(1, salt="a").header
    salts = {DEFAULT_TENANT: "", tenant_of("a"): "a"}
    check_entry_key(plain, salts)
    check_entry_key(salted, salts)
    with pytest.raises(MemberRefused, match="--token-file"):
        check_entry_key(salted, {DEFAULT_TENANT: ""})
    with pytest.raises(MemberRefused, match="have the key"):
        check_entry_key(replace(plain, token_ids=(1,)), salts)


def test_an_entrys_chunk_must_be_registered_with_its_tokens() -> None:
    header = sample(1).header
    check_entry_content(header, tokens_digest(header.token_ids))
    for registered, words in ((None, "no record"), (tokens_digest([1]), "are not those")):
        with pytest.raises(MemberRefused, match=words):
            check_entry_content(header, registered)
