"""The gateway's page in a real browser, against real services with the shipped model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Request, Route, expect, sync_playwright

from cairn import Client
from tests.gateway.conftest import ROOT, Served

ANSWER = "Wendolin is ruled by Doctor Lisk."
CHRONICLE = (ROOT / "examples" / "documents" / "chronicle.txt").read_text()
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "a browser is needed: ./run test installs chromium"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1480, "height": 900})
    opened, said = context.new_page(), []
    opened.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("console", lambda message: said.append(message.text) if "Content Security" in message.text else None)
    strangers: list[str] = []
    root = served.url.removesuffix("/v1")

    def asked(request: Request) -> None:
        if not request.url.startswith((root, "data:")):
            strangers.append(request.url)

    opened.on("request", asked)
    opened.goto(root)
    yield opened
    assert said == [] and strangers == []
    context.close()


def let_in(page: Page, key: str) -> None:
    page.fill("#key", key)
    page.press("#key", "Tab")
    expect(page.locator("#model")).to_have_text("fable")


def parts(page: Page, mode: str) -> list[tuple[str, str]]:
    """Of an answer: names of the prompt's parts, and where their KV came from."""
    rows = page.locator(f"article[data-mode={mode}] tbody tr")
    cells = [row.locator("td").all_inner_texts() for row in rows.all()]
    return [(each[0], each[2].split(" ")[0]) for each in cells]


def ask(page: Page, modes: tuple[str, ...]) -> None:
    for mode in ("exact", "anchored", "independent"):
        page.set_checked(f"input[value={mode}]", mode in modes)
    page.press("#question", "Control+Enter")
    for mode in modes:
        expect(page.locator(f"article[data-mode={mode}][data-done=yes]")).to_be_visible()


def test_chunks_are_registered_ordered_and_asked_about_in_every_mode(page: Page, tmp_path: Path) -> None:
    let_in(page, "operator")
    page.click("summary")
    for name, text in (("page chronicle", CHRONICLE), ("page note", "The harbour is <b>closed</b> in winter.")):
        page.fill("#new-text", text)
        page.fill("#new-name", name)
        page.fill("#new-role", "document")
        page.click("#register")
        expect(page.locator("#known li", has_text=name)).to_be_visible()
        page.click(f"[aria-label='Add {name}']")
    names = page.locator("#picked .name")
    expect(names).to_have_text(["page chronicle", "page note"])
    page.click("#picked li:nth-child(2) .up")
    expect(names).to_have_text(["page note", "page chronicle"])
    page.drag_and_drop("#picked li:nth-child(1)", "#picked li:nth-child(2)")
    expect(names).to_have_text(["page chronicle", "page note"])

    page.fill("#question", "Who governs Wendolin?")
    ask(page, ("exact", "anchored", "independent"))
    expect(page.locator("article[data-mode=exact] .text")).to_have_text(ANSWER)
    expect(page.locator("article[data-mode=exact] .exactness")).to_have_text("exact context")
    expect(page.locator("article[data-mode=independent] .exactness")).to_have_text("exact block mask")
    ask(page, ("exact", "anchored", "independent"))
    page.screenshot(path=tmp_path / "page.png", full_page=True)  # what docs/images/page.png is
    found = dict(parts(page, "exact"))
    assert (found["page chronicle"], found["page note"], found["question"]) == ("device", "device", "computed")
    expect(page.locator("#picked li.device")).to_have_count(2)
    bars = page.locator("article[data-mode=exact] .parts i")
    assert "page chronicle" in bars.nth(1).get_attribute("title")
    expect(page.locator("#by-source-words")).to_contain_text("device")
    expect(page.locator("#pages-words")).to_contain_text("are free")
    expect(page.locator("#steps-words")).to_contain_text("a step instead of")

    page.check("#bypass")
    ask(page, ("exact",))
    assert {source for _, source in parts(page, "exact")} == {"computed"}
    expect(page.locator("article[data-mode=exact] .text")).to_have_text(ANSWER)


def test_what_goes_wrong_is_said_and_a_tenant_sees_its_own(page: Page, served: Served) -> None:
    expect(page.locator("#trouble")).to_contain_text("API key")
    let_in(page, "slate")
    expect(page.locator("#trouble")).to_be_hidden()
    expect(page.locator("#known li", has_text="chronicle")).to_have_count(0)
    expect(page.locator("#pages-words")).to_contain_text("not shown to this key")
    page.press("#question", "Control+Enter")
    expect(page.locator("#trouble")).to_contain_text("question")
    with Client(served.prefill, served.decode, token="slate") as tenant:
        gone = tenant.prefill("soon gone", name="soon gone")
        page.click("#reload")
        page.click("[aria-label='Add soon gone']")
        tenant.delete(gone)
    page.fill("#question", "Who?")
    page.click("#ask")
    expect(page.locator("article .text.failed")).to_contain_text("chunk")


def going_on(route: Route) -> None:
    """The request of an answer that does not end by itself."""
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))


def test_an_answer_is_stopped(page: Page) -> None:
    page.route("**/chat/completions", going_on)
    let_in(page, "stone")
    page.fill("#question", "Who governs Wendolin?")
    page.fill("#max-tokens", "4000")
    page.fill("#temperature", "2")
    page.click("#ask")
    expect(page.locator("article .text")).not_to_be_empty()
    page.click("#stop")
    expect(page.locator("#ask")).to_be_enabled()
    expect(page.locator("article .text")).to_contain_text(" — stopped")
