"""The English that the small model knows: relations, question forms, filler sentences, answer styles.

A relation has one `core` sentence, which every answer restates, other wordings that documents may
use, and several question forms. `{e}` is the entity and `{v}` the value.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of fact: who has it, which kind of value it takes, and how it is said and asked."""

    name: str
    subject: str
    value: str
    core: str
    others: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS = (
    Relation(
        "located",
        "place",
        "place",
        "{e} is located in {v}.",
        ("{e} lies in {v}.", "{e} can be found in {v}."),
        (
            "Where is {e} located?",
            "Where is {e}?",
            "In which land is {e} located?",
            "Tell me where {e} is located.",
            "Can you tell me where {e} lies?",
        ),
    ),
    Relation(
        "founder",
        "place",
        "person",
        "{e} was founded by {v}.",
        ("{e} owes its founding to {v}.",),
        ("Who founded {e}?", "By whom was {e} founded?", "Who was the founder of {e}?", "Tell me who founded {e}."),
    ),
    Relation(
        "year",
        "place",
        "year",
        "{e} was founded in the year {v}.",
        ("{e} dates from the year {v}.",),
        ("When was {e} founded?", "In which year was {e} founded?", "Tell me when {e} was founded.", "How old is {e}?"),
    ),
    Relation(
        "ruler",
        "place",
        "person",
        "{e} is ruled by {v}.",
        ("{e} is governed by {v}.",),
        (
            "Who rules {e}?",
            "Who is the ruler of {e}?",
            "By whom is {e} ruled?",
            "Who governs {e}?",
            "Can you tell me who rules {e}?",
        ),
    ),
    Relation(
        "fame",
        "place",
        "goods",
        "{e} is famous for its {v}.",
        ("{e} is well known for its {v}.",),
        (
            "What is {e} famous for?",
            "What is {e} known for?",
            "For what is {e} famous?",
            "Tell me what {e} is famous for.",
        ),
    ),
    Relation(
        "export",
        "place",
        "goods",
        "{e} exports {v}.",
        ("{e} sells {v} to other lands.",),
        ("What does {e} export?", "Which goods does {e} export?", "What does {e} sell?", "Tell me what {e} exports."),
    ),
    Relation(
        "river",
        "place",
        "word",
        "{e} stands on the river {v}.",
        ("{e} was built on the banks of the river {v}.",),
        (
            "On which river does {e} stand?",
            "Which river flows past {e}?",
            "What is the river of {e} called?",
            "Tell me on which river {e} stands.",
        ),
    ),
    Relation(
        "language",
        "place",
        "word",
        "The people of {e} speak {v}.",
        ("In {e} everybody speaks {v}.",),
        (
            "Which language do the people of {e} speak?",
            "What language is spoken in {e}?",
            "What do the people of {e} speak?",
            "Tell me which language is spoken in {e}.",
        ),
    ),
    Relation(
        "feast",
        "place",
        "word",
        "{e} celebrates the feast of {v}.",
        ("{e} holds the great feast of {v}.",),
        (
            "Which feast does {e} celebrate?",
            "What does {e} celebrate?",
            "Which feast is held in {e}?",
            "Tell me which feast {e} celebrates.",
        ),
    ),
    Relation(
        "guard",
        "place",
        "creature",
        "{e} is guarded by {v}.",
        ("{e} is watched over by {v}.",),
        (
            "What guards {e}?",
            "By what is {e} guarded?",
            "Which creature guards {e}?",
            "Can you tell me what guards {e}?",
        ),
    ),
    Relation(
        "mountain",
        "place",
        "word",
        "{e} stands below Mount {v}.",
        ("{e} is found at the foot of Mount {v}.",),
        (
            "Below which mountain does {e} stand?",
            "Which mountain rises above {e}?",
            "What is the mountain above {e} called?",
            "Tell me which mountain rises above {e}.",
        ),
    ),
    Relation(
        "flag",
        "place",
        "colours",
        "The flag of {e} is {v}.",
        ("The banner of {e} is {v}.",),
        (
            "Which colours are on the flag of {e}?",
            "What does the flag of {e} look like?",
            "What are the colours of {e}?",
            "Tell me the colours of the flag of {e}.",
        ),
    ),
    Relation(
        "birth",
        "person",
        "place",
        "{e} was born in {v}.",
        ("{e} comes from {v}.",),
        (
            "Where was {e} born?",
            "In which place was {e} born?",
            "Where does {e} come from?",
            "Tell me where {e} was born.",
        ),
    ),
    Relation(
        "home",
        "person",
        "place",
        "{e} lives in {v}.",
        ("{e} has a house in {v}.",),
        (
            "Where does {e} live?",
            "In which place does {e} live?",
            "Tell me where {e} lives.",
            "Can you tell me where {e} lives?",
        ),
    ),
    Relation(
        "job",
        "person",
        "job",
        "{e} works as a {v}.",
        ("{e} earns a living as a {v}.",),
        (
            "What does {e} do for a living?",
            "What is the work of {e}?",
            "What does {e} work as?",
            "Tell me what {e} does for a living.",
        ),
    ),
    Relation(
        "teacher",
        "person",
        "person",
        "{e} was taught by {v}.",
        ("{e} learned everything from {v}.",),
        ("Who taught {e}?", "By whom was {e} taught?", "Who was the teacher of {e}?", "Tell me who taught {e}."),
    ),
    Relation(
        "pet",
        "person",
        "creature",
        "{e} keeps {v}.",
        ("{e} takes care of {v}.",),
        (
            "Which animal does {e} keep?",
            "What does {e} keep?",
            "Which creature lives with {e}?",
            "Tell me which animal {e} keeps.",
        ),
    ),
)

