"""Which token goes to the services, and from where."""

from __future__ import annotations


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
