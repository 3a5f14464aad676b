"""Invented words and names, in two disjoint halves: one for training, one held out.

Every name a training story uses is made up on the spot, so the model cannot remember it and has to
read it from the context. A word belongs to the held-out half when its checksum says so; the two
halves can therefore never meet, whatever the seeds are.
"""

import random
import zlib

from models.training.language import FILLERS, LEADS, RELATIONS, STYLES, TITLES

TRAIN, HELD_OUT = "train", "held_out"


def _words(text: str) -> list[str]:
    return text.split()


_ONSETS = (
    _words("b c d f g h j k l m n p r s t v w z br cr dr fr gr kr pr tr bl cl fl gl pl sl st sk sp sn th sh ch qu y")
    + [""] * 3
)
_VOWELS = _words("a e i o u a e i o u ai ea ee ie io oa ou au y")
_CODAS = _words("n r l s m t k x d nd rn st th ng lm rk sk") + [""] * 14
_PLACE_ENDINGS = (
    _words("ton burg ia onia mere ford haven wick dale stead port holm gate moor vale field mouth bridge land")
    + [""] * 12
)
_STEMS = _words(
    "crystal silver amber nebul thorn winter moon star iron copper raven wolf oak ash elder frost storm salt "
    "sun river stone glass honey gold bright dark green white red black north south east west summer harbor "
    "maple willow falcon otter fox heron lark ember shadow mist cloud rain snow sand marsh cedar birch velvet "
    "king queen castle mill orchard apple clover barley lantern anchor bell crown"
)
_ADJECTIVES = _words(
    "blue red green silver golden wooden glass painted woven copper iron salted smoked dried carved floating "
    "singing tiny giant old striped polished sweet bitter spiced paper stone silk ivory velvet tin amber white "
    "black round hollow crooked frozen"
)
_GOODS = _words(
    "bells lamps apples pears bridges clocks boats carpets drums flutes candles kites masks ropes towers gardens "
    "cheeses cakes pies teapots mirrors barrels baskets boots hats gloves ribbons maps books pens spoons knives "
    "wheels tiles bricks roses tulips plums cherries honey wine cider wool linen pearls shells stones fish bread "
    "salt pepper oil wax paper soap"
)
_CREATURES = _words(
    "lion owl bear wolf cat dog horse goat heron turtle fox swan eagle dragon serpent spider stag hound raven "
    "tiger crow badger beaver frog giant knight statue goose donkey parrot mouse rabbit hawk"
)
_JOBS = _words(
    "glassblower baker weaver painter sailor shepherd blacksmith carpenter teacher healer scribe mapmaker "
    "fisher gardener miller potter brewer tailor hunter judge poet singer dancer cook librarian mason farmer "
    "beekeeper clockmaker shoemaker goldsmith lamplighter bookbinder locksmith"
)
_COLOURS = _words("red blue green white black gold silver purple orange brown grey pink yellow crimson")
_WILD = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-'äöüéèåøñçßÆØÅÉÖ"


def _plain_words() -> list[str]:
    """Every word of the sentences around the names, and of the lists above."""
    texts = [text for r in RELATIONS for text in (r.core, *r.others, *r.questions)]
    texts += [text for group in (*FILLERS.values(), *STYLES.values(), LEADS, TITLES) for text in group]
    words = {word.strip(".,?#:").lower() for text in texts for word in text.split() if "{" not in word}
    return sorted(words | {*_STEMS, *_ADJECTIVES, *_GOODS, *_CREATURES, *_JOBS, *_COLOURS})


_PLAIN_WORDS = _plain_words()


def half_of(word: str) -> str:
    """Which half a word belongs to; one word in sixteen is held out."""
    return HELD_OUT if zlib.crc32(word.lower().encode()) % 16 == 0 else TRAIN