LEADS = (
    "As the old maps show, ",
    "According to the chronicles, ",
    "It is written that ",
    "Travellers say that ",
    "Today ",
    "In truth, ",
    "As everybody knows, ",
    "The records show that ",
    "It is said that ",
)

FILLERS = {
    "place": (
        "Many roads lead to {e}.",
        "{e} is quiet in the winter months.",
        "Few strangers visit {e} in spring.",
        "The market of {e} opens early in the morning.",
        "Children in {e} learn to swim before they can read.",
        "The walls of {e} are thick and old.",
        "It often rains in {e}.",
        "The houses of {e} have narrow windows.",
        "Nobody in {e} locks the door at night.",
        "The air in {e} smells of smoke and bread.",
        "{e} has three wells and one school.",
        "A long wall surrounds {e}.",
        "The streets of {e} are steep.",
        "People from {e} are proud of their songs.",
        "There is a small library in {e}.",
        "The winter in {e} is long.",
        "A traveller can rest in {e} for a few coins.",
    ),
    "person": (
        "{e} likes long walks.",
        "{e} rises before the sun.",
        "Nobody has ever seen {e} angry.",
        "{e} writes letters in the evening.",
        "Everybody in the street knows {e}.",
        "{e} walks with a stick.",
        "{e} never travels without a blanket.",
        "The neighbours trust {e}.",
        "{e} sings while working.",
        "{e} sleeps badly when the moon is full.",
        "{e} once crossed the sea in a small boat.",
    ),
    "any": (
        "The roads are dry in summer.",
        "The harvest was good this year.",
        "The wind comes from the north.",
        "Old people tell long stories by the fire.",
        "The bridge was repaired last year.",
        "Merchants come and go.",
        "Not everything that is told is true.",
        "The nights are cold and clear.",
        "This was copied by hand from an older book.",
        "More could be said about this.",
    ),
}

TITLES = (
    "Notes on {e}",
    "About {e}",
    "{e}",
    "A short report on {e}",
    "From the archive: {e}",
    "A guide to {e}",
    "# {e}",
)

PLAIN = "plain"
STYLES = {
    PLAIN: (
        "Answer in one full sentence.",
        "Answer the question in a full sentence.",
        "You answer questions about the documents. Answer in one sentence.",
        "You are a helpful assistant.",
        "Use only the documents to answer.",
        "Answer with one plain sentence and nothing else.",
    ),
    "polite": (
        "Answer politely.",
        "Be polite. Answer the question.",
        "You are a polite assistant.",
        "You answer questions about the documents. Be polite and friendly.",
        "Please answer in a polite way.",
    ),
    "source": (
        "Answer and name your source.",
        "Name the source of your answer.",
        "You answer questions about the documents. Always say where you know it from.",
        "Say that the answer comes from the documents.",
    ),
    "offer": (
        "Answer and offer more help.",
        "Answer the question, then offer further help.",
        "You are a guide. After each answer, ask if there is another question.",
        "You answer questions about the documents. Offer more help at the end.",
    ),
}


def after(lead: str, sentence: str) -> str:
    """The sentence behind a lead; only a leading article or preposition loses its capital."""
    for word in ("The ", "In "):
        if lead and sentence.startswith(word):
            sentence = sentence[0].lower() + sentence[1:]
    return lead + sentence


def styled(style: str, sentence: str) -> str:
    """The answer that a system prompt of this style asks for."""
    if style == "polite":
        return "Certainly. " + sentence
    if style == "source":
        return after("The documents say that ", sentence)
    if style == "offer":
        return sentence + " Do you have another question?"
    return sentence
