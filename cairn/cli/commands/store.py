"""Look after a chunk store: stats, verify, gc, export, import, rm. Services may go on; none has to run.

For whoever owns the store: what it shows and does is about every tenant's chunks.

A CHUNK is its id, the first 6 digits of its id, its name, or :NAME.

Exit codes: 0 it worked, 1 something is wrong with the store or the archive and was not put right, 2 the command line
was wrong.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from cairn.cli.archives import add_archive_actions, export_chunks, import_chunks
from cairn.cli.arguments import UsageError
from cairn.cli.connection import add_json_flag
from cairn.cli.stores import (
    add_chunk_flags,
    choose_chunks,
    choose_model,
    opened,
    options_from,
    with_sound_index,
)
from cairn.cli.terminal import Terminal, short_id, table
from chunk_store.entry import EntryInfo
from chunk_store.open import shown_url
from chunk_store.quantities import human_bytes
from chunk_store.shared_store import SharedStore
from chunk_store.store import DeleteReport
from chunk_store.tools.verify import Progress, RepairReport, VerifyReport, repair, verify
from serving.process.options import StoreOptions
from serving.process.settings import settings_of
from serving.process.sources import add_flags

FINDINGS_SHOWN = 20
PROGRESS_EVERY = 16  # entries


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("stats", help="count and measure what is stored, by model")
    verifying = actions.add_parser("verify", help="read and check every entry; exit code 1 if something is wrong")
    verifying.add_argument("--repair", action="store_true", help="put right what can be put right")
    actions.add_parser("gc", help="remove what dead writers left, what has expired, what exceeds the capacity")
    add_archive_actions(actions)
    removing = actions.add_parser(
        "rm",
        usage="cairn store rm [-h] [CHUNK ...] [--tag TAG] [--model IDENTITY] [--store URL] [--json]",
        help="remove chunks with their KV, or all KV of one model",
    )
    add_chunk_flags(removing)
    removing.add_argument("--model", metavar="IDENTITY", help="all KV of this model (`stats` shows it); records stay")
    for subparser in actions.choices.values():
        add_flags(subparser, settings_of(StoreOptions))
        add_json_flag(subparser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    actions: dict[str, Callable[[argparse.Namespace, Terminal, SharedStore], int]] = {
        "stats": _stats,
        "verify": _verify,
        "gc": _collect,
        "export": export_chunks,
        "import": import_chunks,
        "rm": _remove,
    }
    _check(args)
    args.store = options_from(StoreOptions, args)
    if args.action == "verify" and args.repair:
        _renew_index(args, terminal)
    with opened(args.store, create=args.action == "import") as store:
        return actions[args.action](args, terminal, store)


def _check(args: argparse.Namespace) -> None:
    """Raises ``UsageError`` for flags that do not go together, before anything is opened."""
    if args.action == "export" and args.all == bool(args.chunk or args.tag):
        raise UsageError("export: name chunks (CHUNK ..., --tag TAG) or give --all")
    if args.action == "rm" and (args.model is not None) == bool(args.chunk or args.tag):
        raise UsageError("rm: name chunks (CHUNK ..., --tag TAG) or a model (--model IDENTITY)")
    if args.action == "import" and not args.file.is_file():
        raise UsageError(f"cannot read {args.file}: there is no such file")


def _stats(args: argparse.Namespace, terminal: Terminal, store: SharedStore) -> int:
    stats = store.stats()
    models = _by_model(store.list_entries(tenants=None))
    if terminal.as_json:
        terminal.json_line({"store": shown_url(args.store.store), **asdict(stats), "models": models})
        return 0
    share = 100 * stats.nbytes / stats.capacity_nbytes
    rows = [
        ("store", shown_url(args.store.store)),
        ("backend", stats.backend),
        ("chunks", f"{stats.records} of {stats.records_max}"),
        ("KV entries", stats.entries),
        ("bytes", f"{human_bytes(stats.nbytes)} of {human_bytes(stats.capacity_nbytes)} ({share:.1f} %)"),
        ("pinned entries", stats.pinned_entries),
        ("leased entries", stats.leased_entries),
        ("evictions", stats.evictions),
        ("quarantined", stats.quarantined),
        ("in quarantine", f"{stats.quarantine_entries}, {human_bytes(stats.quarantine_nbytes)}"),
    ]
    terminal.say(table(("field", "value"), rows))
    if models:
        columns = ("\nmodel", "#\nentries", "#\ntokens", "#\nKV")
        cells = [(m["model"], m["entries"], m["tokens"], human_bytes(m["nbytes"])) for m in models]
        terminal.say(table(columns, cells))
    return 0


def _by_model(entries: list[EntryInfo]) -> list[dict[str, Any]]:
    """Entries, tokens and bytes of KV data of each model, the largest first."""
    counts: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for info in entries:
        counts[info.model] += 1
        tokens[info.model] += info.tokens
        nbytes[info.model] += info.nbytes
    return [
        {"model": model, "entries": counts[model], "tokens": tokens[model], "nbytes": size}
        for model, size in nbytes.most_common()
    ]


def _verify(args: argparse.Namespace, terminal: Terminal, store: SharedStore) -> int:
    repaired: RepairReport | None = None
    with terminal.waiting("Verifying ...") as status:
        if args.repair:
            repaired = repair(store, _progress(status))
            report = repaired.found
        else:
            report = verify(store, _progress(status))
    if terminal.as_json:
        mended = None if repaired is None else {key: value for key, value in asdict(repaired).items() if key != "found"}
        terminal.json_line({"sound": report.sound, **asdict(report), "repaired": mended})
    else:
        _say_verified(terminal, report, repaired)
    return 0 if report.sound or (repaired is not None and repaired.left == 0) else 1


def _renew_index(args: argparse.Namespace, terminal: Terminal) -> None:
    renewed = with_sound_index(args.store.store)
    if renewed is None:
        return
    aside = f"set aside as {', '.join(path.name for path in renewed.aside)}; " if renewed.aside else ""
    terminal.note(
        f"the index cannot be used ({renewed.reason}): {aside}a new one is built from the data. Names, tags, pins, "
        "TTLs and the list of registered chunks were in the old one: register the chunks again, their KV is found. "
        f"The capacity is {human_bytes(renewed.capacity_nbytes)} until a service sets it"
    )


def _progress(status: Any) -> Progress:
    """Shows entries read on a terminal; ``status`` is None where there is none."""

    def show(done: int, total: int) -> None:
        if status is not None and done % PROGRESS_EVERY == 0:
            status.update(f"Verifying: {done} of {total} entries ...")

    return show


def _say_verified(terminal: Terminal, report: VerifyReport, repaired: RepairReport | None) -> None:
    read = f"{report.entries} entries, {human_bytes(report.nbytes)}"
    if report.sound:
        terminal.say(f"sound: {read}", "green")
        return
    shown = report.findings[:FINDINGS_SHOWN]
    rows = [(finding.problem.value, finding.blob[:24], finding.detail) for finding in shown]
    terminal.say(table(("problem", "data", "detail"), rows))
    if len(report.findings) > len(shown):
        terminal.say(f"... and {len(report.findings) - len(shown)} more; --json shows all")
    if repaired is None:
        terminal.say(f"{len(report.findings)} findings in {read}; repair with: cairn store verify --repair", "bold red")
        return
    terminal.say(
        f"{len(report.findings)} findings in {read}; repaired: {repaired.dropped} entries dropped, "
        f"{repaired.adopted} adopted, {repaired.removed} stray data removed, {repaired.left} left as they are, "
        f"{repaired.kept} of another format version kept",
        "bold red" if repaired.left else "",
    )


def _collect(args: argparse.Namespace, terminal: Terminal, store: SharedStore) -> int:
    with terminal.waiting("Sweeping ..."):
        report = store.sweep()
    terminal.result(
        report,
        f"removed {report.claims} unfinished publications, {report.records} expired chunks, {report.entries} entries, "
        f"{human_bytes(report.nbytes)}",
    )
    return 0


def _remove(args: argparse.Namespace, terminal: Terminal, store: SharedStore) -> int:
    if args.model is not None:
        model = choose_model(store, args.model)
        report = store.delete_model(model)
        what = f"KV of model {short_id(model)}"
    else:
        chosen = choose_chunks(store, args.chunk, args.tag)
        report = store.delete_chunks(chosen, None)
        what = f"{report.records} chunks"
    terminal.result(report, _removed(what, report))
    return 0


def _removed(what: str, report: DeleteReport) -> str:
    return f"removed {what}: {report.entries} KV entries, {human_bytes(report.nbytes)}"
