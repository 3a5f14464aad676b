"""Invented words and names, in two disjoint halves: one for training, one held out.

Every name a training story uses is made up on the spot, so the model cannot remember it and has to
read it from the context. A word belongs to the held-out half when its checksum says so; the two
halves can therefore never meet, whatever the seeds are.
"""

import random
import zlib

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
        if rng.random() < 0.25:
            return (rng.choice(_STEMS) + rng.choice(_PLACE_ENDINGS + _STEMS)).capitalize()
        return self._sound() + rng.choice(_PLACE_ENDINGS)

    def _wild(self) -> str:
        return "".join(self.rng.choice(_WILD) for _ in range(self.rng.randint(3, 8)))

    def word(self) -> str:
        """A made-up capitalised word; now and then an unpronounceable one."""
        return self._kept(self._wild if self.rng.random() < 0.03 else self._sound)

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
        first = self.word() if rng.random() < 0.3 else rng.choice(_ADJECTIVES)
        return f"{first} {rng.choice(_GOODS)}"

    def creature(self) -> str:
        adjective = self.rng.choice([a for a in _ADJECTIVES if a[0] not in "aeiou"])
        return f"a {adjective} {self.rng.choice(_CREATURES)}"

    def job(self) -> str:
        return self.rng.choice(_JOBS)

    def colours(self) -> str:
        first, second = self.rng.sample(_COLOURS, 2)
        return f"{first} and {second}"
