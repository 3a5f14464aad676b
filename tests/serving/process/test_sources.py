"""Every setting from every source: flag, variable, file; which goes first, and what an error says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decode_service import options as decode_options
from decode_service.options import DecodeOptions
from prefill_service import options as prefill_options
from prefill_service.options import PrefillOptions
from serving.process.options import ModelOptions, ServiceOptions, StoreOptions
from serving.process.settings import DAYS, FILE, SECONDS, SHARE, SIZE, SWITCH, Setting, settings_of
from serving.process.sources import Sources, resolve

REQUIRED = {"store": "file:///s", "model": "m", "prefill": "h:1"}
PARSE: dict[str, Callable[[list[str]], ServiceOptions]] = {
    "prefill": prefill_options.parse,
    "decode": decode_options.parse,
}
EACH = [
    pytest.param(service, setting, id=f"{service}-{setting.name}")
    for service, options in (("prefill", PrefillOptions), ("decode", DecodeOptions))
    for setting in settings_of(options)
]
OTHER = {
    **{"device": "cuda:1", "dtype": "float32", "attention": "torch", "tenant_quota": "jobs=3"},
    **{"log_level": "debug", "log_format": "json"},
}
UNITS = {SIZE: "3MiB", SECONDS: "2m", DAYS: "1.5", SHARE: "0.25"}


def text_of(setting: Setting, folder: Path) -> str:
    """A text for ``setting`` that does not stand for its default."""
    if setting.kind is FILE:
        (folder / setting.name).write_text("quartz7\n")
        return str(folder / setting.name)
    if setting.kind is SWITCH:
        return str(not setting.default).lower()
    if setting.kind in UNITS or setting.name in OTHER:
        return UNITS.get(setting.kind) or OTHER[setting.name]
    return {"SIZE": "3MiB", "DURATION": "2m", "N": "7"}.get(setting.kind.metavar, "127.0.0.9")


def written(setting: Setting, text: str) -> str:
    """The text as a TOML value, of the setting's own type."""
    if setting.kind.toml[0] in (int, float):
        return text
    return text if setting.kind is SWITCH else f'"{text}"'


def flags(setting: Setting, text: str) -> list[str]:
    """The words of a command line that say so."""
    if setting.kind is SWITCH:
        return [setting.flag if text == "true" else setting.flag_off]
    return [setting.flag, text]


