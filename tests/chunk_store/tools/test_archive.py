"""Archives that somebody else made: what is believed, what is refused, and that nothing of it breaks the reader."""

from __future__ import annotations

import io
import json
import random
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chunk_store.entry import EntryHeader
from chunk_store.format.header import BLOCK_NBYTES, checksum, encode_header, split_blocks
from chunk_store.key import ChunkKey, ModelIdentity, chunk_key
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.tools.archive import export, import_
from chunk_store.tools.archive_file import ArchiveError, read_sign_key, signature_path
from chunk_store.tools.archive_members import encode_manifest, encode_record
from tests.chunk_store.contract import LAYOUT, MODEL, Place, Sample, loads, publish, sample

KEY = b"0123456789abcdef0123456789abcdef"


def entry_bytes(header: EntryHeader, data: tuple[bytes, ...]) -> bytes:
    """An entry as somebody with a text editor would make it: every checksum is right."""
    views = [memoryview(part) for part in data]
    return encode_header(header, [checksum(block) for block in split_blocks(views, BLOCK_NBYTES)]) + b"".join(data)


def archive(path: Path, *members: tuple[str, bytes], manifest: bytes | None = None) -> Path:
    """A tar of ``members`` behind a manifest, made with the standard library."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, raw in (("manifest.json", manifest or encode_manifest(len(members))), *members):
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def record_of(entry: Sample, **changes: Any) -> tuple[str, bytes]:
    fields = json.loads(encode_record(entry.record()))
    return f"records/{entry.chunk_id}.json", json.dumps({**fields, **changes}).encode()


def entry_of(header: EntryHeader, data: tuple[bytes, ...]) -> tuple[str, bytes]:
    return f"entries/{header.key}.kv", entry_bytes(header, data)


def test_what_an_export_writes_and_a_plain_tar_agree(file_place: Place, tmp_path: Path) -> None:
    """Any tar shows what is in an archive, and an archive that another tool packed again is read."""
    store = file_place.open()
    store.put_records([sample(1).record(name="Überblick")])
    publish(store, sample(1))
    export(store, tmp_path / "ours", [sample(1).chunk_id])
    with tarfile.open(tmp_path / "ours", "r:") as tar:
        found = [(member.name, tar.extractfile(member).read()) for member in tar]
    assert [name.split("/")[0] for name, _ in found] == ["manifest.json", "records", "entries"]
    again = archive(tmp_path / "again", *found[1:], manifest=found[0][1])
    store.delete_chunks([sample(1).chunk_id])
    report = import_(store, again)
    assert (report.records, report.entries, report.refused) == (1, 1, ())
    assert loads(store, sample(1))


# -- the key check --------------------------------------------------------------------------------------


GOOD, PARENT = sample(1), sample(2)
FORGED = {
    "another entry's key": replace(GOOD.header, key=PARENT.key),
    "another model": replace(GOOD.header, model=ModelIdentity("model-2")),
    "another context": replace(GOOD.header, context=(PARENT.key,)),
    "other tokens": replace(GOOD.header, token_ids=(*GOOD.header.token_ids[:-1], 7)),
    "a key of no content": replace(GOOD.header, key=ChunkKey("0" * 64)),
    "a salt that hides the forgery": replace(GOOD.header, key=PARENT.key, salt_digest="d" * 64),
    "another chunk's id": replace(GOOD.header, chunk_id=PARENT.chunk_id),
    "a chunk without a record": replace(GOOD.header, chunk_id=sample(9).chunk_id),
    "a key that is a path": replace(GOOD.header, key=ChunkKey("../../../../tmp/x")),
    "a key in capitals": replace(GOOD.header, key=ChunkKey(GOOD.key.upper())),
    "a context that is none": replace(
        GOOD.header, context=(ChunkKey("x"),), key=chunk_key(MODEL, [ChunkKey("x")], GOOD.header.token_ids)
    ),
}


@pytest.mark.parametrize("header", FORGED.values(), ids=FORGED.keys())
def test_an_entry_must_be_what_its_key_says(file_place: Place, tmp_path: Path, header: EntryHeader) -> None:
    """Its checksums are right, its key is not: it would answer for content that it was not computed from."""
    store = file_place.open()
    name = f"entries/{GOOD.key}.kv"
    forged = archive(tmp_path / "forged", record_of(GOOD), record_of(PARENT), (name, entry_bytes(header, GOOD.data)))
    report = import_(store, forged)
    assert (report.records, report.entries) == (2, 0)
    assert len(report.refused) == 1 and report.refused[0].startswith(name)
    assert store.list_entries() == [] and store.lookup([GOOD.key, PARENT.key]) == [None, None]


def test_an_entry_under_a_salt_needs_the_salt_or_a_signature(file_place: Place, tmp_path: Path) -> None:
    salted = sample(3, salt="pepper")
    packed = archive(tmp_path / "salted", record_of(salted), entry_of(salted.header, salted.data))
    store = file_place.open()
    refused = import_(store, packed).refused
    assert len(refused) == 2 and all("--token-file" in words and "--verify-key" in words for words in refused)
    assert store.stats().records == store.stats().entries == 0
    tenant = salted.header.tenant
    (words,) = import_(store, packed, salts={tenant: "other"}).refused
    assert "have the key" in words
    assert import_(store, packed, salts={tenant: "pepper"}).entries == 1
    assert loads(store, salted)


# -- signatures -----------------------------------------------------------------------------------------


@pytest.fixture
def signed(file_place: Place, tmp_path: Path) -> Path:
    store = file_place.open()
    for entry in (GOOD, sample(3, salt="pepper")):
        store.put_records([entry.record()])
        publish(store, entry)
    path = tmp_path / "some.cairn"
    export(store, path, [GOOD.chunk_id, sample(3).chunk_id], sign_key=KEY)
    return path


def test_a_signed_archive_is_believed(signed: Path, file_place_2: Place) -> None:
    """Entries under salts too: whoever has the secret vouches for them."""
    assert signature_path(signed).stat().st_mode & 0o077 == 0
    report = import_(file_place_2.open(), signed, verify_key=KEY)
    assert (report.records, report.entries, report.refused) == (2, 2, ())


@pytest.mark.parametrize("harm", ["another key", "no signature", "a changed byte", "more at the end", "cut", "empty"])
def test_an_archive_that_is_not_as_it_was_signed_brings_nothing(signed: Path, file_place_2: Place, harm: str) -> None:
    raw = signed.read_bytes()
    changed = {
        "a changed byte": raw[:-2000] + bytes([raw[-2000] ^ 1]) + raw[-1999:],
        "more at the end": raw + bytes(512),
        "cut": raw[:-512],
    }
    signed.write_bytes(changed.get(harm, raw))
    if harm == "no signature":
        signature_path(signed).unlink()
    if harm == "empty":
        signature_path(signed).write_bytes(b"")
    store = file_place_2.open()
    with pytest.raises(ArchiveError, match="signature"):
        import_(store, signed, verify_key=KEY[::-1] if harm == "another key" else KEY)
    assert store.stats().records == store.stats().entries == 0


def test_an_export_without_a_key_takes_the_old_signature_away(signed: Path, file_place: Place) -> None:
    export(file_place.open(), signed, [GOOD.chunk_id])
    assert not signature_path(signed).exists()


@pytest.mark.parametrize("content", [b"", b"short", b" " * 100, b"x" * 10_000])
def test_a_secret_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ValueError, match="openssl rand"):
        read_sign_key(tmp_path / "key")


# -- what may not break the reader ----------------------------------------------------------------------


RECORDS: dict[str, bytes] = {
    "deeply nested": b"[" * 200_000,
    "not UTF-8": b"\xff\xfe",
    "no object": b"7",
    "NaN": record_of(GOOD, created_at=float("nan"))[1],
    "for ever": record_of(GOOD, expires_at=float("inf"))[1],
    "a huge number": record_of(GOOD, created_at=10**400)[1],
    "before time": record_of(GOOD, last_used_at=-1)[1],
    "tokens as words": record_of(GOOD, token_ids=["1", "2"])[1],
    "tokens as fractions": record_of(GOOD, token_ids=[1000.5])[1],
    "tokens as truth": record_of(GOOD, token_ids=[True])[1],
    "a huge token": record_of(GOOD, token_ids=[2**32])[1],
    "a negative token": record_of(GOOD, token_ids=[-1])[1],
    "half a pair": record_of(GOOD, name="\ud800")[1],
    "a line feed": record_of(GOOD, name="a\nlevel=ERROR forged")[1],
    "a zero": record_of(GOOD, tags=["a\0b"])[1],
    "a long name": record_of(GOOD, name="x" * 100_000)[1],
    "many tags": record_of(GOOD, tags=[str(number) for number in range(5000)])[1],
    "a word for tags": record_of(GOOD, tags="abc")[1],
    "a word for pinned": record_of(GOOD, pinned="false")[1],
    "no type of ours": record_of(GOOD, type="poem")[1],
    "a list for a name": record_of(GOOD, name=[])[1],
}


@pytest.mark.parametrize("raw", RECORDS.values(), ids=RECORDS.keys())
def test_a_record_that_is_none_is_refused_and_named(file_place: Place, tmp_path: Path, raw: bytes) -> None:
    store = file_place.open()
    (refused,) = import_(store, archive(tmp_path / "bad", (f"records/{GOOD.chunk_id}.json", raw))).refused
    assert len(refused) < 500
    assert store.stats().records == 0


LAYOUTS = [
    KVLayout("float32", (LayerLayout(10**18, 10**18, 10**18),)),
    KVLayout("float32", (LayerLayout(-2, 8, 8), LayerLayout(2, 8, 8))),
    KVLayout("float32", (LayerLayout(10**2000, 1, 1),)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["huge", "negative", "long"])
def test_a_header_that_asks_for_the_impossible_is_refused(file_place: Place, tmp_path: Path, layout: KVLayout) -> None:
    raw = encode_header(replace(GOOD.header, layout=LAYOUT), [0] * 4)
    text, wanted = (part.canonical().encode() for part in (LAYOUT, layout))
    assert text in raw
    fields = raw[24 : 24 + int.from_bytes(raw[12:16], "little")]
    at = fields.index(text)
    fields = fields[: at - 4] + len(wanted).to_bytes(4, "little") + wanted + fields[at + len(text) :]
    prefix = raw[:12] + len(fields).to_bytes(4, "little") + checksum(fields).to_bytes(8, "little")
    packed = (prefix + fields).ljust(8192, b"\0")
    report = import_(file_place.open(), archive(tmp_path / "bad", record_of(GOOD), (f"entries/{GOOD.key}.kv", packed)))
    assert (report.entries, len(report.refused)) == (0, 1)


def pax(tar: tarfile.TarFile) -> None:
    info = tarfile.TarInfo("records/x.json")
    info.pax_headers = {"comment": "x" * 20_000_000}
    tar.addfile(info)


def sparse(tar: tarfile.TarFile) -> None:
    """A few bytes that say they are a terabyte."""
    info = tarfile.TarInfo(f"entries/{GOOD.key}.kv")
    info.type = tarfile.GNUTYPE_SPARSE
    info.size = 2**40
    tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))


def larger_than_the_file(tar: tarfile.TarFile) -> None:
    info = tarfile.TarInfo(f"entries/{GOOD.key}.kv")
    info.size = 2**33
    tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))


def long_name(tar: tarfile.TarFile) -> None:
    tar.addfile(tarfile.TarInfo("records/" + "x" * 20_000_000))


def hard_link(tar: tarfile.TarFile) -> None:
    info = tarfile.TarInfo("records/x.json")
    info.type, info.linkname = tarfile.LNKTYPE, "manifest.json"
    tar.addfile(info)


@pytest.mark.parametrize("harm", [pax, sparse, larger_than_the_file, long_name, hard_link])
def test_a_tar_that_asks_for_more_than_it_has_is_refused(
    file_place: Place, tmp_path: Path, harm: Callable[[tarfile.TarFile], None]
) -> None:
    path = tmp_path / "bad"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT if harm is pax else tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("manifest.json")
        info.size = len(encode_manifest(1))
        tar.addfile(info, io.BytesIO(encode_manifest(1)))
        harm(tar)
    store = file_place.open()
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError):
            import_(store, path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "manifest",
    [b"[" * 4000, b"{}", b'{"format": "cairn-archive", "version": 1, "members": "3"}', b"x" * 100_000, b'"\\ud800"'],
)
def test_a_manifest_that_is_none_is_refused(file_place: Place, tmp_path: Path, manifest: bytes) -> None:
    with pytest.raises(ArchiveError):
        import_(file_place.open(), archive(tmp_path / "bad", manifest=manifest))


def test_an_archive_of_nothing_but_refusals_is_given_up(file_place: Place, tmp_path: Path) -> None:
    members = [(f"records/{number}.json", b"{}") for number in range(3000)]
    with pytest.raises(ArchiveError, match="more than 1000 members do not verify"):
        import_(file_place.open(), archive(tmp_path / "bad", *members))


def test_a_member_larger_than_the_store_is_skipped(file_place: Place, tmp_path: Path) -> None:
    big = sample(4, tokens=400)
    packed = archive(
        tmp_path / "big",
        record_of(big),
        record_of(GOOD),
        entry_of(big.header, big.data),
        entry_of(GOOD.header, GOOD.data),
    )
    store = file_place.open(capacity_nbytes=30_000)
    report = import_(store, packed)
    assert (report.entries, len(report.refused)) == (1, 1) and "more than 30000" in report.refused[0]
    assert loads(store, GOOD)


def test_no_damage_does_more_than_refuse(file_place: Place, tmp_path: Path) -> None:
    """Bytes changed anywhere: an error of ours or a refusal, and never an entry whose bytes differ."""
    whole = archive(
        tmp_path / "whole",
        record_of(GOOD),
        record_of(PARENT),
        entry_of(GOOD.header, GOOD.data),
        entry_of(PARENT.header, PARENT.data),
    ).read_bytes()
    store = file_place.open()
    rng = random.Random(5)
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(rng.choice([1, 3, 40])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        (tmp_path / "bad").write_bytes(raw)
        try:
            import_(store, tmp_path / "bad")
        except ArchiveError:
            continue
        for entry in (GOOD, PARENT):
            loads(store, entry)  # fails on wrong bytes
        store.delete_chunks([GOOD.chunk_id, PARENT.chunk_id])
