"""Does the metadata agree with the data? Reads every entry, reports what is wrong, and mends it when asked.

Works on any backend and beside running services: what is being written or removed meanwhile is no finding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from chunk_store.blobs import Expected
from chunk_store.errors import BlobBad, BlobMissing, BlobOtherVersion, BlobUnreadable
from chunk_store.landing import Buffers
from chunk_store.ledger import Placed, key_of
from chunk_store.shared_store import SharedStore

Progress = Callable[[int, int], None]


class Problem(StrEnum):
    """What can be wrong, and what ``repair`` does about it."""

    DATA_MISSING = "data_missing"  # an entry without bytes: the entry is dropped
    DATA_BAD = "data_bad"  # bytes that fail verification: quarantined, the entry dropped
    DATA_UNREADABLE = "data_unreadable"  # an I/O error: left alone
    OTHER_VERSION = "other_version"  # written by older or newer software: kept until it is wanted and stored anew
    STRAY = "stray"  # bytes without an entry: adopted if they verify, otherwise removed
    LEDGER = "ledger"  # counts that do not add up: counted again


@dataclass(frozen=True)
class Finding:
    problem: Problem
    blob: str  # "" for LEDGER
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """``nbytes`` is header and data of the entries that were read."""

    entries: int
    nbytes: int
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        return not self.findings


@dataclass(frozen=True)
class RepairReport:
    """What ``repair`` found and what became of it.

    ``left`` could not be mended now; ``kept`` is in the format of other software and nothing is wrong with it.
    """

    found: VerifyReport
    dropped: int
    adopted: int
    removed: int
    left: int
    kept: int


def verify(store: SharedStore, progress: Progress = lambda done, total: None) -> VerifyReport:
    """Reads and checks everything, changes nothing. ``progress`` gets entries read and entries in all.

    Raises ``StoreUnavailable``.
    """
    names = dict(store.blobs.names())  # first: what appears later is not a stray
    placed = store.ledger.entries.placed()
    findings = []
    for done, entry in enumerate(placed):
        progress(done, len(placed))
        finding = _check_entry(store, entry)
        if finding is not None:
            findings.append(finding)
    progress(len(placed), len(placed))
    known = (
        {entry.blob for entry in placed} | set(store.ledger.claims.unfinished()) | set(store.ledger.upkeep.garbage())
    )
    known |= {bad.blob for bad in store.blobs.quarantined()}
    known |= {entry.blob for entry in store.ledger.entries.placed()}  # committed meanwhile
    for blob in sorted(names.keys() - known):
        findings += _check_stray(store, blob)
    findings += [Finding(Problem.LEDGER, "", text) for text in store.ledger.upkeep.audit()]
    return VerifyReport(len(placed), sum(entry.stored_nbytes for entry in placed), tuple(findings))


def repair(store: SharedStore, progress: Progress = lambda done, total: None) -> RepairReport:
    """Sweeps, verifies and mends as ``Problem`` says, until the ledger agrees with the data.

    Raises ``StoreUnavailable``.
    """
    store.sweep()
    found = report = verify(store, progress)
    if any(finding.problem is Problem.LEDGER for finding in found.findings):
        store.ledger.upkeep.recount()  # first: what it has lost sight of looks like stray data
        report = verify(store, progress)
    dropped = adopted = removed = left = kept = 0
    for finding in sorted(report.findings, key=lambda finding: _depth(store, finding)):
        if finding.problem in (Problem.DATA_MISSING, Problem.DATA_BAD):
            dropped += _drop(store, finding)
        elif finding.problem is Problem.STRAY:
            taken = _adopt(store, finding.blob)
            adopted += taken
            removed += not taken
        elif finding.problem is Problem.OTHER_VERSION:
            kept += 1
        else:
            left += 1
    store.sweep()  # what was adopted may exceed the capacity
    return RepairReport(found, dropped, adopted, removed, left, kept)


def _depth(store: SharedStore, finding: Finding) -> int:
    """How much context a stray has: what others were computed under is adopted first, so that they find it."""
    if finding.problem is not Problem.STRAY:
        return 0
    try:
        return len(store.blobs.frame(finding.blob).header.context)
    except (BlobMissing, BlobBad, BlobUnreadable):
        return 0


def _check_entry(store: SharedStore, entry: Placed) -> Finding | None:
    try:
        frame = store.blobs.frame(entry.blob)
        if frame.header.key != entry.key or frame.stored_nbytes != entry.stored_nbytes:
            detail = f"holds {frame.header.key} in {frame.stored_nbytes} bytes, recorded are {entry.stored_nbytes}"
            return Finding(Problem.DATA_BAD, entry.blob, detail)
        _read(store, entry.blob)
        return None
    except BlobMissing:
        if not _is_current(store, entry):
            return None
        return Finding(Problem.DATA_MISSING, entry.blob, "the entry's data does not exist")
    except (BlobBad, BlobUnreadable) as error:
        return Finding(_problem(error, Problem.DATA_BAD), entry.blob, str(error))


def _check_stray(store: SharedStore, blob: str) -> list[Finding]:
    try:
        _read(store, blob)
        return [Finding(Problem.STRAY, blob, "complete data without an entry")]
    except BlobMissing:
        return []
    except (BlobBad, BlobUnreadable) as error:
        return [Finding(_problem(error, Problem.STRAY), blob, f"data without an entry: {error}")]


def _problem(error: BlobBad | BlobUnreadable, bad: Problem) -> Problem:
    if isinstance(error, BlobUnreadable):
        return Problem.DATA_UNREADABLE
    return Problem.OTHER_VERSION if isinstance(error, BlobOtherVersion) else bad


def _read(store: SharedStore, blob: str) -> None:
    """Reads a blob against its own header."""
    header = store.blobs.frame(blob).header
    buffers = [memoryview(bytearray(size)) for size in header.layout.plane_nbytes(len(header.token_ids))]
    store.blobs.read(blob, Expected(header.key, header.token_ids), Buffers(buffers))


def _is_current(store: SharedStore, entry: Placed) -> bool:
    now = store.ledger.entries.locate(entry.key)
    return now is not None and now.blob == entry.blob


def _drop(store: SharedStore, finding: Finding) -> bool:
    bad = finding.problem is Problem.DATA_BAD
    if not store.ledger.entries.forget(key_of(finding.blob), finding.blob, quarantined=bad):
        return False
    if bad:
        store.blobs.quarantine(finding.blob)
    store.sweep()
    return True


def _adopt(store: SharedStore, blob: str) -> bool:
    """Adopts a stray that verifies and whose key is free; removes any other."""
    try:
        _read(store, blob)
        frame = store.blobs.frame(blob)
        header = frame.header
        if blob.startswith(f"{header.key}.") and store.ledger.entries.adopt(header, blob, frame.stored_nbytes):
            return True
        placed = store.ledger.entries.locate(header.key)
        if placed is not None and placed.blob == blob:  # it has its entry meanwhile
            return True
    except (BlobBad, BlobMissing):
        pass
    store.blobs.remove([blob])
    return False
