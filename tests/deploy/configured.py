"""Every setting of the services and of ``cairn up``: the table of docs/configuration.md, which a test compares.

To write the table anew: ``python -m tests.deploy.configured``.
"""

from __future__ import annotations

from dataclasses import MISSING
from pathlib import Path

from cairn.cli.connection import ConnectionOptions
from cairn.local.services import OF_THE_OTHER, PORTS, UpOptions
from decode_service.options import DecodeOptions
from gateway.options import GatewayOptions
from prefill_service.options import PrefillOptions
from serving.process.settings import SWITCH, Setting, settings_of
from serving.process.sources import ALONE

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "configuration.md"
HEAD = "| flag | variable | key | default | of | meaning |\n| --- | --- | --- | --- | --- | --- |\n"


def rows() -> list[str]:
    """A line for each setting: those of both services, of one, of ``cairn up``, of the client."""
    of = {
        "prefill": {each.name: each for each in settings_of(PrefillOptions)},
        "decode": {each.name: each for each in settings_of(DecodeOptions)},
        "up": {each.name: each for each in settings_of(UpOptions)},
        "client": {each.name: each for each in settings_of(ConnectionOptions)},
        "gateway": {each.name: each for each in settings_of(GatewayOptions)},
    }
    both = of["prefill"].keys() & of["decode"].keys()
    found = [row(each, "both") for each in of["prefill"].values() if each.name in both]
    for service, settings in of.items():
        who = {"up": "`cairn up`", "client": "commands that ask services", "gateway": "the gateway"}.get(
            service, service
        )
        key = f"[{service}] " if service in ALONE else ""
        found += [row(each, who, key) for each in settings.values() if key or each.name not in both]
    return found


def row(setting: Setting, who: str, key: str = "") -> str:
    flag = "" if setting.flagless else f"`{setting.flag}`"
    if setting.kind is not SWITCH and flag:
        flag = f"`{setting.flag} {setting.kind.metavar}`".replace("|", "\\|")
    ports = ", ".join(f"{PORTS[name][setting.name]} ({name})" for name in PORTS if setting.name in PORTS[name])
    default = "must be given" if setting.default is MISSING else setting.shown_default
    if setting.name == "store":
        default += "; `cairn up`: a directory below `~/.cache`"
    if ports and not key:
        default = f"any free one; `cairn up`: {ports}"
    if setting.own:
        who += ", each its own"
    if setting.apart:
        who += ", or each its own"
    if setting.name in OF_THE_OTHER and not key:
        who += "; `cairn up` knows it"
        key = "[decode] " if setting.name == "prefill" else key
    cells = (flag, f"`{setting.variable}`", f"`{key}{setting.name}`", default, who, setting.help)
    return f"| {' | '.join(cells)} |"


def table() -> str:
    return HEAD + "\n".join(rows()) + "\n"


def main() -> None:
    before, _, after = DOCUMENT.read_text().partition(HEAD)
    rest = "\n".join(line for line in after.splitlines() if not line.startswith("| "))
    DOCUMENT.write_text(before + table() + rest)


if __name__ == "__main__":
    main()
