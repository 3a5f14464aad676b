"""docs/configuration.md: its table is what is declared, and its example is a file that everything reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cairn.local.services import Settings
from decode_service import options as decode_options
from prefill_service import options as prefill_options
from serving.process.sources import Sources
from tests.deploy.configured import DOCUMENT, HEAD, table


def test_the_table_is_up_to_date() -> None:
    _, head, after = DOCUMENT.read_text().partition(HEAD)
    documented = head + "".join(line for line in after.splitlines(keepends=True) if line.startswith("| "))
    assert documented == table(), "python -m tests.deploy.configured writes it anew"


def test_the_example_serves_both_services_and_cairn_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    path = tmp_path / "cairn.toml"
    path.write_text(example)
    (tmp_path / "tokens").write_text("stone\n")
    monkeypatch.chdir(tmp_path)
    prefill = prefill_options.parse(["--config", str(path)])
    decode = decode_options.parse(["--config", str(path), "--prefill", "127.0.0.1:50071"])
    assert (prefill.kv_pages, prefill.store_capacity, str(prefill.tenant_quota)) == (
        2048,
        10 << 30,
        "chunks=100 bytes=1073741824",
    )
    assert (decode.kv_pages, decode.batch_max, decode.strict, decode.store) == (8192, 16, True, "redis://10.0.0.5")
    found = Settings.read(Sources.read({}, {"CAIRN_CONFIG": str(path)}))
    assert (found.up.options.start_timeout, found.decode.options.batch_max) == (600, 16)
