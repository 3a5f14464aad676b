"""``cairn store`` on real stores without a service: what it says, what it changes, and the exit codes."""

from __future__ import annotations

import json
import shlex
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest

from cairn.cli import main as cli
from chunk_store.entry import EntryInfo
from chunk_store.key import ChunkKey, chunk_key
from chunk_store.open import open_store
from tests.cairn.on_terminal import on_a_terminal
from tests.cairn.stored import LAYOUT, MODEL, OTHER_MODEL, TOKENS, fill, record
from tests.chunk_store.servers import PASSWORD, Server, redis_server, redis_url

Run = Callable[..., tuple[int, str, str]]
KV_NBYTES = LAYOUT.nbytes(TOKENS)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    assert shutil.which("redis-server"), "redis-server is needed: see README, `make test`"
    server = redis_server(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["file", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return redis_url(request.getfixturevalue("redis"), prefix=tmp_path.name)


@pytest.fixture
def cairn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    for variable in ("CAIRN_STORE", "CAIRN_STORE_PASSWORD", "CAIRN_STORE_PASSWORD_FILE"):
        monkeypatch.delenv(variable, raising=False)

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(argv)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def store(url: str, cairn: Run) -> Callable[..., tuple[int, str, str]]:
    """``cairn store`` on a filled store."""
    fill(url)
    return lambda action, *argv: cairn("store", action, *argv, "--store", url)


def entries(url: str) -> dict[ChunkKey, EntryInfo]:
    with closing(open_store(url)) as opened:
        return {info.key: info for info in opened.list_entries()}


def test_stats_for_people_and_for_scripts(store: Run, url: str) -> None:
    code, out, _ = store("stats", "--json")
    said = json.loads(out)
    assert code == 0
    assert (said["records"], said["entries"], said["quarantined"]) == (4, 4, 0)
    assert said["nbytes"] > 4 * KV_NBYTES and said["capacity_nbytes"] == 16 * 2**30
    assert [(m["model"], m["entries"], m["tokens"], m["nbytes"]) for m in said["models"]] == [
        (MODEL, 3, 3 * TOKENS, 3 * KV_NBYTES),
        (OTHER_MODEL, 1, TOKENS, KV_NBYTES),
    ]
    code, out, err = store("stats")
    assert (code, err) == (0, "")
    assert MODEL in out and "4 of 100000" in out and "16.0 GiB" in out
    assert "s3cret" not in out and "\x1b" not in out


def test_the_store_is_found_through_the_environment(cairn: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(url)
    monkeypatch.setenv("CAIRN_STORE", url)
    code, out, _ = cairn("store", "stats", "--json")
    assert (code, json.loads(out)["records"]) == (0, 4)


def test_verify_says_that_a_sound_store_is_sound(store: Run) -> None:
    code, out, _ = store("verify")
    assert code == 0 and out.startswith("sound: 4 entries")
    code, out, _ = store("verify", "--repair", "--json")
    said = json.loads(out)
    assert (code, said["sound"], said["entries"], said["findings"]) == (0, True, 4, [])
    assert said["repaired"] == {"dropped": 0, "adopted": 0, "removed": 0, "left": 0, "kept": 0}


def damage(root: Path) -> None:
    """One entry loses its file, another one a bit of its data."""
    lost, spoiled, *_ = sorted(
        path
        for path in root.rglob("*")
        if path.is_file() and path.stat().st_size > KV_NBYTES and "index.sqlite" not in path.name
    )
    lost.unlink()
    raw = bytearray(spoiled.read_bytes())
    raw[-1] ^= 1
    spoiled.write_bytes(raw)


def test_verify_finds_damage_and_repair_mends_it(cairn: Run, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    fill(url)
    damage(tmp_path / "store")
    code, out, _ = cairn("store", "verify", "--store", url, "--json")
    said = json.loads(out)
    assert (code, said["sound"], said["repaired"]) == (1, False, None)
    assert sorted(finding["problem"] for finding in said["findings"]) == ["data_bad", "data_missing"]
    assert len(entries(url)) == 4, "verify alone changes nothing"
    code, out, _ = cairn("store", "verify", "--store", url)
    assert code == 1 and "data_missing" in out and "cairn store verify --repair" in out
    code, out, _ = cairn("store", "verify", "--repair", "--store", url)
    assert code == 0 and "repaired: 2 entries dropped" in out
    code, out, _ = cairn("store", "verify", "--store", url)
    assert code == 0 and out.startswith("sound: 2 entries")


def test_gc_removes_what_has_expired(cairn: Run, url: str) -> None:
    fill(url)
    with closing(open_store(url)) as opened:
        late = record(4)
        opened.put_records([type(late)(**{**vars(late), "expires_at": 1.0})])
    code, out, _ = cairn("store", "gc", "--store", url, "--json")
    assert code == 0
    assert json.loads(out) == {"claims": 0, "records": 1, "entries": 0, "nbytes": 0}
    code, out, _ = cairn("store", "gc", "--store", url)
    assert code == 0 and "0 unfinished publications, 0 expired chunks" in out


@pytest.mark.parametrize(
    ("choice", "records", "entries_"),
    [
        (["one"], 1, 1),
        ([":two"], 2, 2),  # with the context that it was computed under
        (["--tag", "b"], 1, 2),
        ([":one", "--tag", "a"], 2, 2),
        (["--all"], 4, 4),
    ],
)
def test_export_then_import_elsewhere(
    store: Run, cairn: Run, url: str, tmp_path: Path, choice: list[str], records: int, entries_: int
) -> None:
    archive, other = tmp_path / "chosen.tar", f"file://{tmp_path}/elsewhere"
    code, out, _ = store("export", str(archive), *choice, "--json")
    said = json.loads(out)
    assert (code, said["records"], said["entries"], said["missing"]) == (0, records, entries_, [])
    code, out, _ = cairn("store", "import", str(archive), "--store", other, "--json")
    said = json.loads(out)
    assert (code, said["records"], said["entries"], said["refused"]) == (0, records, entries_, [])
    assert entries(other).keys() <= entries(url).keys()
    with closing(open_store(other)) as copy:
        for key, info in entries(other).items():
            ids = next(r.token_ids for r in map(record, range(1, 5)) if r.chunk_id == info.chunk_id)
            buffers = [bytearray(size) for size in LAYOUT.plane_nbytes(TOKENS)]
            assert copy.load(key, ids, [memoryview(buffer) for buffer in buffers]) is None
            assert b"".join(buffers) == bytes([int(key[:2], 16)]) * KV_NBYTES
    code, out, _ = cairn("store", "import", str(archive), "--store", other)
    assert code == 0 and f"{records + entries_} were there already, 0 refused" in out


def test_import_refuses_an_entry_that_does_not_verify(cairn: Run, tmp_path: Path) -> None:
    archive, url = tmp_path / "all.tar", f"file://{tmp_path}/store"
    fill(url)
    assert cairn("store", "export", str(archive), "one", "--store", url)[0] == 0
    raw = bytearray(archive.read_bytes())
    key = chunk_key(MODEL, [], record(1).token_ids)
    at = raw.index(bytes([int(key[:2], 16)]) * 64)
    raw[at] ^= 1
    archive.write_bytes(raw)
    code, out, err = cairn("store", "import", str(archive), "--store", f"file://{tmp_path}/elsewhere")
    assert code == 1 and "1 refused" in out and f"refused entries/{key}" in err
    assert not entries(f"file://{tmp_path}/elsewhere")


def test_a_file_that_is_no_archive_fails(cairn: Run, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("no archive")
    code, out, err = cairn("store", "import", str(tmp_path / "words"), "--store", f"file://{tmp_path}/store")
    assert (code, out) == (1, "") and "not an archive" in err and "Traceback" not in err


def test_rm_by_chunk_by_tag_and_by_model(store: Run, url: str) -> None:
    code, out, _ = store("rm", "--model", OTHER_MODEL[:6], "--json")
    assert (code, json.loads(out)["entries"], json.loads(out)["records"]) == (0, 1, 0)
    assert {info.model for info in entries(url).values()} == {MODEL}
    code, out, _ = store("rm", ":three")
    assert code == 0 and out.startswith("removed 1 chunks: 1 KV entries")
    code, out, _ = store("rm", "--tag", "a", "--json")
    assert (code, json.loads(out)["records"], json.loads(out)["entries"]) == (0, 2, 2)
    assert not entries(url)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["export", "FILE"], "name chunks (CHUNK ..., --tag TAG) or give --all"),
        (["export", "FILE", "one", "--all"], "name chunks (CHUNK ..., --tag TAG) or give --all"),
        (["export", "FILE", "nobody"], "'nobody' stands for 0 chunks"),
        (["export", "FILE", "f" * 64], "in the store (or it has expired)"),
        (["export", "FILE", "--tag", "none"], "no chunk bears 'none'"),
        (["export", "/nowhere/at/all", "one"], "cannot write /nowhere/at/all"),
        (["import", "/nowhere"], "cannot read /nowhere"),
        (["rm"], "or a model (--model IDENTITY)"),
        (["rm", "one", "--model", MODEL], "or a model (--model IDENTITY)"),
        (["rm", "--model", "xyz"], "'xyz' is not a model identity"),
        (["rm", "--model", "c" * 64], "stands for 0 models"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_changes_nothing(
    cairn: Run, tmp_path: Path, argv: list[str], words: str
) -> None:
    url = f"file://{tmp_path}/store"
    fill(url)
    argv = [word.replace("FILE", str(tmp_path / "archive")) for word in argv]
    code, out, err = cairn("store", *argv, "--store", url)
    assert (code, out) == (2, "")
    assert words in err.replace("\n", " ")
    assert len(entries(url)) == 4 and not (tmp_path / "archive").exists()


@pytest.mark.parametrize("action", ["stats", "verify", "gc"])
def test_a_directory_without_a_store_stays_as_it_is(cairn: Run, tmp_path: Path, action: str) -> None:
    code, out, err = cairn("store", action, "--store", f"file://{tmp_path}/typo")
    assert (code, out) == (2, "") and "holds no chunk store; check --store and CAIRN_STORE" in err
    assert not (tmp_path / "typo").exists()


def test_a_store_that_cannot_be_reached_is_a_failed_request(cairn: Run) -> None:
    code, out, err = cairn("store", "stats", "--store", "redis://:s3cret@127.0.0.1:1/0", "--json")
    assert (code, out) == (1, "")
    error = json.loads(err)["error"]
    assert error["code"] == "UNAVAILABLE" and error["source"] == "chunk store redis://127.0.0.1:1/0"
    assert "s3cret" not in err
    code, _, err = cairn("store", "stats", "--store", "ftp://somewhere")
    assert code == 2 and "starts with none of file://" in err


def test_the_stores_password_comes_from_the_environment_or_a_file_and_is_shown_nowhere(
    cairn: Run, redis: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("store", "stats", "--json", "--store", f"redis://127.0.0.1:{redis.port}/0?prefix={tmp_path.name}")
    assert cairn(*argv)[0] == 1
    file = tmp_path / "password"
    for variable, value in (("CAIRN_STORE_PASSWORD", PASSWORD), ("CAIRN_STORE_PASSWORD_FILE", str(file))):
        file.write_text(PASSWORD)
        monkeypatch.setenv(variable, value)
        code, out, err = cairn(*argv)
        assert code == 0 and json.loads(out)["store"] == argv[-1] and PASSWORD not in out + err
        monkeypatch.delenv(variable)
    monkeypatch.setenv("CAIRN_STORE_PASSWORD_FILE", str(tmp_path / "none"))
    code, _, err = cairn(*argv)
    assert code == 2 and "CAIRN_STORE_PASSWORD_FILE" in err


@pytest.mark.parametrize("form", ["redis://:s3[cret@127.0.0.1:1/0", "redis://u:s3/cret@127.0.0.1:1/0"])
def test_a_careless_password_is_not_shown(cairn: Run, form: str) -> None:
    code, out, err = cairn("store", "stats", "--store", form)
    assert code == 2 and "percent-encoded" in err and "cret" not in out + err


def test_an_index_that_is_no_database_is_a_failed_request(cairn: Run, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    fill(url)
    (tmp_path / "store" / "index.sqlite").write_bytes(b"this is not a database at all" * 200)
    code, out, err = cairn("store", "stats", "--store", url)
    assert (code, out) == (1, "")
    assert "database" in err and "Traceback" not in err


@pytest.mark.parametrize("harm", ["deleted", "deleted with its log", "cut", "garbage", "empty"])
def test_repair_rebuilds_a_lost_index(cairn: Run, tmp_path: Path, harm: str) -> None:
    """The command that every error names works as it stands there."""
    url, root = f"file://{tmp_path}/my store", tmp_path / "my store"
    fill(url)
    index = root / "index.sqlite"
    raw = index.read_bytes()
    if harm.startswith("deleted"):
        for path in root.glob("index.sqlite*" if "log" in harm else "index.sqlite"):
            path.unlink()
    else:
        index.write_bytes({"cut": raw[:5000], "garbage": bytes(reversed(raw)), "empty": b""}[harm])
    if harm != "empty":
        code, out, err = cairn("store", "stats", "--store", url)
        said = " ".join(err.split())
        assert code in (1, 2) and "Traceback" not in err
        assert "index.sqlite-wal" in said and "index.sqlite-shm" in said
        command = shlex.split(said[said.index("cairn store verify") : said.rindex("`")])
    else:
        command = ["cairn", "store", "verify", "--repair", "--store", f"file://{quote(str(root))}"]
    code, out, err = cairn(*command[1:])
    assert code == 0 and "4 adopted" in out
    assert "register the chunks again" in " ".join(err.split())
    code, out, _ = cairn("store", "verify", "--store", url)
    assert code == 0 and out.startswith("sound: 4 entries")
    assert len(list(root.glob("index.sqlite.damaged-*"))) == (not harm.startswith("deleted"))


def test_an_index_of_newer_software_is_refused(cairn: Run, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    fill(url)
    with closing(sqlite3.connect(tmp_path / "store" / "index.sqlite")) as index:
        index.execute("PRAGMA user_version = 99")
    for action in (["stats"], ["verify"], ["verify", "--repair"], ["gc"]):
        code, out, err = cairn("store", *action, "--store", url, "--json")
        error = json.loads(err)["error"]
        assert (code, out, error["code"]) == (1, "", "FAILED_PRECONDITION")
        assert "version 99, written by newer software" in error["message"]


def test_an_archive_is_signed_and_verified(cairn: Run, tmp_path: Path) -> None:
    url, archive, key = f"file://{tmp_path}/store", tmp_path / "all.cairn", tmp_path / "key"
    other = f"file://{tmp_path}/elsewhere"
    fill(url)
    key.write_text("5" * 64 + "\n")
    assert cairn("store", "export", str(archive), "--all", "--sign-key", str(key), "--store", url)[0] == 0
    code, out, _ = cairn("store", "import", str(archive), "--verify-key", str(key), "--store", other, "--json")
    assert (code, json.loads(out)["signature"], json.loads(out)["entries"]) == (0, "verified", 4)
    archive.write_bytes(archive.read_bytes()[:-1] + b"1")
    code, out, err = cairn("store", "import", str(archive), "--verify-key", str(key), "--store", other)
    assert (code, out) == (1, "") and "the signature does not fit" in err and "Traceback" not in err
    for flag, words in (("--verify-key", "cannot read"), ("--token-file", "cannot read")):
        code, _, err = cairn("store", "import", str(archive), flag, str(tmp_path / "nowhere"), "--store", other)
        assert code == 2 and words in err and flag in err


def test_a_cut_archive_fails_and_says_so(cairn: Run, tmp_path: Path) -> None:
    archive, url, other = tmp_path / "all.tar", f"file://{tmp_path}/store", f"file://{tmp_path}/elsewhere"
    fill(url)
    assert cairn("store", "export", str(archive), "--all", "--store", url)[0] == 0
    whole = archive.read_bytes()
    for size in (0, 700, len(whole) // 2, len(whole) * 3 // 4):
        archive.write_bytes(whole[:size])
        code, out, err = cairn("store", "import", str(archive), "--store", other)
        assert (code, out) == (1, "") and ("cut" in err or "not an archive" in err or "manifest" in err), size
    archive.write_bytes(whole)
    assert cairn("store", "import", str(archive), "--store", other)[0] == 0, "what came before is no obstacle"
    assert entries(other).keys() == entries(url).keys()


def test_on_a_terminal_there_is_progress_and_colour(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    fill(url)
    written = on_a_terminal(["store", "verify", "--store", url], {})
    assert b"Verifying: 0 of 4 entries" in written and b"sound: 4 entries" in written and b"\x1b[32m" in written
    assert b"\x1b[32m" not in on_a_terminal(["store", "verify", "--store", url], {"NO_COLOR": "1"})
    assert b"Verifying" not in on_a_terminal(["store", "verify", "--json", "--store", url], {})
