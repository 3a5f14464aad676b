"""``cairn compare``: on KV that a prefill service stored, on wrong KV with a right checksum, beside transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from cairn.cli import main as cli
from cairn.client.prompt import Text
from cairn.local.comparison import Comparison, read_way, run_comparison
from chunk_store.entry import EntryHeader
from chunk_store.open import open_store
from chunk_store.record import RecordQuery
from chunk_store.store import Busy, Stored
from engine.compare.trace import trace_engine
from engine.reuse import ReuseMode, key_composition
from serving.process.loading import Loaded, load
from serving.process.options import ServiceOptions
from tests.decode_service.models import loaded, model_dir
from tests.decode_service.pair import pair

Run = Callable[..., tuple[int, str, str]]
DOCUMENTS = ("The harbour of Dunholm freezes early.", "A heap of stones marks the pass.", "Nobody sells copper bells.")
QUERY = "Where are the stones?"
PIECE = "--prefill-tokens-max", "64"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store in which a prefill service left the KV of ``DOCUMENTS``, as two modes want it."""
    place = tmp_path_factory.mktemp("store")
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), place) as services:
        for mode in ("exact", "anchored"):
            services.generate([*map(Text, DOCUMENTS), Text(QUERY)], 1, reuse=mode)
    return f"file://{place}"


