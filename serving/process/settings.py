"""What a setting is: one field of a frozen dataclass, and with it a flag, a variable and a key of a TOML file.

    kv_pages: int | None = setting(COUNT, "pages of the KV pool", default=None)

gives ``--kv-pages``, ``CAIRN_KV_PAGES``, ``kv_pages = ...`` and a line of docs/configuration.md; ``sources.py`` reads
them. Knows no service and imports nothing heavy: ``cairn up --help`` works where no service could run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from chunk_store.quantities import parse_nbytes, parse_seconds

GENERAL = "general"


@dataclass(frozen=True)
class Kind:
    """What values a setting takes: how help names one, how text becomes one, which types a file may give.

    ``parse`` raises ``ValueError`` that says what would be right.
    """

    metavar: str
    parse: Callable[[str], Any] = str
    toml: tuple[type, ...] = (str,)


@dataclass(frozen=True)
class Setting:
    """One declared setting. ``default`` is ``MISSING`` where a value must be given."""

    name: str
    default: Any
    kind: Kind
    help: str
    group: str  # its heading in help and document
    unset: str  # what is done where the default is None, for people
    own: bool  # each service of one machine has a value of its own
    apart: bool  # both services of one machine have one value, unless one of them is given another
    secret: bool  # never shown, and never on the command line of a service that `cairn up` starts
    flagless: bool  # never on a command line at all
    repeated: bool  # the flag may be repeated, a file may give a list

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def flag_off(self) -> str:
        """What takes a switch back."""
        return f"--no-{self.flag.removeprefix('--')}"

    @property
    def variable(self) -> str:
        return f"CAIRN_{self.name.upper()}"

    def variables(self, service: str) -> tuple[str, ...]:
        """The variables that ``service`` reads it from, the first one that is set."""
        own = (f"CAIRN_{service}_{self.name}".upper(),) if self.own or self.apart else ()
        return (*own, self.variable)

    @property
    def shown_default(self) -> str:
        """The default for people; "" where there is nothing to say."""
        if self.default is MISSING or self.unset or self.kind is SWITCH:
            return self.unset
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default or "")


def setting(
    kind: Kind,
    help: str,
    *,
    default: Any = MISSING,
    group: str = GENERAL,
    unset: str = "",
    own: bool = False,
    apart: bool = False,
    secret: bool = False,
    flagless: bool = False,
    repeated: bool = False,
) -> Any:
    """A dataclass field that is a setting; the arguments are those of ``Setting``."""
    declared = {"kind": kind, "help": help, "group": group, "unset": unset, "own": own, "secret": secret}
    metadata = {"setting": {**declared, "apart": apart, "flagless": flagless, "repeated": repeated}}
    return field(default=default, repr=not secret, metadata=metadata)


def settings_of(options: type) -> tuple[Setting, ...]:
    """What ``options`` declares, in its order."""
    return tuple(Setting(part.name, part.default, **part.metadata["setting"]) for part in fields(options))


def text(metavar: str) -> Kind:
    """Any text but an empty one."""

    def parse(words: str) -> str:
        if not words:
            raise ValueError("must not be empty")
        return words

    return Kind(metavar, parse)


def whole(at_least: int, at_most: int | None = None) -> Kind:
    """A whole number in these bounds, both included."""

    def parse(words: str) -> int:
        bounds = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        if not words.strip().lstrip("-").isdecimal() or int(words) < at_least or int(words) > (at_most or int(words)):
            raise ValueError(f"{words!r} is not a whole number {bounds}")
        return int(words)

    return Kind("N", parse, (int,))


def choice(*words: str) -> Kind:
    """One of ``words``."""

    def parse(given: str) -> str:
        if given not in words:
            raise ValueError(f"{given!r} is not one of {', '.join(words)}")
        return given

    return Kind(f"{{{','.join(words)}}}", parse)


def number(metavar: str, what: str, fits: Callable[[float], bool]) -> Kind:
    """A number that ``fits``; ``what`` says which do."""

    def parse(words: str) -> float:
        try:
            value = float(words)
        except ValueError:
            value = float("nan")
        if not fits(value):
            raise ValueError(f"{words!r} is not {what}")
        return value

    return Kind(metavar, parse, (int, float))


def or_zero(kind: Kind) -> Kind:
    """``kind``, and 0."""
    return Kind(kind.metavar, lambda words: 0 if words.strip() == "0" else kind.parse(words), kind.toml)


def parse_switch(words: str) -> bool:
    """On or off. Raises ``ValueError``."""
    known = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if words.lower() not in known:
        raise ValueError(f"{words!r} is neither true nor false")
    return known[words.lower()]


COUNT = whole(1)
PORT = whole(0, 65535)
SIZE = Kind("SIZE", parse_nbytes, (str, int))
SECONDS = Kind("DURATION", parse_seconds, (str, int, float))
DAYS = number("DAYS", "a number of days from 0 to 36500", lambda days: 0 <= days <= 36_500)
SHARE = number("SHARE", "a share between 0 and 1", lambda share: 0 < share < 1)
FILE = Kind("FILE", lambda words: Path(text("FILE").parse(words)))
SWITCH = Kind("", parse_switch, (bool,))
