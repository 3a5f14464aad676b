"""Stories: invented facts in documents, questions about them, and the answers.

A story is text only. `encode` turns it into token ids with, per token, the segment it belongs to (so
that a block mask can be built) and what the training loss does with it. Everything is drawn from the
`random.Random` that is handed in; nothing here knows a model.
"""

import random
from dataclasses import dataclass

from models.training.language import FILLERS, LEADS, PLAIN, RELATIONS, STYLES, TITLES, Relation, after, styled
from models.training.names import TRAIN, Namer

IGNORED, IN_DOCUMENT, IN_ANSWER = 0, 1, 2
TAIL = 255  # the segment of the question and the answer; the system turn is 0, documents count from 1
END = "<end>"


@dataclass(frozen=True)
class Fact:
    relation: Relation
    entity: str
    value: str

    def core(self) -> str:
        """The sentence that an answer restates."""
        return self.relation.core.format(e=self.entity, v=self.value)

    def statement(self, rng: random.Random) -> str:
        """The fact as a document says it: mostly the core sentence, sometimes another one, or a lead."""
        form = self.relation.core if rng.random() < 0.7 else rng.choice(self.relation.others)
        lead = rng.choice(LEADS) if rng.random() < 0.15 else ""
        return after(lead, form.format(e=self.entity, v=self.value))

    def question(self, rng: random.Random) -> str:
        return rng.choice(self.relation.questions).format(e=self.entity)


@dataclass(frozen=True)
class Shape:
    """How large a story is: documents, facts in all, filler sentences in all, questions."""

    documents: int
    facts: int
    fillers: int
    questions: int = 1


@dataclass(frozen=True)
class Story:
    system: str | None
    documents: tuple[str, ...]
    exchanges: tuple[tuple[str, str], ...]

    def messages(self) -> list[dict[str, str]]:
        """The conversation as a chat template takes it."""
        turns = [("system", self.system)] if self.system is not None else []
        turns += [("document", text) for text in self.documents]
        for question, answer in self.exchanges:
            turns += [("user", question), ("assistant", answer)]
        return [{"role": role, "content": content} for role, content in turns]


@dataclass(frozen=True)
class Encoded:
    """Token ids and, beside each, its segment and its part in the loss."""

    ids: list[int]
    segments: list[int]
    parts: list[int]


def _entities(namer: Namer, facts: int) -> list[tuple[str, str]]:
    """(kind, name) pairs, so many that each gets a few facts; some names begin alike."""
    rng = namer.rng
    count = max(1, round(facts / rng.uniform(1.0, 5.0)))
    found: list[tuple[str, str]] = []
    for _ in range(count):
        kind = "place" if rng.random() < 0.7 else "person"
        name = namer.place() if kind == "place" else namer.person()
        if found and rng.random() < 0.08:
            kind, other = rng.choice(found)
            name = namer.twin(other)
        found.append((kind, name))
    return list(dict.fromkeys(found))


def _facts(namer: Namer, count: int) -> list[Fact]:
    """Facts that contradict nobody: an entity has at most one fact of a relation."""
    rng = namer.rng
    entities = _entities(namer, count)
    lands = [namer.place() for _ in range(3)]
    slots = [(r, name) for kind, name in entities for r in RELATIONS if r.subject == kind]
    while len(slots) < count:
        name = namer.place()
        slots += [(r, name) for r in RELATIONS if r.subject == "place"]
    facts = []
    for relation, name in rng.sample(slots, count):
        draw = rng.random()
        known = [other for kind, other in entities if kind == relation.value and other != name]
        if relation.value == "place" and draw < 0.3:
            value = rng.choice(lands)
        elif known and draw < 0.5:
            value = rng.choice(known)
        else:
            value = getattr(namer, relation.value)()
        facts.append(Fact(relation, name, value))
    return facts


def _filler(rng: random.Random, entities: list[tuple[str, str]]) -> tuple[str, str]:
    """(the entity it is about, a sentence that states no fact)."""
    kind, name = rng.choice(entities)
    chosen = kind if rng.random() < 0.8 else "any"
    return name, rng.choice(FILLERS[chosen]).format(e=name)


def _documents(rng: random.Random, facts: list[Fact], shape: Shape) -> tuple[str, ...]:
    """Spread the sentences over documents: by entity in half of the stories, at random in the rest."""
    entities = list({(f.relation.subject, f.entity) for f in facts})
    entities.sort()
    sentences = [(f.entity, f.statement(rng)) for f in facts]
    sentences += [_filler(rng, entities) for _ in range(shape.fillers)]
    rng.shuffle(sentences)
    home = {name: rng.randrange(shape.documents) for _, name in entities}
    by_entity = rng.random() < 0.5
    piles: list[list[tuple[str, str]]] = [[] for _ in range(shape.documents)]
    for name, sentence in sentences:
        piles[home[name] if by_entity else rng.randrange(shape.documents)].append((name, sentence))
    return tuple(_page(rng, pile) for pile in piles if pile)


def _page(rng: random.Random, pile: list[tuple[str, str]]) -> str:
    """One document's text: a title or none, one paragraph or several, a last line break or none."""
    title = rng.choice(TITLES).format(e=rng.choice(pile)[0]) + "\n" if rng.random() < 0.4 else ""
    if title and rng.random() < 0.5:
        title += "\n"
    gap = rng.choice((" ", " ", "\n", "\n\n"))
    parts = [title]
    for index, (_, sentence) in enumerate(pile):
        parts += [(gap if rng.random() < 0.25 else " ") if index else "", sentence]
    return "".join(parts) + ("\n" if rng.random() < 0.3 else "")


def make_story(rng: random.Random, shape: Shape, half: str = TRAIN, style: str | None = None) -> Story:
    """A story of this shape with names from this half; without a style one is drawn, or no system turn."""
    namer = Namer(rng, half)
    facts = _facts(namer, shape.facts)
    if style is None:
        style = rng.choice(list(STYLES))
        system = rng.choice(STYLES[style]) if rng.random() < 0.93 else None
    else:
        system = rng.choice(STYLES[style])
    spoken = style if system is not None else PLAIN
    asked = rng.sample(facts, min(shape.questions, len(facts)))
    documents = _documents(rng, facts, shape)
    return Story(system, documents, tuple((f.question(rng), styled(spoken, f.core())) for f in asked))


def encode(tokenizer, story: Story) -> Encoded:
    """Token ids turn by turn, as the chat template renders them. `tokenizer` is a `tokenizers.Tokenizer`."""
    messages = story.messages()
    texts = [f"<|{m['role']}|>{m['content']}{END}" for m in messages]
    ids: list[int] = []
    segments: list[int] = []
    parts: list[int] = []
    document = 0
    for message, encoding in zip(messages, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        role, turn = message["role"], encoding.ids
        document += role == "document"
        segment = {"system": 0, "document": document}.get(role, TAIL)
        part = {"document": IN_DOCUMENT, "assistant": IN_ANSWER}.get(role, IGNORED)
        ids += turn
        segments += [segment] * len(turn)
        parts += [IGNORED] + [part] * (len(turn) - 1)
    return Encoded(ids, segments, parts)
