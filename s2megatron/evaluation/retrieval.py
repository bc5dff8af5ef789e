"""Documents with facts planted in them and questions about the facts at their end.

The tasks are those of needle-in-a-haystack and RULER, made by a generator of our own that downloads
nothing and takes any tokenizer:

| task          | planted                                    | asked                             |
| ------------- | ------------------------------------------ | --------------------------------- |
| `single`      | one key with its value                     | the value                         |
| `multi_key`   | many keys, each with a value               | the values of some, one by one    |
| `multi_value` | a key with several values, and other keys  | all its values, in order          |
| `multi_query` | many keys, each with a value               | the values of several, as a list  |
| `tracking`    | a value stored in a variable, which is     | all variables that hold the value |
|               | copied into the next, and so on; and other |                                   |
|               | such chains                                |                                   |

The answers stand in the document, so one forward pass scores them all: a model that is right has
its argmax on every token of an answer. A fact is written as a sentence, or as a short `record`: a
key of one or two tokens that the value follows directly, hundreds of which fit into a document.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from s2megatron.evaluation.words import (
    LETTER_KEYS,
    WORD_KEYS,
    Encode,
    sentences,
    variable_names,
)

TASKS = ("single", "multi_key", "multi_value", "multi_query", "tracking")
STYLES = ("sentences", "records")

_DEFAULT_QUERIES = {"single": 1, "multi_key": 1}  # the other tasks ask for four things
_FILLER_SENTENCES = 2000


@dataclass(frozen=True)
class Answer:
    """An answer in a document, and where it was to be read. Positions count tokens from 0."""

    start: int
    end: int
    """The answer is tokens[start:end]."""
    source: int
    """First token of the value where it was planted."""
    depth: float
    """source over the document's length."""
    task: str

    @property
    def distance(self) -> int:
        """Tokens from the planted value to the answer."""
        return self.start - self.source


@dataclass(frozen=True)
class RetrievalDocument:
    """Filler with planted facts, then the questions with their answers."""

    tokens: list[int]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class _Fact:
    """A planted statement: the tokens of `head`, `value` and `tail`, one after the other."""

    head: tuple[int, ...]
    value: tuple[int, ...]
    tail: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.head) + len(self.value) + len(self.tail)


@dataclass(frozen=True)
class _Wording:
    """How a style says things. A value's text carries what separates it from the text before."""

    head: str
    tail: str
    ask_one: str
    ask_many: str
    ask_list: str
    store: str
    copy: str
    ask_tracking: str
    between: str
    value: str
    values: range
    keys_apart: bool = False
    """The keys of a list are pieces of their own, with the tokens that they have in their facts;
    `ask_list` then only ends the list."""


_WORDINGS = {
    "sentences": _Wording(
        head=" The number kept for {key} is",
        tail=".",
        ask_one=" Which number is kept for {key}? The number kept for {key} is",
        ask_many=" Which numbers are kept for {key}, in order? The numbers kept for {key} are",
        ask_list=" Which numbers are kept for {key}? The numbers kept for {key} are",
        store=" Store {key} in",
        copy=" Copy {key} into",
        ask_tracking=" Which variables hold {key}? The variables that hold {key} are",
        between=",",
        value=" {value}",
        values=range(1_000_000, 10_000_000),
    ),
    "records": _Wording(
        head="@{key}",
        tail="\n",
        ask_one="@{key}",
        ask_many="@{key}",
        ask_list=":",
        store="@{key}",
        copy="@{key}",
        ask_tracking="@{key}",
        between=",",
        value="{value}",
        values=range(1_000, 10_000),
        keys_apart=True,
    ),
}


@dataclass(frozen=True)
class _Content:
    """What a document says. The first `asked` facts are those that the questions are about."""

    facts: list[_Fact]
    asked: int
    in_order: bool
    """The facts asked for are planted in their order in the question."""
    question: list[tuple[tuple[int, ...], int | None]]
    """Pieces of the question, and for an answer the number of the fact that it repeats."""


