"""Windows of a dataset, repeats in them, and the errors of means over them."""

import random

import numpy
import pytest
from evaluation_cases import VOCAB, write_repeating

from s2megatron.evaluation.loss import repeat_distances
from s2megatron.evaluation.statistics import mean
from s2megatron.evaluation.windows import Documents


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_repeating(tmp_path_factory.mktemp("data"))


def test_windows_lie_in_documents_or_run_on(dataset):
    documents = Documents(dataset, VOCAB)
    assert documents.lengths.tolist() == [120, 700, 410]
    found = list(documents.windows(200, 10))
    assert [(w.document, w.start) for w in found] == [(1, 0), (1, 201), (1, 402), (2, 0), (2, 201)]
    for window in found:
        whole = documents.read(window.document)
        assert window.tokens.tolist() == whole[window.start : window.start + 201].tolist()
    assert documents.count(200, 10) == 5 and documents.count(200, 3) == 3
    few = [(w.document, w.start) for w in documents.windows(200, 3)]
    assert few == [(1, 0), (1, 201), (2, 0)]  # every 5/3-th: spread over the dataset
    packed = list(documents.windows(200, 10, packed=True))
    text = numpy.concatenate([documents.read(i) for i in range(3)])
    assert len(packed) == documents.count(200, 10, packed=True) == 1230 // 201
    assert numpy.concatenate([w.tokens for w in packed]).tolist() == text[: 6 * 201].tolist()
    assert [w.start for w in documents.windows(200, 2, packed=True)] == [0, 603]


def test_stretches_run_on_and_start_anew(dataset):
    documents, rng = Documents(dataset, VOCAB), random.Random(0)
    text = numpy.concatenate([documents.read(i) for i in range(3)]).tolist()
    for count in (1, 500, 3000):
        for _ in range(5):
            found = documents.stretch(count, rng)
            assert len(found) == count
            at = next(i for i in range(1230) if (2 * text)[i : i + 300][:count] == found[:300])
            assert found == (4 * text)[at : at + count]


def test_documents_of_several_sequences(tmp_path):
    """As Megatron's own preprocessing makes them of sentences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path}/text.bin", dtype=numpy.uint16)
    builder.add_document(numpy.arange(9), [4, 5])
    builder.add_document(numpy.arange(20, 26), [6])
    builder.finalize(f"{tmp_path}/text.idx")
    documents = Documents(f"{tmp_path}/text", VOCAB)
    assert documents.lengths.tolist() == [9, 6]
    assert documents.read(0, 3, 6).tolist() == [3, 4, 5]
    found = [(w.document, w.start, w.tokens.tolist()) for w in documents.windows(3, 9)]
    assert found[1:] == [(0, 4, [4, 5, 6, 7]), (1, 0, [20, 21, 22, 23])]


def test_repeats_are_found_and_their_distance():
    draw = numpy.random.default_rng(0)
    tokens = draw.integers(0, 3, 500)
    seen, expected = {}, []
    for i in range(len(tokens)):
        gram = tuple(tokens[i - 4 : i + 1]) if i >= 4 else None
        expected.append(i - seen[gram] if gram in seen else 0)
        if gram:
            seen[gram] = i
    assert repeat_distances(tokens).tolist() == expected
    assert repeat_distances(tokens[:3]).tolist() == [0, 0, 0]


def test_error_is_that_of_the_samples():
    found = mean([2.0, 4.0, 9.0], [2, 2, 0])
    assert found.value == 1.5 and found.count == 4
    assert found.error == pytest.approx(0.5)  # of 1 and 2, as if each sample were one thing
    assert mean([], []).value is None and mean([3.0], [2]).error is None
