"""What ``cairn up`` makes of settings: each reaches the services it is for, secrets not on their command lines."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cairn.local.processes import Command
from cairn.local.services import OF_THE_OTHER, Settings, flagged, in_one_process, service_commands, together_command
from decode_service import options as decode_options
from decode_service.options import DecodeOptions
from prefill_service import options as prefill_options
from prefill_service.options import PrefillOptions
from serving.process.options import ServiceOptions
from serving.process.settings import SWITCH, Setting, settings_of
from serving.process.sources import SettingError, Sources, add_flags
from tests.serving.process.test_sources import text_of, written

NAMES = ("prefill", "decode")
PREFILL = {each.name for each in settings_of(PrefillOptions)}
DECODE = {each.name for each in settings_of(DecodeOptions)}
SETTINGS = [each for each in flagged() if each.name in PREFILL | DECODE]


def flags(words: list[str]) -> dict[str, object]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, flagged(), NAMES)
    return vars(parser.parse_args(words))


def commands(settings: Settings) -> tuple[Command, Command]:
    return service_commands(settings.prefill.options, settings.decode.options)


def told(command: Command, monkeypatch: pytest.MonkeyPatch) -> ServiceOptions:
    """What the service reads that is started so."""
    parse = {"prefill": prefill_options.parse, "decode": decode_options.parse}[command.name]
    words = command.argv[command.argv.index("-m") + 2 :]
    with monkeypatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("CAIRN_")]:
            patch.delenv(name)
        for name, value in (command.environment or {}).items():
            patch.setenv(name, value)
        return parse(list(words))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
@pytest.mark.parametrize("source", ["flag", "variable", "file", "table"])
def test_each_setting_reaches_the_services_that_have_it(
    setting: Setting, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "flag" and setting.flagless:
        with pytest.raises(SettingError, match="no secret stands on a command line"):
            Settings.read(Sources.read({**flags([setting.flag, "x"]), "model": "m"}, {}))
        return
    (tmp_path / "other").touch()
    pair = {"tls_cert": "tls_key", "tls_key": "tls_cert"}.get(setting.name)
    given = {
        "model": "m",
        **({pair: str(tmp_path / "other")} if pair else {}),
        setting.name: text_of(setting, tmp_path),
    }
    services = [name for name, has in (("prefill", PREFILL), ("decode", DECODE)) if setting.name in has]
    words: list[str] = []
    environment: dict[str, str] = {}
    file: list[str] = []
    tables: dict[str, list[str]] = {"prefill": [], "decode": []}
    declared = {each.name: each for each in SETTINGS}
    for name, value in given.items():
        one = declared[name]
        if source == "flag":
            for prefix in NAMES if one.own else ("",):
                flag = f"--{prefix}-{one.flag[2:]}" if prefix else one.flag
                off = one.kind is SWITCH and value == "false"
                words += [one.flag_off if off else flag] if one.kind is SWITCH else [flag, value]
        elif source == "variable":
            environment |= {one.variables(service)[0]: value for service in services}
        elif source == "file":
            file.append(f"{name} = {written(one, value)}")
        else:
            for service in services:
                tables[service].append(f"{name} = {written(one, value)}")
    if source == "table" and len(services) == 1:
        tables[({*NAMES} - {*services}).pop()].append('model = "m"')
    lines = [*file, *(line for name in NAMES for line in (f"[{name}]", *tables[name]))]
    (tmp_path / "cairn.toml").write_text("\n".join(lines))
    settings = Settings.read(Sources.read({**flags(words), "config": tmp_path / "cairn.toml"}, environment))
    expected = setting.kind.parse(given[setting.name])
    for command, options in zip(commands(settings), (settings.prefill.options, settings.decode.options), strict=True):
        read = told(command, monkeypatch)
        if command.name in services:
            assert getattr(read, setting.name) == getattr(options, setting.name) == expected
        if command.name == "decode":
            assert isinstance(read, DecodeOptions) and read.prefill == commands_address(settings)
        reached = {each.name: getattr(options, each.name) for each in settings_of(type(options))}
        got = {name: getattr(read, name) for name in reached}
        for name in ("port", "metrics_port", *OF_THE_OTHER):
            reached.pop(name, None), got.pop(name, None)
        assert got == reached, "exactly what was asked for, whatever the environment of cairn up says"


def commands_address(settings: Settings) -> str:
    return f"{settings.prefill.options.host}:{settings.prefill.options.port}"


def test_what_was_overruled_does_not_reach_a_service_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag with the default's value goes before a variable, which the child must not see."""
    overruled = {"CAIRN_BATCH_MAX": "5", "CAIRN_DECODE_KV_PAGES": "5", "CAIRN_KV_PAGES": "6"}
    others = {"CAIRN_CONFIG": "/nowhere", "CAIRN_PREFILL": "elsewhere:1", "UNRELATED": "kept"}
    for name, value in {**overruled, **others}.items():
        monkeypatch.setenv(name, value)
    options = DecodeOptions(model="m", store="file:///s", prefill="")
    command = service_commands(PrefillOptions(model="m", store="file:///s"), options)[1]
    assert command.environment is not None and command.environment["UNRELATED"] == "kept"
    assert {name for name in command.environment if name.startswith("CAIRN_")} == {"CAIRN_STORE"}
    read = told(command, monkeypatch)
    assert isinstance(read, DecodeOptions)
    assert replace(read, port=0, metrics_port=0, prefill="") == options


