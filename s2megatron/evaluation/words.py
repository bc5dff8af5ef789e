"""The words of generated documents: filler sentences, and keys that occur in no filler sentence."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence

Encode = Callable[[str], Sequence[int]]
"""Text -> token ids, without special tokens; a list or an array."""

_SUBJECTS = (
    "farmer", "teacher", "sailor", "neighbour", "painter", "miller", "doctor", "child",
    "gardener", "writer", "driver", "baker", "student", "visitor", "carpenter", "fisherman",
)  # fmt: skip
_ADJECTIVES = (
    "old", "quiet", "tall", "patient", "tired", "cheerful", "young", "careful", "busy", "polite",
    "friendly", "curious",
)  # fmt: skip
_VERBS = (
    "carries", "looks for", "repairs", "admires", "sells", "finds", "draws", "counts", "washes",
    "remembers", "hides", "borrows",
)  # fmt: skip
_OBJECTS = (
    "a wooden boat", "the heavy basket", "a new lamp", "some bread", "the red blanket",
    "an empty bottle", "the garden gate", "a letter", "two chairs", "the broken clock",
    "a grey horse", "the winter coats", "a map", "the copper kettle",
)  # fmt: skip
_PLACES = (
    "near the river", "behind the mill", "at the market", "before breakfast", "under the bridge",
    "on the way home", "after the rain", "in the evening", "beside the church", "every summer",
    "at the edge of the village", "without a word",
)  # fmt: skip
_KEY_COLOURS = (
    "amber", "azure", "beige", "black", "bronze", "coral", "crimson", "cyan", "ebony", "golden",
    "indigo", "ivory", "jade", "khaki", "lilac", "magenta", "maroon", "olive", "orange", "pearl",
    "pink", "purple", "ruby", "russet", "scarlet", "silver", "teal", "violet", "white", "yellow",
)  # fmt: skip
_KEY_NOUNS = (
    "anchor", "arrow", "badger", "beacon", "canyon", "castle", "comet", "compass", "cradle",
    "dragon", "eagle", "engine", "falcon", "feather", "forest", "glacier", "hammer", "harbour",
    "island", "jungle", "kitten", "ladder", "lantern", "magnet", "meadow", "needle", "octopus",
    "palace", "parrot", "planet", "pyramid", "rabbit", "rocket", "saddle", "shadow", "sparrow",
    "temple", "thunder", "tiger", "tunnel", "turtle", "valley", "violin", "volcano", "walrus",
    "whistle", "window", "zebra",
)  # fmt: skip
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

WORD_KEYS = tuple(f"{colour}-{noun}" for colour in _KEY_COLOURS for noun in _KEY_NOUNS)
"""Keys of sentences, as "amber-anchor"."""

LETTER_KEYS = tuple(first + second for first in _LETTERS for second in _LETTERS)
"""Keys of records: two letters, so one or two tokens of nearly any tokenizer."""


def digest(encode: Encode) -> str:
    """The same for tokenizers that make the same tokens of words, signs, code and other scripts."""
    printable = "".join(map(chr, range(32, 127)))
    words = " ".join(_SUBJECTS + _ADJECTIVES + _VERBS + _OBJECTS + _PLACES)
    text = f"{words}\n{printable}\n\tdef f(x):\n        return x ** 12345.678\n\u00e9\u65e5\u672c"
    ids = ",".join(str(int(token)) for token in encode(text))
    return hashlib.sha256(ids.encode()).hexdigest()[:16]


def variable_names(count: int, rng: random.Random) -> list[str]:
    """`count` different names of five capital letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(_LETTERS.upper(), k=5))] = None
    return list(names)


def sentences(count: int, rng: random.Random) -> Iterator[str]:
    """Filler: plain English sentences, each with a space in front; no digits and no keys."""
    for _ in range(count):
        subject, adjective = rng.choice(_SUBJECTS), rng.choice(_ADJECTIVES)
        verb, thing, place = rng.choice(_VERBS), rng.choice(_OBJECTS), rng.choice(_PLACES)
        yield f" The {adjective} {subject} {verb} {thing} {place}."