def make_document(
    task: str,
    encode: Encode,
    length: int,
    rng: random.Random,
    *,
    filler: Sequence[int] | None = None,
    queries: int | None = None,
    records: int | None = None,
    needle: bool = True,
    style: str = "sentences",
    depth: float | None = None,
) -> RetrievalDocument:
    """A document of exactly `length` tokens; the same arguments and `rng` state give the same one.

    Args:
        task: one of TASKS.
        encode: text -> token ids without special tokens. Documents are put together from pieces
            that are encoded apart, so a value has the same tokens wherever it stands. Must be
            hashable (a function or a bound method is): short pieces are kept.
        filler: tokens of natural text to plant the facts in, `length` of them at least; its first
            ones are used. Left out: generated sentences.
        queries: answers in the document. Left out: 1 for `single` (which has no more) and
            `multi_key`, 4 for the other tasks.
        records: facts planted in all, those asked for included; the others are of the same kind
            and lead astray. Left out: twice the queries and at least 4; `single` has its one.
        needle: False leaves the facts asked for out, with filler in their place and all else
            the same. Nobody can answer then: what a model still gets right is guessed.
        style: one of STYLES.
        depth: where a fact asked for lies, as a share of the length from 0 to 1. The others, and
            without it all, lie anywhere.

    Raises:
        ValueError: an argument that does not fit, a length too small for the facts and questions,
            or a tokenizer that gives two values the same tokens.
    """
    if task not in TASKS or style not in STYLES:
        raise ValueError(
            f"task={task!r}, style={style!r}: tasks are {', '.join(TASKS)}; "
            f"styles are {', '.join(STYLES)}"
        )
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth}: must be from 0 to 1")
    queries, records = _counts(task, queries, records)
    content = _content(task, encode, rng, _WORDINGS[style], queries, records)
    question = sum(len(piece) for piece, _ in content.question)
    body, planted = length - question, sum(map(len, content.facts))
    if planted > body:
        raise ValueError(
            f"length={length}: {records} facts of {planted} tokens and a question of {question} "
            f"do not fit; give at least {planted + question}, or fewer queries and records"
        )
    if filler is None:
        filler = generated_filler(encode, body, rng)
    elif len(filler) < body:
        raise ValueError(f"filler: has {len(filler)} tokens of {body} needed; give more")
    filler = [int(token) for token in filler[:body]]
    order, starts = _places(content, body, rng, None if depth is None else int(depth * length))
    tokens, sources = _plant(content, order, starts, body, filler, needle)
    answers = []
    for piece, fact in content.question:
        if fact is not None:
            start, source = len(tokens), sources[fact]
            answers.append(Answer(start, start + len(piece), source, source / length, task))
        tokens += piece
    return RetrievalDocument(tokens, tuple(answers))


def generated_filler(encode: Encode, count: int, rng: random.Random) -> list[int]:
    """`count` tokens of plain sentences in a random order."""
    pool, tokens = _sentence_pool(encode), []
    while len(tokens) < count:
        tokens += rng.choice(pool)
    return tokens[:count]


@functools.lru_cache(maxsize=8)
def _sentence_pool(encode: Encode) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(map(int, encode(text))) for text in sentences(_FILLER_SENTENCES, random.Random(0))
    )


@functools.lru_cache(maxsize=1 << 17)
def _encoded(encode: Encode, text: str) -> tuple[int, ...]:
    return tuple(map(int, encode(text)))


def _counts(task: str, queries: int | None, records: int | None) -> tuple[int, int]:
    queries = _DEFAULT_QUERIES.get(task, 4) if queries is None else queries
    if queries < 1 or (task == "single" and queries > 1):
        raise ValueError(
            f"queries={queries}: must be at least 1, and task 'single' asks once; "
            "'multi_key' asks more often"
        )
    if records is None:
        records = 1 if task == "single" else max(4, 2 * queries)
    if records < queries or (task == "single" and records > 1):
        raise ValueError(
            f"records={records}: must be at least queries={queries}, and 1 for task 'single'"
        )
    return queries, records


def _content(
    task: str, encode: Encode, rng: random.Random, words: _Wording, queries: int, records: int
) -> _Content:
    if records > len(words.values) or (task != "tracking" and records > len(_keys(words))):
        most = min(len(words.values), len(_keys(words)))
        raise ValueError(f"records={records}: there are only {most} keys; plant fewer")
    piece = functools.partial(_encoded, encode)
    tail = piece(words.tail)
    if task == "tracking":
        keys, values = _chains(rng, words, queries, records)
        heads = [
            (words.copy if i % queries else words.store).format(key=key)
            for i, key in enumerate(keys)
        ]
    else:
        keys = rng.sample(_keys(words), records)
        if task == "multi_value":  # groups of as many values share a key
            keys = [keys[i - i % queries] for i in range(records)]
        values = list(map(str, rng.sample(words.values, records)))
        heads = [words.head.format(key=key) for key in keys]
    spelt = [piece(words.value.format(value=value)) for value in values]
    openings = [piece(head) for head in heads]
    if len({*spelt, ()}) <= records or len(set(openings)) < len(set(heads)):
        raise ValueError(
            "encode: gives different keys or values the same tokens, or none; facts need a "
            "tokenizer that can tell them apart"
        )
    facts = [_Fact(head, value, tail) for head, value in zip(openings, spelt, strict=True)]
    return _Content(
        facts=facts,
        asked=queries,
        in_order=task in ("multi_value", "tracking"),
        question=_question(task, piece, words, keys, spelt[:queries]),
    )


