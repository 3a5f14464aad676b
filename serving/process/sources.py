"""Where settings come from: flags, then the environment, then a TOML file, then the default.

Every error names the flag, the variable, or the file and the key that the value came from. An empty variable is none.

    model = "models/fable"      # of every service that reads the file
    [decode]                    # of the decode service alone
    batch_max = 8
"""

from __future__ import annotations

import argparse
import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from serving.process.settings import FILE, GENERAL, SWITCH, Setting, settings_of

CONFIG_VARIABLE = "CAIRN_CONFIG"
TABLES = ("prefill", "decode", "up", "client", "gateway")
ALONE = ("up", "client", "gateway")  # what stands above the tables is not for these
EPILOG = (
    "Each option is also a variable (CAIRN_KV_PAGES for --kv-pages) and a key of the TOML file that --config names "
    "(kv_pages); a flag goes before a variable, a variable before the file. docs/configuration.md lists them all."
)
_TOML_WORDS = {str: "a text in quotes", int: "a number", float: "a number", bool: "true or false"}

Options = TypeVar("Options")


class SettingError(ValueError):
    """A setting that cannot be used; says where it came from and what would be right."""


@dataclass(frozen=True)
class Given:
    """The text of a setting's value and where it came from."""

    text: str = field(repr=False)
    source: str


@dataclass(frozen=True)
class Resolved(Generic[Options]):
    """Options, and for each that was given where its value came from."""

    options: Options
    sources: Mapping[str, str]

    def about(self, name: str, words: str) -> str:
        """An error about the option ``name``: where its value came from, or else its flag, and ``words``."""
        source = self.sources.get(name) or f"--{name.replace('_', '-')}"
        return words if words.startswith(f"{source} ") else f"{source}: {words}"

    def check_files(self) -> None:
        """Raises ``SettingError`` for a file that cannot be read."""
        for setting in settings_of(type(self.options)):
            path = getattr(self.options, setting.name)
            if setting.kind is FILE and path is not None:
                try:
                    path.open("rb").close()
                except OSError as error:
                    words = f"cannot read {path}: {error.strerror or error}"
                    raise SettingError(self.about(setting.name, words)) from error


@dataclass(frozen=True)
class Sources:
    """All that was given. ``flags`` are by name, in `cairn up` with the service's name before a service's own."""

    flags: Mapping[str, Any]
    environment: Mapping[str, str] = field(repr=False)
    path: Path | None = None
    file: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Sources:
        """Parsed flags, the environment, and the file that one of them names. Raises ``SettingError``."""
        named, source = flags.get("config"), "--config"
        if named is None and environment.get(CONFIG_VARIABLE):
            named, source = Path(environment[CONFIG_VARIABLE]), CONFIG_VARIABLE
        if named is None:
            return cls(flags, environment)
        try:
            return cls(flags, environment, named, tomllib.loads(named.read_text(encoding="utf-8")))
        except OSError as error:
            raise SettingError(f"{source}: cannot read {named}: {error.strerror or error}") from error
        except ValueError as error:
            raise SettingError(f"{source}: {named} is not TOML: {error}") from error

    def check_keys(self, known: Mapping[str, Iterable[Setting]]) -> None:
        """Raises ``SettingError`` for a key that nobody reads; ``known`` has the settings of each service.

        The table of a service that is not in ``known`` is that service's affair.
        """
        names = {service: {setting.name for setting in settings} for service, settings in known.items()}
        everywhere = {name for service in names if service not in ALONE for name in names[service]}
        for key, value in self.file.items():
            if key not in TABLES:
                self._check_key(key, everywhere and everywhere | {*TABLES}, "")
            elif not isinstance(value, dict):
                raise SettingError(
                    f"{self.path}: {key}: is the name of a table; what is the {key} service's own, and a setting of "
                    f"this name, stand under [prefill] or [decode]"
                )
            else:
                for inner in value if key in names else ():
                    self._check_key(inner, names[key], f"[{key}] ")

    def _check_key(self, key: str, known: set[str], table: str) -> None:
        if key in known or not known:  # nobody's: what is above the tables is not for who reads the file now
            return
        near = difflib.get_close_matches(key.replace("-", "_").lower(), known, n=1)
        remedy = f"did you mean {near[0]}?" if near else "docs/configuration.md lists the settings"
        if not table and not near:
            remedy += "; those of one service stand under [prefill] or [decode]"
        raise SettingError(f"{self.path}: {table}{key}: there is no such setting; {remedy}")

    def given(self, setting: Setting, service: str) -> Given | None:
        """The first text there is for a setting of ``service``. Raises ``SettingError`` for a file's wrong type."""
        one_by_one = setting.own or setting.apart
        for flag in (f"{service}_{setting.name}", setting.name) if one_by_one else (setting.name,):
            value = self.flags.get(flag)
            if value is not None and setting.flagless:
                remedy = f"give {setting.variable}, or a file with {setting.flag}-file"
                raise SettingError(f"{setting.flag}: no secret stands on a command line; {remedy}")
            if value is not None and value != []:
                return Given(_joined(value), f"--{flag.replace('_', '-')}")
        for variable in setting.variables(service):
            if self.environment.get(variable):
                return Given(self.environment[variable], variable)
        own = self.file.get(service, {}) if service in TABLES else {}
        for table, where in ((own, f"[{service}] "), (self.file, "")):
            if setting.name in table and (table is own or (service not in ALONE and setting.name not in TABLES)):
                source = f"{self.path}: {where}{setting.name}"
                return Given(_joined(_typed(setting, table[setting.name], source)), source)
        return None