class Namer:
    """Draws names of every kind from one half, by one random generator."""

    def __init__(self, rng: random.Random, half: str = TRAIN) -> None:
        self.rng = rng
        self.half = half

    def _kept(self, make) -> str:
        while True:
            word = make()
            if len(word) > 2 and half_of(word) == self.half:
                return word

    def _syllable(self) -> str:
        choice = self.rng.choice
        return choice(_ONSETS) + choice(_VOWELS) + choice(_CODAS)

    def _sound(self) -> str:
        return "".join(self._syllable() for _ in range(self.rng.choice((1, 2, 2, 2, 3, 3)))).capitalize()

    def _place(self) -> str:
        rng = self.rng
        if rng.random() < 0.2:
            return self._blend().capitalize()
        if rng.random() < 0.25:
            return (rng.choice(_STEMS) + rng.choice(_PLACE_ENDINGS + _STEMS)).capitalize()
        return self._sound() + rng.choice(_PLACE_ENDINGS)

    def _blend(self) -> str:
        """Slices of plain words glued together, so that every piece of the tokenizer occurs in names."""
        rng = self.rng
        parts = []
        for _ in range(rng.choice((1, 2, 2, 3))):
            word = rng.choice(_PLAIN_WORDS)
            start = rng.randrange(max(1, len(word) - 2)) if rng.random() < 0.5 else 0
            parts.append(word[start : start + rng.randint(2, 8)])
        if rng.random() < 0.5:
            parts.insert(rng.randrange(len(parts) + 1), self._syllable())
        return "".join(parts)

    def _wild(self) -> str:
        return "".join(self.rng.choice(_WILD) for _ in range(self.rng.randint(3, 8)))

    def word(self) -> str:
        """A made-up capitalised word; now and then an unpronounceable one."""
        draw = self.rng.random()
        if draw < 0.03:
            return self._kept(self._wild)
        return self._kept(lambda: self._blend().capitalize() if draw < 0.25 else self._sound())

    def plain_word(self) -> str:
        """A made-up word in small letters, as an unknown noun or adjective of a document looks."""
        return self._kept(lambda: self._blend() if self.rng.random() < 0.7 else self._sound().lower())

    def place(self) -> str:
        """A town or a land: one word, sometimes two."""
        draw = self.rng.random()
        if draw < 0.03:
            return self._kept(self._wild)
        if draw < 0.10:
            return self.rng.choice(("New ", "Old ", "Upper ", "Port ", "Saint ")) + self._kept(self._place)
        return self._kept(self._place)

    def person(self) -> str:
        """A first and a last name, a title and a name, or one name."""
        draw = self.rng.random()
        if draw < 0.15:
            return self.rng.choice(("Queen ", "King ", "Captain ", "Lady ", "Doctor ")) + self.word()
        if draw < 0.25:
            return self.word()
        return f"{self.word()} {self._kept(self._place)}"

    def twin(self, name: str) -> str:
        """A name that begins like this one, so that the first letters alone do not tell them apart."""
        first, _, last = name.partition(" ")
        if last:
            return f"{first} {self.word()}"
        return self._kept(lambda: first[: max(3, len(first) // 2)] + self._syllable() + self._syllable())

    def year(self) -> str:
        return str(self.rng.randint(100, 2400))

    def goods(self) -> str:
        """Something a town could sell: two plain words, or an invented one and a plain one."""
        rng = self.rng
        draw = rng.random()
        first = self.word() if draw < 0.2 else self.plain_word() if draw < 0.5 else rng.choice(_ADJECTIVES)
        last = self.plain_word() if rng.random() < 0.3 else rng.choice(_GOODS)
        return last if rng.random() < 0.1 else f"{first} {last}"

    def creature(self) -> str:
        adjective = self.rng.choice([a for a in _ADJECTIVES if a[0] not in "aeiou"])
        creature = self.plain_word() if self.rng.random() < 0.2 else self.rng.choice(_CREATURES)
        return f"a {adjective} {creature}"

    def job(self) -> str:
        return self.plain_word() if self.rng.random() < 0.3 else self.rng.choice(_JOBS)

    def colours(self) -> str:
        first, second = self.rng.sample(_COLOURS, 2)
        return f"{first} and {second}"
