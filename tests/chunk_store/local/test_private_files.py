"""What a store leaves on disk is for its owner alone, whatever the umask, also in a directory of older software."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunk_store.local.rebuild import renew_index
from chunk_store.tools.archive import export
from tests.chunk_store.contract import Damage, blank, loads, publish, sample, views_of
from tests.chunk_store.places import FilePlace


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def readable_by_others(root: Path) -> list[str]:
    paths = [root, *root.rglob("*")]
    return [str(path.relative_to(root)) for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077]


def use(place: FilePlace) -> None:
    """Leaves entries, a log, a quarantined entry and an index that was set aside."""
    store = place.open()
    for number in range(3):
        store.put_records([sample(number).record()])
        publish(store, sample(number))
    bad = sample(1)
    place.damage(bad.key, Damage.FLIPPED_DATA)
    store.load(bad.key, bad.header.token_ids, views_of(blank(bad)))


def test_a_store_is_readable_by_its_owner_alone(file_place: FilePlace, no_umask: None) -> None:
    use(file_place)
    there = {path.relative_to(file_place.root).parts[0] for path in file_place.root.rglob("*")}
    assert {"data", "quarantine", "index.sqlite", "index.sqlite-wal", "index.sqlite-shm"} <= there
    assert readable_by_others(file_place.root) == []
    for path in file_place.root.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_a_rebuilt_index_too(file_place: FilePlace, no_umask: None) -> None:
    file_place.open().close()
    (file_place.root / "index.sqlite").write_bytes(b"poem" * 4096)
    assert renew_index(file_place.root) is not None
    assert readable_by_others(file_place.root) == []


def test_an_archive_too(file_place: FilePlace, tmp_path: Path, no_umask: None) -> None:
    use(file_place)
    leftover = tmp_path / "some.tar.partial"
    leftover.touch()
    export(file_place.open(), tmp_path / "some.tar", [sample(0).chunk_id])
    assert stat.S_IMODE((tmp_path / "some.tar").stat().st_mode) == 0o600


def test_a_store_of_older_software_is_closed_when_it_is_opened(file_place: FilePlace) -> None:
    """The directory itself was made by whoever named it, and stays as it is."""
    use(file_place)
    for store in file_place._stores:
        store.close()
    for path in [file_place.root, *file_place.root.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    store = file_place.open()
    assert loads(store, sample(2))
    open_to_others = readable_by_others(file_place.root)
    assert all(name == "." or name.startswith(("data/", "quarantine/")) for name in open_to_others)
    assert stat.S_IMODE(file_place.root.stat().st_mode) == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to stand for an administrator")
def test_what_root_makes_belongs_to_the_directorys_owner(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    os.chown(root, 1234, 5678)
    place = FilePlace(root)
    use(place)
    assert {(path.stat().st_uid, path.stat().st_gid) for path in root.rglob("*")} == {(1234, 5678)}
    place.close()