def resolve(
    options: type[Options],
    service: str,
    sources: Sources,
    *,
    defaults: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> Resolved[Options]:
    """The options of ``service``. ``defaults`` go before the declared ones; nobody may choose what is ``fixed``.

    Raises ``SettingError``.
    """
    values, found = {**(defaults or {})}, {}
    for setting in settings_of(options):
        if setting.name in (fixed or {}):
            if setting.name in sources.file.get(service, {}):
                where = f"{sources.path}: [{service}] {setting.name}"
                raise SettingError(f"{where}: follows from the other settings where both services run; leave it out")
            continue
        given = sources.given(setting, service)
        if given is not None:
            values[setting.name], found[setting.name] = parsed(setting, given), given.source
        elif setting.default is MISSING and setting.name not in values:
            remedy = f"give it, or {setting.variable}, or {setting.name} in the file of --config"
            raise SettingError(f"{setting.flag}: is required; {remedy}")
    return Resolved(options(**{**values, **(fixed or {})}), found)


def parsed(setting: Setting, given: Given) -> Any:
    """The value that was given. Raises ``SettingError``."""
    try:
        return setting.kind.parse(given.text)
    except ValueError as error:
        raise SettingError(f"{given.source}: {error}") from None


def add_flags(parser: argparse.ArgumentParser, settings: Iterable[Setting], services: Sequence[str] = ()) -> None:
    """``--config``, and a flag for each setting that may have one: with ``own`` one for each of ``services``, with
    ``apart`` these beside it."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of settings (CAIRN_CONFIG)")
    groups: dict[str, Any] = {GENERAL: parser}
    for setting in settings:
        if setting.flagless:  # known, to be refused without showing what was given
            parser.add_argument(setting.flag, nargs="?", const="", help=argparse.SUPPRESS)
            continue
        group = groups.get(setting.group) or groups.setdefault(setting.group, parser.add_argument_group(setting.group))
        words = f"{setting.help} (default {setting.shown_default})" if setting.shown_default else setting.help
        action: dict[str, Any] = {"metavar": setting.kind.metavar, "action": "append" if setting.repeated else "store"}
        if setting.kind is SWITCH:
            action = {"action": argparse.BooleanOptionalAction}
        named = services if setting.own and services else ("", *services) if setting.apart else ("",)
        for service in named:
            flag = f"--{service}-{setting.flag[2:]}" if service else setting.flag
            group.add_argument(flag, help=words.replace("%", "%%"), default=None, **action)


def _joined(value: Any) -> str:
    """Text of what a flag or a file gave: of a list its members, in order."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _typed(setting: Setting, value: Any, source: str) -> Any:
    """A file's value, if it is of a type that the setting takes. Raises ``SettingError``, which does not show it."""
    members = value if isinstance(value, list) and setting.repeated else [value]
    for member in members:
        if type(member) not in (*setting.kind.toml, str):
            words = " or ".join(dict.fromkeys(_TOML_WORDS[kind] for kind in setting.kind.toml))
            raise SettingError(f"{source}: must be {words}")
    return value
