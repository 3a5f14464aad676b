"""Every metric that the services promise: the table of docs/metrics.md, which a test compares with real endpoints.

To write the table anew: ``python -m tests.deploy.exported PREFILL_METRICS_URL DECODE_METRICS_URL``.
"""

from __future__ import annotations

import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "metrics.md"
HEAD = "| metric | type | labels | of | meaning |\n| --- | --- | --- | --- | --- |\n"


@dataclass(frozen=True)
class Row:
    """One metric family: its name (a counter's with ``_total``), its labels without ``le``, who has it."""

    name: str
    type: str
    labels: frozenset[str]
    services: str
    meaning: str

    def __str__(self) -> str:
        labels = ", ".join(f"`{label}`" for label in sorted(self.labels))
        return f"| `{self.name}` | {self.type} | {labels} | {self.services} | {self.meaning} |"


def scraped(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as reply:
        text: str = reply.read().decode()
    return text


def rows_of(prefill: str, decode: str) -> list[Row]:
    """The rows of two scraped texts, in order of names; families that only count creation times are left out."""
    found: dict[str, tuple[str, frozenset[str], list[str], str]] = {}
    for service, text in (("prefill", prefill), ("decode", decode)):
        for family in text_string_to_metric_families(text):
            if family.name.endswith("_created"):
                continue
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = frozenset(label for sample in family.samples for label in sample.labels) - {"le"}
            services = [*(found[name][2] if name in found else []), service]
            found[name] = (family.type, labels, services, family.documentation)
    return [
        Row(name, kind, labels, " and ".join(services), meaning)
        for name, (kind, labels, services, meaning) in sorted(found.items())
    ]


def table(rows: list[Row]) -> str:
    return HEAD + "\n".join(map(str, rows)) + "\n"


def documented() -> list[Row]:
    """The rows of docs/metrics.md."""
    _, _, text = DOCUMENT.read_text().partition(HEAD)
    rows = []
    for line in text.splitlines():
        if not line.startswith("| `"):
            break
        name, kind, labels, services, meaning = (cell.strip() for cell in line.strip("|").split(" | "))
        rows.append(
            Row(name.strip("`"), kind, frozenset(labels.replace("`", "").split(", ")) - {""}, services, meaning)
        )
    return rows


def samples_of(rows: list[Row]) -> dict[str, set[str]]:
    """Names of samples, as queries use them, with their labels."""
    samples: dict[str, set[str]] = {}
    for row in rows:
        if row.type == "histogram":
            samples[f"{row.name}_bucket"] = {*row.labels, "le"}
            samples[f"{row.name}_sum"] = samples[f"{row.name}_count"] = set(row.labels)
        else:
            samples[row.name] = set(row.labels)
    return samples


def main(prefill_url: str, decode_url: str) -> None:
    before, _, after = DOCUMENT.read_text().partition(HEAD)
    rest = "\n".join(line for line in after.splitlines() if not line.startswith("| `"))
    DOCUMENT.write_text(before + table(rows_of(scraped(prefill_url), scraped(decode_url))) + rest)


if __name__ == "__main__":
    main(*sys.argv[1:])
