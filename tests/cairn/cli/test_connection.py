"""Which token goes to the services, and from where."""

from __future__ import annotations

import argparse

import pytest

from cairn.cli.arguments import UsageError
from cairn.cli.connection import add_connection_flags, connection_options


def test_the_token_comes_from_the_environment_or_a_file(cairn, services, tmp_path, monkeypatch):
    monkeypatch.setenv("CAIRN_TOKEN", "from-environment")
    cairn("chunks", "list")
    assert services.script.metadata[-1]["authorization"] == "Bearer from-environment"
    file = tmp_path / "token"
    file.write_text("from-file\n")
    cairn("chunks", "list", "--token-file", str(file))
    assert services.script.metadata[-1]["authorization"] == "Bearer from-file"


def test_the_services_own_token_file_will_do(cairn, services, tmp_path):
    file = tmp_path / "tokens"
    file.write_text("# tenants\n\nstone red\nslate blue\n")
    cairn("chunks", "list", "--token-file", str(file))
    assert services.script.metadata[-1]["authorization"] == "Bearer stone"
    file.write_text("# nobody\n")
    code, _, err = cairn("chunks", "list", "--token-file", str(file))
    assert code == 2 and "holds no token" in err


def options(*words):
    parser = argparse.ArgumentParser()
    add_connection_flags(parser)
    return connection_options(parser.parse_args(words))


def test_flag_before_variable_before_file_before_default(tmp_path, monkeypatch):
    for name in ("PREFILL", "DECODE", "TOKEN", "TIMEOUT", "CONFIG"):
        monkeypatch.delenv(f"CAIRN_{name}", raising=False)
    assert (options().prefill, options().decode, options().timeout) == ("127.0.0.1:50071", "127.0.0.1:50072", 300)
    (tmp_path / "c.toml").write_text(
        'model = "m"\n[client]\nprefill = "file:1"\ntoken = "t1"\ntimeout = "2m"\n[up]\nx = 1\n'
    )
    monkeypatch.setenv("CAIRN_CONFIG", str(tmp_path / "c.toml"))
    assert (options().prefill, options().bearer(), options().timeout) == ("file:1", "t1", 120)
    monkeypatch.setenv("CAIRN_PREFILL", "variable:1")
    monkeypatch.setenv("CAIRN_TOKEN", "t2")
    assert (options().prefill, options().bearer()) == ("variable:1", "t2")
    assert options("--prefill", "flag:1").prefill == "flag:1"
    assert "t2" not in repr(options())


@pytest.mark.parametrize(
    ("words", "file", "said"),
    [
        (["--timeout", "0"], "", "--timeout: must be a positive number of seconds or a duration"),
        ([], "[client]\ntimeuot = 5", "c.toml: [client] timeuot: there is no such setting; did you mean timeout?"),
        ([], '[client]\ntls_ca = "/nowhere"', "c.toml: [client] tls_ca: cannot read /nowhere: No such file"),
        (["--token", "quartz7"], "", "--token: no secret stands on a command line; give CAIRN_TOKEN, or a file with"),
    ],
)
def test_an_error_names_where_the_setting_came_from(words, file, said, tmp_path):
    (tmp_path / "c.toml").write_text(file)
    with pytest.raises(UsageError) as caught:
        options("--config", str(tmp_path / "c.toml"), *words)
    assert said in str(caught.value) and "quartz7" not in str(caught.value)