@pytest.mark.parametrize(("service", "setting"), EACH)
def test_each_setting_from_each_source(
    service: str, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_of(setting, tmp_path)
    expected = setting.kind.parse(text)
    assert expected != setting.default
    given = {**REQUIRED, setting.name: text}
    if setting.name in ("tls_cert", "tls_key"):
        other = {"tls_cert": "tls_key", "tls_key": "tls_cert"}[setting.name]
        (tmp_path / other).touch()
        given[other] = str(tmp_path / other)
    declared = {each.name: each for each in settings_of({"prefill": PrefillOptions, "decode": DecodeOptions}[service])}
    given = {name: value for name, value in given.items() if name in declared}

    def told(words: list[str]) -> Any:
        return getattr(PARSE[service](words), setting.name)

    if not setting.flagless:
        words = [word for name, value in given.items() for word in flags(declared[name], value)]
        assert told(words) == expected
    for prefix in ("", f"{service.upper()}_") if setting.own else ("",):
        with monkeypatch.context() as patch:
            for name, value in given.items():
                patch.setenv(
                    f"CAIRN_{prefix}{name}".upper() if name == setting.name else f"CAIRN_{name}".upper(), value
                )
            assert told([]) == expected
    lines = [f"{name} = {written(declared[name], value)}" for name, value in given.items() if name != "prefill"]
    for place, table in ((lines, []), ([], lines)):
        reference = [f'prefill = "{given["prefill"]}"'] if "prefill" in given else []
        (tmp_path / "cairn.toml").write_text(
            "\n".join([*place, f"[{service}]", *table, *reference]) + "\n[up]\nx = 1\n"
        )
        assert told(["--config", str(tmp_path / "cairn.toml")]) == expected


def test_flag_before_variable_before_file_before_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cairn.toml"
    file.write_text("threads = 2\nport = 2\n[prefill]\nport = 3\n[decode]\nport = 99\n")
    base = ["--model", "m", "--store", "file:///s"]
    assert PARSE["prefill"](base).threads == 1
    monkeypatch.setenv("CAIRN_CONFIG", str(file))
    assert (PARSE["prefill"](base).threads, PARSE["prefill"](base).port) == (2, 3)
    for variable, port in (("CAIRN_PORT", 4), ("CAIRN_PREFILL_PORT", 5)):
        monkeypatch.setenv(variable, str(port))
        assert PARSE["prefill"](base).port == port
    monkeypatch.setenv("CAIRN_THREADS", "3")
    assert PARSE["prefill"](base).threads == 3
    assert PARSE["prefill"]([*base, "--threads", "4", "--port", "6"]).threads == 4
    assert PARSE["prefill"]([*base, "--threads", "4", "--port", "6"]).port == 6
    monkeypatch.setenv("CAIRN_THREADS", "")
    assert PARSE["prefill"](base).threads == 2, "an empty variable is none"
    other = tmp_path / "other.toml"
    other.write_text("")
    assert PARSE["prefill"]([*base, "--config", str(other)]).threads == 1, "the flag names the file before the variable"


def test_a_switch_can_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["--model", "m", "--store", "file:///s", "--prefill", "h:1"]
    monkeypatch.setenv("CAIRN_STRICT", "on")
    assert decode_options.parse(base).strict and not decode_options.parse([*base, "--no-strict"]).strict


@pytest.mark.parametrize(
    ("words", "variables", "file", "said"),
    [
        ([], {}, "", "--model: is required; give it, or CAIRN_MODEL, or model in the file of --config"),
        (["--threads", "0"], {}, "", "--threads: '0' is not a whole number of at least 1"),
        ([], {"CAIRN_THREADS": "many"}, "", "CAIRN_THREADS: 'many' is not a whole number of at least 1"),
        ([], {"CAIRN_PREFILL_PORT": "tcp://10.0.0.1:2"}, "", "CAIRN_PREFILL_PORT: 'tcp://10.0.0.1:2' is not a whole"),
        ([], {}, "threads = 0", "cairn.toml: threads: '0' is not a whole number of at least 1"),
        ([], {}, "[prefill]\nport = 70000", "cairn.toml: [prefill] port: '70000' is not a whole number from 0 to"),
        ([], {}, "threads = true", "cairn.toml: threads: must be a number"),
        ([], {}, "model = 5", "cairn.toml: model: must be a text in quotes"),
        ([], {}, "insecure = 1", "cairn.toml: insecure: must be true or false"),
        ([], {}, "threads = [1]", "cairn.toml: threads: must be a number"),
        ([], {}, "kv-pages = 5", "cairn.toml: kv-pages: there is no such setting; did you mean kv_pages?"),
        ([], {}, "[prefill]\njob_max = 5", "[prefill] job_max: there is no such setting; did you mean jobs_max?"),
        ([], {}, "[prefil]\njobs_max = 5", "cairn.toml: prefil: there is no such setting; did you mean prefill?"),
        ([], {}, "chunk_page_ratio = 0.5", "stand under [prefill] or [decode]"),
        ([], {}, "zzz = 5", "cairn.toml: zzz: there is no such setting; docs/configuration.md lists the settings"),
        ([], {}, 'prefill = "h:1"', "cairn.toml: prefill: is the name of a table"),
        ([], {}, "threads = = 1", "cairn.toml is not TOML: "),
        (["--config", "/nowhere.toml"], {}, "", "--config: cannot read /nowhere.toml: No such file"),
        ([], {"CAIRN_CONFIG": "/nowhere.toml"}, "", "CAIRN_CONFIG: cannot read /nowhere.toml: No such file"),
        ([], {"CAIRN_TOKEN_FILE": "/nowhere"}, "", "CAIRN_TOKEN_FILE: cannot read /nowhere: No such file"),
        ([], {}, 'token_file = "/nowhere"', "cairn.toml: token_file: cannot read /nowhere: No such file"),
        ([], {"CAIRN_TLS_CERT": "/c"}, "", "CAIRN_TLS_CERT: --tls-cert and --tls-key: give both or neither"),
        ([], {}, 'host = "0.0.0.0"', "cairn.toml: host: 0.0.0.0 is reached from other machines"),
        ([], {"CAIRN_TENANT_QUOTA": "chunks=x"}, "", "CAIRN_TENANT_QUOTA: chunks: "),
        (
            [],
            {"CAIRN_STORE_CAPACITY": "lots"},
            "",
            "CAIRN_STORE_CAPACITY: 'lots' is not a size; write for example 10GiB",
        ),
        ([], {"CAIRN_DRAIN_S": "soon"}, "", "CAIRN_DRAIN_S: must be a positive number of seconds or a duration"),
        (
            [],
            {"CAIRN_STORE_PASSWORD_FILE": "/dev/null"},
            "",
            "CAIRN_STORE_PASSWORD_FILE: '/dev/null' begins with an empty",
        ),
        (["--threads"], {}, "", "--threads: expected one argument"),
        (["--store-password", "hunter2"], {}, "", "--store-password: no secret stands on a command line; give"),
        (["--store-password=hunter2"], {}, "", "give CAIRN_STORE_PASSWORD, or a file with --store-password-file"),
    ],
)
def test_an_error_names_the_source_and_the_remedy(
    words: list[str],
    variables: dict[str, str],
    file: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    required = {} if "--model: is required" in said else {"CAIRN_MODEL": "m"}
    for name, value in {"CAIRN_STORE": "file:///s", **required, **variables}.items():
        if f"{name.removeprefix('CAIRN_').lower()} =" not in file:
            monkeypatch.setenv(name, value)
    if file:
        (tmp_path / "cairn.toml").write_text(file)
        words = ["--config", "cairn.toml", *words]
    with pytest.raises(SystemExit) as ended:
        prefill_options.parse(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error and "hunter2" not in error


def test_two_places_for_one_secret_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret").write_text("quartz7\n")
    monkeypatch.setenv("CAIRN_STORE_PASSWORD", "hunter2")
    monkeypatch.setenv("CAIRN_PREFILL_TOKEN", "hunter3")
    base = ["--model", "m", "--store", "redis://h", "--prefill", "h:1"]
    found = decode_options.parse(base)
    assert (found.password(), found.token_for_prefill()) == ("hunter2", "hunter3")
    for flag in ("--store-password-file", "--prefill-token-file"):
        with pytest.raises(SystemExit):
            decode_options.parse([*base, flag, str(tmp_path / "secret")])
        error = capsys.readouterr().err
        assert "are both set; set one of them" in error and "hunter" not in error and "quartz7" not in error
    monkeypatch.delenv("CAIRN_STORE_PASSWORD")
    assert decode_options.parse([*base, "--store-password-file", str(tmp_path / "secret")]).password() == "quartz7"


def test_nothing_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"CAIRN_STORE": "redis://:hunter1@h", "CAIRN_STORE_PASSWORD": "hunter2", "CAIRN_PREFILL_TOKEN": "hunter3"}
    sources = Sources.read({"model": "m", "prefill": "h:1"}, secrets)
    found = resolve(DecodeOptions, "decode", sources)
    assert found.options.prefill_token == "hunter3"
    assert "hunter" not in repr(found) + repr(sources) + str(found.options)


@pytest.mark.parametrize("options", [StoreOptions, ModelOptions])
def test_a_command_that_is_no_service_reads_what_is_for_all(options: type[StoreOptions], tmp_path: Path) -> None:
    path = tmp_path / "cairn.toml"
    path.write_text(
        'store = "file:///the/store"\nmodel = "m"\n[prefill]\nstore = "file:///another"\n[up]\nmodel = "x"\n'
    )
    found = resolve(options, "", Sources.read({"config": path}, {"CAIRN_STORE_PASSWORD": "quartz7"})).options
    assert (found.store, found.password()) == ("file:///the/store", "quartz7")