@pytest.fixture
def compare(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(("compare", "--model", str(folder), *PIECE, *argv))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def parts_of(served: Loaded) -> list[tuple[int, ...]]:
    return [served.codec.encode(text) for text in (*DOCUMENTS, QUERY)]


def test_our_engine_beside_transformers(compare: Run) -> None:
    for mode in ReuseMode:
        code, out, _ = compare(*DOCUMENTS, "--query", QUERY, "--a", mode, "--b", f"eager:{mode}", "--json")
        said = json.loads(out)
        assert (code, said["first"], said["beyond"], said["tolerance"]) == (0, None, 0, 2e-3)
        assert said["likeliest"][0] == said["likeliest"][1] and len(said["layers"]) == 3


def test_modes_beside_each_other(compare: Run, folder: Path) -> None:
    code, out, _ = compare(*DOCUMENTS, "--query", QUERY, "--a", "independent", "--b", "exact", "--tolerance", "0.001")
    assert code == 1
    first = len(parts_of(loaded(folder, "decode"))[0])
    assert "first beyond the tolerance of 0.001 (float32): hidden of layer 0 at token" in out
    assert f"token {first} (token 0 of A heap of stones mark...)" in out


@pytest.mark.parametrize("mode", ["exact", "anchored"])
def test_stored_kv_beside_fresh(compare: Run, store: str, mode: str) -> None:
    code, out, _ = compare(*DOCUMENTS, QUERY, "--a", f"stored:{mode}", "--b", mode, "--store", store, "--json")
    said = json.loads(out)
    assert (code, said["first"], said["tolerance"]) == (0, None, 0.0)
    assert said["sources_a"] == ["stored"] * 3 and said["sources_b"] == ["computed"] * 3


def test_what_the_store_lacks_is_computed_and_said(compare: Run, store: str) -> None:
    code, out, _ = compare(
        *DOCUMENTS, QUERY, "--a", "stored:exact", "--b", "exact", "--store", store, "--salt", "other"
    )
    assert code == 0 and out.count("computed (not_stored)") == 3


def test_a_chunk_of_the_store_is_named_by_its_id(compare: Run, folder: Path, store: str) -> None:
    with closing(open_store(store)) as opened:
        named = {record.token_ids: record.chunk_id for record in opened.list_records(RecordQuery()).records}
    ids = [named[loaded(folder, "decode").codec.encode(text)] for text in DOCUMENTS]
    code, out, _ = compare(
        ids[0], ids[1][:12], f"text:{DOCUMENTS[2]}", QUERY, "--store", store, "--b", "stored", "--json"
    )
    said = json.loads(out)
    assert code == 0 and said["sources_b"] == ["stored"] * 3
    assert [segment["tokens"] for segment in said["segments"]] == [*map(len, parts_of(loaded(folder, "decode")))]


def publish_wrong(served: Loaded, store: str, chunk: int, layer: int, kind: str, token: int) -> None:
    """KV of a chunk under its right key and with a right checksum, but with one wrong element."""
    *chunks, query = parts_of(served)
    taken: list[Any] = []

    def note(key: Any, token_ids: Any, pool: Any, run: Any) -> str:
        taken.append((key, pool, run))
        return "not there"

    trace_engine(served.served, chunks, query, ReuseMode.EXACT, load=note)
    keyed = key_composition(served.served.identity, chunks, ReuseMode.EXACT)[chunk]
    key, pool, run = taken[chunk]
    kv = [part.clone() for part in pool.run_planes(run, len(chunks[chunk]))]
    kv[2 * layer + "KV".index(kind)][token, 1, 5] -= 0.5
    header = EntryHeader(key, "c" * 64, served.served.identity, served.served.layout, keyed.token_ids, ())  # type: ignore[arg-type]
    with closing(open_store(store)) as opened:
        publication = opened.begin(key)
        assert not isinstance(publication, Stored | Busy)
        with publication:
            publication.write(header, [part.reshape(-1).view(torch.uint8).numpy().data.cast("B") for part in kv])
            publication.commit()


@pytest.mark.parametrize(("chunk", "layer", "kind", "token"), [(1, 1, "V", 11), (0, 2, "K", 3)])
@pytest.mark.parametrize("other", ["fresh:exact", "eager:exact"])
def test_one_wrong_stored_element_is_found(
    compare: Run, folder: Path, tmp_path: Path, chunk: int, layer: int, kind: str, token: int, other: str
) -> None:
    store = f"file://{tmp_path}/s"
    publish_wrong(loaded(folder, "decode"), store, chunk, layer, kind, token)
    code, out, _ = compare(*DOCUMENTS, QUERY, "--a", "stored", "--b", other, "--store", store, "--json")
    said = json.loads(out)
    assert code == 1 and said["sources_a"][chunk] == "stored"
    first = said["first"]
    assert (first["kind"], first["layer"]) == (kind, layer)
    assert first["token"] == sum(map(len, parts_of(loaded(folder, "decode"))[:chunk])) + token


def test_the_picture(compare: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the heat map")
    picture = tmp_path / "map.png"
    long = " ".join(DOCUMENTS) * 20  # more tokens than columns
    assert compare(long, QUERY, "--a", "independent", "--b", "exact", "--png", str(picture))[0] == 0
    assert compare(long, DOCUMENTS[0], QUERY, "--a", "independent", "--b", "exact", "--png", str(picture))[0] == 1
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000
    code, _, err = compare("a", "b", "--png", str(tmp_path / "no" / "folder.png"))
    assert code == 2 and "folder.png" in err


def test_a_picture_without_matplotlib(compare: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = compare("a", "b", "--png", str(tmp_path / "map.png"))
    assert code == 2 and "pip install 'cairn[plot]'" in err
    assert compare("a", "b")[0] == 0, "without a picture nothing is missing"


def test_a_bf16_model(folder: Path) -> None:
    served = load(ServiceOptions(model=str(folder), store="", dtype="bfloat16", prefill_tokens_max=64))
    found: Comparison = run_comparison(
        served.served, parts_of(served), (read_way("anchored"), read_way("eager:anchored"))
    )
    assert found.dtype == "bfloat16" and found.found.first(found.tolerance) is None
    assert found.found.first(0.0) is not None, "rounding shows at a tolerance of 0"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["a", "b", "--a", "fast"],
            "'fast' is not a way of answering; write fresh, stored, eager with :MODE, or a MODE",
        ),
        (["a", "b", "--a", "exact:exact"], "is not a way of answering"),
        (["a", "b", "--b", "eager:sideways"], "is not a way of answering"),
        ([], "give a query"),
        (["a", "--query", ""], "--query: holds no token"),
        (["@/nowhere", "b"], "cannot read /nowhere"),
        (["a", "b", "--tolerance", "nan"], "--tolerance: nan must be 0 or more"),
        (["a", "b", "--device", "tpu"], "--device: 'tpu' is not cpu, cuda or cuda:N"),
        (["a", "b", "--a", "stored", "--store", "file:///nowhere/at/all"], "holds no chunk store"),
        (["a" * 3000, "b"], "are more than exact has: 2048"),
    ],
)
def test_a_wrong_command_line_exits_with_2(compare: Run, argv: list[str], words: str) -> None:
    code, out, err = compare(*argv)
    assert (code, out) == (2, "")
    assert words in err and "Traceback" not in err
