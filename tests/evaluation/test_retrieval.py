"""Generated retrieval documents: where facts and answers stand, and what is refused."""

import itertools
import random

import numpy
import pytest

from s2megatron.evaluation.retrieval import STYLES, TASKS, make_document


def by_byte(text: str) -> list[int]:
    return list(text.encode())


def by_word(text: str) -> list[int]:
    """A coarse tokenizer: every word and every three digits are a token."""
    tokens: list[int] = []
    for word in text.replace("@", " @ ").replace(",", " , ").replace(".", " . ").split():
        parts = [word[i : i + 3] for i in range(0, len(word), 3)] if word.isdigit() else [word]
        tokens += [int.from_bytes(part.encode(), "big") % 1_000_003 for part in parts]
    return tokens


def read(tokens: list[int]) -> str:
    return bytes(tokens).decode()


def document(task="single", length=3000, seed=0, encode=by_byte, **options):
    return make_document(task, encode, length, random.Random(seed), **options)


@pytest.mark.parametrize("encode", [by_byte, by_word], ids=["bytes", "words"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("task", TASKS)
def test_answers_repeat_what_was_planted(task, style, encode):
    for seed in range(5):
        found = document(task, 2001, seed, encode, style=style)
        assert len(found.tokens) == 2001
        assert len(found.answers) == (1 if task in ("single", "multi_key") else 4)
        for answer in found.answers:
            value = found.tokens[answer.start : answer.end]
            assert found.tokens[answer.source : answer.source + len(value)] == value
            assert answer.source < answer.start and answer.depth == answer.source / 2001
            assert answer.distance == answer.start - answer.source and answer.task == task


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("task", TASKS)
def test_without_needle_only_the_facts_asked_for_are_gone(task, style):
    filler = list(range(1000, 4000))  # no token of which is a byte
    given, without = (document(task, style=style, filler=filler, needle=n) for n in (True, False))
    assert given.answers == without.answers
    removed = 0
    for answer in given.answers:
        value = given.tokens[answer.start : answer.end]
        planted = slice(answer.source, answer.source + len(value))
        assert without.tokens[answer.start : answer.end] == value
        assert all(token >= 1000 for token in without.tokens[planted])
        removed += len(value)
    first = min(answer.start for answer in given.answers)
    text = bytes(t for t in without.tokens[: first - 200] if t < 256)
    for answer in given.answers:
        assert bytes(given.tokens[answer.start : answer.end]) not in text
    lost = [t for t in given.tokens if t < 256], [t for t in without.tokens if t < 256]
    assert len(lost[0]) - len(lost[1]) > removed
    kept = [t for t in without.tokens if t >= 1000]
    assert kept == filler[: len(kept)]  # what stands in their place is the filler, going on


def test_arrays_will_do_for_tokens():
    """Tokenizers and datasets give small unsigned integers, which must not overflow later."""
    encode, filler = lambda text: numpy.frombuffer(text.encode(), numpy.uint8), numpy.arange(3000)
    found = document("multi_query", encode=encode, filler=filler.astype(numpy.uint16))
    assert {type(token) for token in found.tokens} == {int}
    assert found == document("multi_query", filler=filler.tolist())


def test_the_same_seed_gives_the_same_document():
    assert document("multi_key", seed=3) == document("multi_key", seed=3)
    assert document("multi_key", seed=3) != document("multi_key", seed=4)


def test_what_the_texts_say():
    text = read(document("single").tokens)
    assert "Which number is kept for" in text[-150:] and text.endswith(".")
    assert text.count("The number kept for") == 2
    found = document("tracking")
    names = [read(found.tokens[a.start : a.end]) for a in found.answers]
    text = read(found.tokens)
    assert f"in{names[0]}." in text
    for source, name in itertools.pairwise(names):
        assert f" Copy{source} into{name}." in text
    sources = [a.source for a in found.answers]
    assert sources == sorted(sources)
    found = document("multi_value", style="records")
    values = ",".join(read(found.tokens[a.start : a.end]) for a in found.answers)
    assert read(found.tokens).endswith(values + "\n")
    keys = {read(found.tokens[a.source - 2 : a.source]) for a in found.answers}
    assert len(keys) == 1 and [a.source for a in found.answers] == sorted(
        a.source for a in found.answers
    )


def test_many_records_and_questions_fit_into_a_short_document():
    found = document("multi_key", 1024, queries=40, records=64, style="records")
    assert len(found.answers) == 40
    for answer in found.answers:  # key and value directly one after the other, in both places
        around = [read(found.tokens[at - 3 : at + 4]) for at in (answer.source, answer.start)]
        assert around[0] == around[1] and around[0][0] == "@"


@pytest.mark.parametrize("task", TASKS)
def test_depth_puts_a_fact_where_it_is_wanted(task):
    for depth in (0, 0.05, 0.5, 0.77, 0.9, 1):
        found = document(task, 8000, depth=depth)
        nearest = min(abs(answer.depth - depth) for answer in found.answers)
        assert nearest < (0.012 if depth < 0.95 else 0.06), (depth, nearest)


def test_depths_are_spread_without_it():
    depths = [document(seed=seed).answers[0].depth for seed in range(200)]
    assert min(depths) < 0.05 and max(depths) > 0.9 and 0.4 < sum(depths) / 200 < 0.6


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(task="haystack"), "single, multi_key"),
        (dict(style="verse"), "sentences, records"),
        (dict(queries=2), "queries=2"),
        (dict(task="multi_key", queries=5, records=4), "records=4"),
        (dict(length=100), "give at least"),
        (dict(filler=[1] * 50), "filler: has 50"),
        (dict(depth=1.5), "depth=1.5"),
        (dict(task="multi_key", records=700, style="records"), "only 676 keys"),
        (dict(task="multi_key", encode=lambda text: [0]), "the same tokens"),
    ],
)
def test_what_does_not_fit_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        document(**options)


def test_a_document_just_fits():
    with pytest.raises(ValueError, match="give at least") as caught:
        document("multi_query", 10)
    least = int(str(caught.value).split("at least ")[1].split(",")[0])
    assert len(document("multi_query", least, seed=0).tokens) == least


def test_a_list_of_records_asks_for_keys_as_they_were_planted():
    """A tokenizer may have one token for `@cd` and others for ` cd`: a key is one piece."""
    pieces: dict[str, int] = {}

    def encode(text):  # one token for every text that is encoded apart
        return [pieces.setdefault(text, 1000 + len(pieces))]

    found = make_document(
        "multi_query", encode, 40, random.Random(0), filler=[0] * 40, style="records"
    )
    asked = found.tokens[: found.answers[0].start]
    keys = [found.tokens[answer.source - 1] for answer in found.answers]
    assert asked[-len(keys) - 1 : -1] == keys