def _keys(words: _Wording) -> tuple[str, ...]:
    return LETTER_KEYS if words is _WORDINGS["records"] else WORD_KEYS


def _chains(
    rng: random.Random, words: _Wording, links: int, records: int
) -> tuple[list[str], list[str]]:
    """(what is stored or copied, the variable it goes into) of chains with `links` facts each."""
    if words is _WORDINGS["records"]:
        if records > len(LETTER_KEYS):
            raise ValueError(f"records={records}: there are only {len(LETTER_KEYS)} keys")
        names = rng.sample(LETTER_KEYS, records)
    else:
        names = variable_names(records, rng)
    numbers = rng.sample(words.values, -(-records // links))
    sources = [names[i - 1] if i % links else str(numbers[i // links]) for i in range(records)]
    return sources, names


def _question(task, piece, words: _Wording, keys, answers) -> list[tuple]:
    """The pieces of the question: text with None, answers with the number of their fact."""
    tail = (piece(words.tail), None)
    if task in ("single", "multi_key"):
        return [
            part
            for i, answer in enumerate(answers)
            for part in ((piece(words.ask_one.format(key=keys[i])), None), (answer, i), tail)
        ]
    if task == "tracking":
        start = [words.ask_tracking.format(key=keys[0])]
    elif task == "multi_value":
        start = [words.ask_many.format(key=keys[0])]
    elif words.keys_apart:
        start = [*(words.head.format(key=key) for key in keys[: len(answers)]), words.ask_list]
    else:
        start = [words.ask_list.format(key=", ".join(keys[: len(answers)]))]
    parts = [(piece(text), None) for text in start]
    for i, answer in enumerate(answers):
        parts += [(answer, i), (piece(words.between), None)]
    return [*parts[:-1], tail]


def _places(
    content: _Content, body: int, rng: random.Random, target: int | None
) -> tuple[list[int], list[int]]:
    """(facts in the order of the document, filler tokens before each).

    Args:
        target: position that the value of fact 0 is to have, as nearly as the others let it.
    """
    facts = content.facts
    room = body - sum(map(len, facts))
    order = rng.sample(range(len(facts)), len(facts))
    before = sorted(rng.randint(0, room) for _ in facts)
    if target is not None:
        at = order.index(0)
        order.pop(at)
        before.pop(at)
        position = min(max(target - len(facts[0].head), 0), body - len(facts[0]))
        rank = passed = 0
        while rank < len(order) and before[rank] + passed + len(facts[order[rank]]) <= position:
            passed += len(facts[order[rank]])
            rank += 1
        limit = before[rank] if rank < len(before) else room
        order.insert(rank, 0)
        before.insert(rank, min(max(position - passed, before[rank - 1] if rank else 0), limit))
    if content.in_order:
        slots = [i for i, fact in enumerate(order) if fact < content.asked]
        for fact, slot in enumerate(slots):
            order[slot] = fact
    return order, before


def _plant(
    content: _Content,
    order: list[int],
    before: list[int],
    body: int,
    filler: Sequence[int],
    needle: bool,
) -> tuple[list[int], dict[int, int]]:
    """The document up to its question, and where the value of each fact starts."""
    tokens: list[int] = []
    sources: dict[int, int] = {}
    used = last = 0
    for number, offset in zip(order, before, strict=True):
        fact = content.facts[number]
        tokens += filler[used : used + offset - last]
        used, last = used + offset - last, offset
        sources[number] = len(tokens) + len(fact.head)
        if needle or number >= content.asked:
            tokens += (*fact.head, *fact.value, *fact.tail)
        else:  # the filler goes on
            tokens += filler[used : used + len(fact)]
            used += len(fact)
    tokens += filler[used : used + body - len(tokens)]
    return tokens, sources
