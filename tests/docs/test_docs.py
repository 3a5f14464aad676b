"""Every command and every piece of code in the pages for application people runs, and prints what they say.

In a page blocks of one language go on from each other; a block of ``text`` is what the block before it prints, with
"..." for what differs.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = ("getting-started.md", "chat.md", "http-api.md", "sampling.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
MARK = "-- next block --"
# What a reader of a page has at hand when its first block begins.
BEFORE = {
    "sampling.md": """
from cairn import Client
client = Client(prefill="127.0.0.1:50071", decode="127.0.0.1:50072")
report = client.prefill(open("examples/documents/chronicle.txt").read(), role="document")
"""
}


@dataclass(frozen=True)
class Block:
    """One of a page; ``prints`` is what stands behind it."""

    language: str
    code: str
    prints: str


@dataclass(frozen=True)
class Up:
    """The services of the first page, and where a reader works."""

    prefill: str
    decode: str
    url: str
    folder: Path

    def placed(self, code: str) -> str:
        """Code with the addresses that the services have here."""
        placed = code.replace("127.0.0.1:50071", self.prefill).replace("127.0.0.1:50072", self.decode)
        return placed.replace("http://127.0.0.1:8080", self.url)


def blocks(page: str) -> list[Block]:
    found = [*BLOCK.findall((DOCS / page).read_text()), ("", "")]
    return [
        Block(language, code, after[1] if after[0] == "text" else "")
        for (language, code), after in itertools.pairwise(found)
        if language != "text"
    ]


def fits(printed: str, expected: str) -> bool:
    """Whether ``printed`` begins as expected, with anything for each "..."."""
    pattern = re.escape(expected.strip()).replace(re.escape("..."), ".*")
    return re.match(pattern, printed.strip(), re.S) is not None


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """What the first block of the first page starts, at free ports and with a store of the test's."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples").symlink_to(ROOT / "examples")
    start = blocks("getting-started.md")[0].code.replace("/var/tmp/cairn", str(folder / "store"))
    words = shlex.split(start.replace("--http-port 8080", "--http-port 0"))
    assert words[:2] == ["cairn", "up"]
    argv = [sys.executable, "-m", "cairn.cli", *words[1:], "--json", "--dtype", "float32"]
    for port in ("--prefill-port", "--decode-port", "--prefill-metrics-port", "--decode-metrics-port"):
        argv += [port, "0"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
    ready = json.loads(process.stdout.readline() or "{}")
    assert ready.get("event") == "ready", (folder / "log").read_text()[-3000:]
    url = ready["gateway"]["url"].removesuffix("/v1")
    yield Up(ready["prefill"]["address"], ready["decode"]["address"], url, folder)
    process.terminate()
    process.communicate(timeout=120)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_prints_what_it_says(up: Up, page: str) -> None:
    code = [block for block in blocks(page) if block.language == "python"]
    assert code
    script = BEFORE.get(page, "") + f"\nprint({MARK!r})\n".join(block.code for block in code)
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-W", "ignore::ResourceWarning", "-c", up.placed(script)]
    done = subprocess.run(argv, cwd=up.folder, env=path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.split(f"{MARK}\n")
    for block, words in zip(code, printed, strict=True):
        assert fits(words, block.prints), f"{block.code}\nprints\n{words}\nnot\n{block.prints}"


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(up: Up, page: str) -> None:
    tools = up.folder / "bin"
    tools.mkdir(exist_ok=True)
    cairn = tools / "cairn"
    runs = f"PYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} -m cairn.cli"
    cairn.write_text(f'#!/bin/sh\n{runs} "$@"\n')
    cairn.chmod(0o755)
    found = {**os.environ, "CAIRN_PREFILL": up.prefill, "CAIRN_DECODE": up.decode}
    found["PATH"] = f"{tools}:{os.environ['PATH']}"
    for block in blocks(page):
        if block.language != "sh" or block.code.startswith("cairn up"):
            continue
        assert shutil.which("curl") or "curl" not in block.code, "curl is needed: ./run test installs it"
        argv = ["sh", "-ec", up.placed(block.code)]
        done = subprocess.run(argv, cwd=up.folder, env=found, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        assert '"error"' not in done.stdout and fits(done.stdout, block.prints), done.stdout


def parameters(heading: str) -> list[tuple[str, Any]]:
    """Names and example values of a table of the page on HTTP."""
    text = (DOCS / "http-api.md").read_text()
    table = text[text.index(f"| {heading} |") :].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, re.M)
    return [(name, json.loads(value)) for name, value in rows]


def test_every_parameter_that_is_said_to_be_served_is_and_the_others_are_refused_by_name(up: Up) -> None:
    served, refused = parameters("served"), parameters("refused")
    assert len(served) > 20 and len(refused) > 5
    client = openai.OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "fable", "messages": [{"role": "user", "content": "Who?"}]}
    for name, value in served:
        body = {**asked, "max_completion_tokens": 3, name: value}
        if name == "response_format":
            body["max_completion_tokens"] = 30
        kept = {key: body.pop(key) for key in ("model", "messages")}
        client.chat.completions.create(**kept, extra_body=body)
    for name, value in refused:
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**asked, extra_body={name: value})
        assert error.value.param == name
