"""What an order of documents is worth, without a model: which prefixes of the trace ``rag`` would be computed anew.

    python -m bench.chunk_orders [--requests 1024] [--kept 128]

A prompt's documents are put in the order of a policy, and each prefix that is not kept is one document computed.
``--kept`` so many are kept at most, the least recently used go. The first eighth of the requests is not counted.
"""

from __future__ import annotations

import argparse
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations

from bench.traces import rag
from chunk_store.key import digest
from decode_service.prompt.order import use_level

Documents = Sequence[int]


@dataclass
class Known:
    """What a policy can ask of a store: uses, when each document was seen first, which prefixes are kept."""

    uses: Counter[int] = field(default_factory=Counter)
    first: dict[int, int] = field(default_factory=dict)
    contexts: Counter[int] = field(default_factory=Counter)
    prefixes: OrderedDict[tuple[int, ...], None] = field(default_factory=OrderedDict)


Policy = Callable[[Documents, Known], Documents]


def name(document: int) -> str:
    """As good as a chunk id."""
    return digest("bench.chunk_orders", [str(document).encode()])


def by_level(level: Callable[[Known, int], float]) -> Policy:
    """The highest level first, then by id."""
    return lambda documents, known: sorted(documents, key=lambda one: (-level(known, one), name(one)))


def longest_kept(documents: Documents, known: Known) -> Documents:
    """Whatever order has the longest prefix that is kept; what remains by use."""
    best: tuple[int, ...] = ()
    for length in range(len(documents), 0, -1):
        best = next((some for some in permutations(sorted(documents), length) if some in known.prefixes), ())
        if best:
            break
    rest = [one for one in documents if one not in best]
    return [*best, *sorted(rest, key=lambda one: (-known.uses[one], name(one)))]


POLICIES: dict[str, Policy] = {
    "as given": lambda documents, known: documents,
    "by id": by_level(lambda known, one: 0),
    "by true popularity": by_level(lambda known, one: -one),
    "least popular first": by_level(lambda known, one: one),
    "by uses": by_level(lambda known, one: known.uses[one]),
    "by uses in quarter octaves (canonical)": by_level(lambda known, one: use_level(known.uses[one])),
    "by uses in half octaves": by_level(lambda known, one: (known.uses[one] ** 2).bit_length()),
    "by uses in octaves": by_level(lambda known, one: known.uses[one].bit_length()),
    "by uses in steps of 16": by_level(lambda known, one: (known.uses[one].bit_length() + 3) // 4),
    "by number of contexts, octaves": by_level(lambda known, one: known.contexts[one].bit_length()),
    "first seen first": by_level(lambda known, one: -known.first.get(one, 1 << 30)),
    "longest kept prefix": longest_kept,
}


def computed(asked: Sequence[Documents], policy: Policy, kept: int | None = None) -> tuple[int, int]:
    """Documents computed, and all that were asked for, behind the warm-up."""
    known, anew, total = Known(), 0, 0
    for number, documents in enumerate(asked):
        prefix: tuple[int, ...] = ()
        counts = number >= len(asked) // 8
        for document in policy(documents, known):
            prefix += (document,)
            total += counts
            if prefix not in known.prefixes:
                anew += counts
                known.contexts[document] += 1
            known.prefixes[prefix] = None
            known.prefixes.move_to_end(prefix)
            if kept is not None and len(known.prefixes) > kept:
                known.prefixes.popitem(last=False)
        known.uses.update(documents)
        for document in documents:
            known.first.setdefault(document, len(known.first))
    return anew, total


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--kept", type=int, help="prefixes at most (default: all)")
    args = parser.parse_args(argv)
    trace = rag(1.0, args.requests / 128)
    asked = [session[0].documents[trace.systems :] for session in trace.sessions]
    for words, policy in POLICIES.items():
        anew, total = computed(asked, policy, args.kept)
        print(f"{words:40s} {anew:6d} of {total} documents computed, {anew / total:.1%}")


if __name__ == "__main__":
    main()
