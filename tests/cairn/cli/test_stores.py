"""A store opened from the command line: where it is, which chunks are meant, errors as commands report them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cairn.cli.arguments import UsageError
from cairn.cli.stores import choose_chunks, choose_model, opened, with_sound_index
from cairn.client.errors import CairnError
from chunk_store.errors import ClaimLost, StoreFull, StoreUnavailable
from chunk_store.key import ChunkType, TokenizerIdentity, chunk_id
from chunk_store.open import open_store
from chunk_store.record import ChunkRecord
from chunk_store.shared_store import SharedStore
from serving.process.options import StoreOptions

TOKENIZER = TokenizerIdentity("t" * 64)


def record(*ids: int, name: str = "", tags: tuple[str, ...] = ()) -> ChunkRecord:
    return ChunkRecord(chunk_id(TOKENIZER, ChunkType.CONTEXT, ids), TOKENIZER, ChunkType.CONTEXT, ids, name, tags)


ONE, TWO = record(1, name="one", tags=("t",)), record(2, name="two", tags=("t",))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SharedStore]:
    made = open_store(f"file://{tmp_path}/store")
    made.put_records([ONE, TWO])
    yield made
    made.close()


def test_words_and_tags_choose_chunks(store: SharedStore) -> None:
    assert choose_chunks(store, ["one"], []) == [ONE.chunk_id]
    assert choose_chunks(store, [TWO.chunk_id.upper(), ONE.chunk_id[:8]], []) == [TWO.chunk_id, ONE.chunk_id]
    assert set(choose_chunks(store, ["one"], ["t"])) == {ONE.chunk_id, TWO.chunk_id}


@pytest.mark.parametrize(
    ("words", "tags", "said"),
    [
        (["three"], [], "'three' stands for 0 chunks"),
        (["f" * 64], [], "no chunk ffff.* in the store"),
        ([], ["none"], "no chunk bears 'none'"),
    ],
)
def test_words_that_choose_none_are_refused(store: SharedStore, words: list[str], tags: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choose_chunks(store, words, tags)


@pytest.mark.parametrize(("word", "said"), [("fable", "is not a model identity"), ("abcdef", "stands for 0 models")])
def test_a_model_is_named_by_digits(store: SharedStore, word: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choose_model(store, word)


def test_a_directory_without_a_store_is_refused_unless_it_is_to_be_made(tmp_path: Path) -> None:
    options = StoreOptions(store=f"file://{tmp_path}/new")
    with pytest.raises(UsageError, match="holds no chunk store; check --store"), opened(options):
        pass
    assert not (tmp_path / "new").exists() and with_sound_index(options.store) is None
    with opened(options, create=True) as made:
        assert made.stats().records == 0
    with opened(options) as found:
        assert found.stats().records == 0


def test_a_lost_index_is_no_empty_store(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError, match="has lost its index"), opened(StoreOptions(store=f"file://{tmp_path}")):
        pass


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (StoreUnavailable("gone"), "UNAVAILABLE"),
        (StoreFull("full"), "RESOURCE_EXHAUSTED"),
        (ClaimLost("lost"), "ABORTED"),
    ],
)
def test_what_a_store_raises_is_a_failed_request(tmp_path: Path, raised: Exception, code: str) -> None:
    with (
        pytest.raises(CairnError) as caught,
        opened(StoreOptions(store=f"file://{tmp_path}/new"), create=True),
    ):
        raise raised
    assert caught.value.code == code and "chunk store" in caught.value.source


def test_a_url_that_names_no_store_is_a_wrong_command_line() -> None:
    with pytest.raises(UsageError, match="--store: "), opened(StoreOptions(store="ftp://x"), create=True):
        pass