def test_secrets_go_by_the_environment_and_are_not_shown() -> None:
    given = {"CAIRN_STORE": "redis://:hunter1@h", "CAIRN_STORE_PASSWORD": "hunter2", "CAIRN_MODEL": "m"}
    settings = Settings.read(Sources.read({}, given))
    for command in commands(settings):
        assert "hunter" not in " ".join(command.argv) + repr(command) + repr(settings)
        assert command.environment is not None
        assert (command.environment["CAIRN_STORE"], command.environment["CAIRN_STORE_PASSWORD"]) == (
            "redis://:hunter1@h",
            "hunter2",
        )


def test_a_table_goes_before_what_is_for_both_and_ports_have_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    both = 'model = "m"\ndevice = "cuda"\nthreads = 2\n'
    path.write_text(f'{both}[prefill]\ndevice = "cuda:1"\n[up]\nstart_timeout = "2m"\n')
    found = Settings.read(Sources.read({"config": path, "threads": "3"}, {}))
    prefill, decode = found.prefill.options, found.decode.options
    assert (prefill.device, decode.device, prefill.threads, decode.threads) == ("cuda:1", "cuda", 3, 3)
    assert (prefill.port, prefill.metrics_port, decode.port, decode.metrics_port) == (50071, 9471, 50072, 9472)
    assert found.up.options.start_timeout == 120 and prefill.store.endswith("/cairn/store")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ('[decode]\nprefill = "h:1"', "[decode] prefill: follows from the other settings where both services run"),
        ("[decode]\njobs_max = 5", "[decode] jobs_max: there is no such setting"),
        ("[up]\nstart_timeot = 5", "[up] start_timeot: there is no such setting; did you mean start_timeout?"),
        ("start_timeout = 5", "start_timeout: there is no such setting"),
        ("batch_maxx = 5", "batch_maxx: there is no such setting; did you mean batch_max?"),
        ("up = 5", "up: is the name of a table"),
        ('[up]\ntls_ca = "/nowhere"', "[up] tls_ca: belongs to --tls-cert and --tls-key"),
    ],
)
def test_what_the_file_says_wrong(file: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(file)
    with pytest.raises(SettingError) as caught:
        Settings.read(Sources.read({"config": path, "model": "m"}, {}))
    assert str(caught.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize(
    ("words", "together"),
    [
        ([], False),
        (["--no-separate"], True),
        (["--device", "cuda"], True),
        (["--device", "cuda:1", "--prefill-device", "cuda:1"], True),
        (["--device", "cuda", "--separate"], False),
        (["--prefill-device", "cuda:0", "--decode-device", "cuda:1"], False),
        (["--prefill-device", "cuda"], False),
    ],
)
def test_one_process_on_a_gpu_two_on_the_cpu_and_as_told(words: list[str], together: bool) -> None:
    settings = Settings.read(Sources.read(flags(words), {}))
    assert in_one_process(settings) == together
    device = dict(zip(words[::2], words[1::2], strict=False)).get("--device", "cpu")
    assert "--decode-device" in words or settings.decode.options.device == device


def test_one_process_cannot_have_two_models_or_stores(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[decode]\nthreads = 2\n")
    separate = {"config": path, "device": "cuda"}
    assert not in_one_process(Settings.read(Sources.read(separate, {})))
    with pytest.raises(SettingError, match=r"\[decode\] threads: differs between the two services"):
        in_one_process(Settings.read(Sources.read({**separate, "separate": False}, {})))


def test_one_process_is_told_what_both_are(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--prefill-kv-pages", "64", "--decode-kv-pages", "128", "--strict", "--no-hand-over", "--threads", "2"]
    given = {"CAIRN_STORE": "redis://:hunter1@h", "CAIRN_MODEL": "m"}
    settings = Settings.read(Sources.read(flags(words), given))
    prefill, decode = settings.prefill.options, settings.decode.options
    command = together_command(prefill, decode)
    assert "hunter" not in " ".join(command.argv) + repr(command)
    at = command.argv.index("-m") + 2
    between = command.argv.index("--", at)
    read = [
        told(replace(command, name=name, argv=("-m", "x", *part)), monkeypatch)
        for name, part in (("prefill", command.argv[at:between]), ("decode", command.argv[between + 1 :]))
    ]
    assert [place.name for place in command.places] == ["prefill", "decode"]
    assert replace(read[0], port=prefill.port, metrics_port=prefill.metrics_port) == prefill
    assert isinstance(read[1], DecodeOptions) and read[1].prefill == command.places[0].address
    assert replace(read[1], port=decode.port, metrics_port=decode.metrics_port, prefill="") == decode
