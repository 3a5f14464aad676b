from __future__ import annotations

import pytest

from cairn.cli import main as cli


@pytest.fixture
def cairn(services, capsys, monkeypatch):
    """Run a command against the fakes: (exit code, standard output, standard error)."""
    monkeypatch.setenv("CAIRN_PREFILL", services.address)
    monkeypatch.setenv("CAIRN_DECODE", services.address)
    monkeypatch.delenv("CAIRN_TOKEN", raising=False)

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(argv)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
