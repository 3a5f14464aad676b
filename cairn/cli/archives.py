"""Archives of a chunk store from the command line: `cairn store export` and `cairn store import`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cairn.cli.arguments import UsageError
from cairn.cli.stores import add_chunk_flags, choose_chunks
from cairn.cli.terminal import Terminal
from chunk_store.key import ChunkId
from chunk_store.quantities import human_bytes
from chunk_store.record import RecordQuery
from chunk_store.shared_store import SharedStore
from chunk_store.tenant import Tenant, tenant_of
from chunk_store.tools.archive import export, import_
from chunk_store.tools.archive_file import read_sign_key
from chunk_store.tools.selection import each_record

REFUSALS_SHOWN = 20


def add_archive_actions(actions: Any) -> None:
    """``actions`` are the subparsers of ``cairn store``."""
    exporting = actions.add_parser(
        "export",
        usage="cairn store export [-h] FILE [CHUNK ...] [--tag TAG] [--all] [--sign-key FILE] [--store URL] [--json]",
        help="write chunks, their KV and their contexts to one archive",
    )
    exporting.add_argument("file", type=Path, metavar="FILE", help="the archive to write; an existing one is replaced")
    add_chunk_flags(exporting)
    exporting.add_argument("--all", action="store_true", help="every chunk of the store")
    exporting.add_argument("--sign-key", type=Path, metavar="FILE", help="sign with the secret in FILE (as FILE.sig)")
    importing = actions.add_parser("import", help="add what an archive holds and the store does not")
    importing.add_argument("file", type=Path, metavar="FILE", help="an archive that `cairn store export` wrote")
    importing.add_argument(
        "--verify-key", type=Path, metavar="FILE", help="refuse an archive that is not signed with the secret in FILE"
    )
    importing.add_argument(
        "--token-file", type=Path, metavar="FILE", help="the services' token file: import KV under the salts in it, too"
    )


def export_chunks(args: argparse.Namespace, terminal: Terminal, store: SharedStore) -> int:
    with terminal.waiting(f"Exporting to {args.file} ..."):
        chosen = _everything(store) if args.all else choose_chunks(store, args.chunk, args.tag)
        try:
            report = export(store, args.file, chosen, sign_key=_secret("--sign-key", args.sign_key))
        except OSError as error:
            raise UsageError(f"cannot write {args.file}: {error.strerror or error}") from error
    terminal.result(
        {"file": str(args.file), **asdict(report)},
        f"exported {report.records} chunks with {report.entries} KV entries, {human_bytes(report.nbytes)}, "
        f"to {args.file}",
    )
    for chunk_id in report.missing:  # deleted by somebody else since they were chosen
        terminal.note(f"chunk {chunk_id} is not in the store any more", "bold red")
    return 1 if report.missing else 0


def import_chunks(args: argparse.Namespace, terminal: Terminal, store: SharedStore) -> int:
    with terminal.waiting(f"Importing {args.file} ..."):
        try:
            report = import_(
                store, args.file, verify_key=_secret("--verify-key", args.verify_key), salts=_salts(args.token_file)
            )
        except OSError as error:
            raise UsageError(f"cannot read {args.file}: {error.strerror or error}") from error
    terminal.result(
        {"file": str(args.file), "signature": "verified" if args.verify_key else "not asked for", **asdict(report)},
        f"imported {report.records} chunks and {report.entries} KV entries, {human_bytes(report.nbytes)}; "
        f"{report.known} were there already, {len(report.refused)} refused",
    )
    for words in report.refused[:REFUSALS_SHOWN]:
        terminal.note(f"refused {words}", "bold red")
    return 1 if report.refused else 0


def _everything(store: SharedStore) -> list[ChunkId]:
    return [record.chunk_id for record in each_record(store, RecordQuery(tenants=None))]


def _secret(flag: str, path: Path | None) -> bytes | None:
    """The signing key in ``path``. Raises ``UsageError``."""
    if path is None:
        return None
    try:
        return read_sign_key(path)
    except OSError as error:
        raise UsageError(f"{flag}: cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error


def _salts(path: Path | None) -> dict[Tenant, str]:
    """The salts of a token file by the tenants they make. Raises ``UsageError``."""
    if path is None:
        return {}
    from serving.rpc.access import Access  # brings model code with it

    try:
        grants = Access.from_file(path).grants or {}
    except OSError as error:
        raise UsageError(f"--token-file: cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"--token-file: {error}") from error
    return {tenant_of(grant.salt): grant.salt for grant in grants.values()}
