"""A conversation whose turns are kept. Start both services first: cairn up --store file:///var/tmp/cairn

Each question names what was said before it as chunks, so that it computes its own tokens alone; so do another answer to
the same question, another question in its place, and a branch.
"""

from __future__ import annotations

import os
from pathlib import Path

from cairn import Client, Conversation, Result

HERE = Path(__file__).parent


def show(talk: Conversation, result: Result) -> None:
    turn, usage = talk.turns[-1], result.usage
    print(f"{turn.question}\n    {turn.answer.strip()}")
    print(f"    {usage.prompt_tokens} prompt tokens, {usage.computed_tokens} of them computed\n")


def run(client: Client) -> Conversation:
    """Asks, branches off and asks otherwise; the conversation that comes of it."""
    documents = [(HERE / "documents" / name).read_text("utf-8") for name in ("chronicle.txt", "crystalton.txt")]
    system = (HERE / "system.txt").read_text("utf-8").strip()
    talk = client.conversation(system, documents, document_role="document", max_tokens=32)
    show(talk, talk.ask("Who governs Wendolin?"))

    stream = talk.stream("Where is Crystalton located?")
    for delta in stream:
        print(delta.text, end="", flush=True)
    print()
    show(talk, stream.result)

    other = talk.branch()  # goes on from here, and leaves `talk` as it is
    show(other, other.edit(0, "What is Crystalton known for?"))
    show(talk, talk.retry(temperature=0.8, seed=1))  # another answer to the last question
    return talk


if __name__ == "__main__":
    prefill, decode = (
        os.environ.get("CAIRN_PREFILL", "127.0.0.1:50071"),
        os.environ.get("CAIRN_DECODE", "127.0.0.1:50072"),
    )
    with Client(prefill=prefill, decode=decode, token=os.environ.get("CAIRN_TOKEN")) as client:
        run(client)
