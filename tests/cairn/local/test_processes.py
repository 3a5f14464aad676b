"""Children that announce themselves, end, or do not: small Python programs stand in for services."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable

import pytest

from cairn.local.processes import Command, Processes, ServiceFailed, _ready_event, free_port

READY = """import sys, time
print("words before", flush=True)
print('{"event": "ready", "port": 7}', flush=True)
print("beside", file=sys.stderr, flush=True)
time.sleep(60)
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def command(program: str, name: str = "prefill") -> Command:
    return Command(name, (sys.executable, "-c", program), "127.0.0.1:1")


def run(body: Callable[[Processes, list[tuple[str, str]]], Awaitable[None]]) -> None:
    async def main() -> None:
        lines: list[tuple[str, str]] = []
        processes = Processes(lambda name, line: lines.append((name, line)))
        try:
            await body(processes, lines)
        finally:
            processes.kill()
            await processes.stop(20.0)

    asyncio.run(asyncio.wait_for(main(), 60))


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.01)


def test_a_childs_lines_are_passed_on_but_its_ready_line() -> None:
    async def body(processes: Processes, lines: list[tuple[str, str]]) -> None:
        await processes.start([command(READY)])
        await until(lambda: not processes.not_ready() and len(lines) == 2)
        assert sorted(lines) == [("prefill", "beside"), ("prefill", "words before")]
        with pytest.raises(ServiceFailed, match=r"prefill were not ready within 0\.3 s; prefill: "):
            await processes.wait_ready(0.3)  # it is announced, and does not serve
        assert await processes.stop(20.0)

    run(body)


def test_a_service_may_be_called_otherwise_than_it_calls_itself() -> None:
    """Two of a kind are started side by side."""

    async def body(processes: Processes, lines: list[tuple[str, str]]) -> None:
        program = READY.replace('"ready", ', '"ready", "service": "decode", ')
        await processes.start([command(program, "decode"), command(program, "decode-2")])
        await until(lambda: not processes.not_ready())

    run(body)


def test_one_that_ends_says_how() -> None:
    async def body(processes: Processes, lines: list[tuple[str, str]]) -> None:
        await processes.start([command(READY, "decode"), command("print('no end', end=''); raise SystemExit(3)")])
        with pytest.raises(ServiceFailed, match="the prefill service ended with exit code 3"):
            await processes.wait_ready(30.0)
        await until(lambda: ("prefill", "no end") in lines)

    run(body)


def test_one_that_is_killed_says_by_what() -> None:
    async def body(processes: Processes, lines: list[tuple[str, str]]) -> None:
        await processes.start([command(READY)])
        ended = asyncio.create_task(processes.first_exit())
        await asyncio.sleep(0)
        processes.kill()
        assert await ended == "the prefill service was ended by SIGKILL"

    run(body)


def test_one_that_does_not_stop_is_killed_after_its_grace() -> None:
    async def body(processes: Processes, lines: list[tuple[str, str]]) -> None:
        await processes.start([command(STUBBORN)])
        await until(lambda: lines)
        assert not await processes.stop(0.1)
        assert await processes.stop(0.1), "nothing is left"

    run(body)


def test_a_command_that_cannot_be_executed_is_an_error_of_the_system() -> None:
    async def body(processes: Processes, lines: list[tuple[str, str]]) -> None:
        with pytest.raises(OSError):
            await processes.start([Command("prefill", ("/nowhere/at/all",), "127.0.0.1:1")])

    run(body)


@pytest.mark.parametrize("line", ["ready", "{", '{"event": "other"}', "", '["event"]'])
def test_other_lines_are_no_ready_line(line: str) -> None:
    assert _ready_event(line) is None


def test_a_free_port_is_one_to_listen_on() -> None:
    assert 20_000 <= free_port("127.0.0.1") < 65_536
