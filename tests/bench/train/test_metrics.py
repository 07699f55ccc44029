"""Answers judged as SQuAD's published evaluation judges them."""

import pytest

from bench.train.metrics import word_f1, words


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("The Cat's  dog,", "cats dog"),
        ("an A.B. of\tthe\nlatter", "ab of latter"),
        ("theatre, another", "theatre another"),
        ("1,000 x-ray", "1000 xray"),
        ("Die Brücke “heißt”", "die brücke “heißt”"),
        ("a-the", "athe"),
        (" the !", ""),
    ],
)
def test_words_of_an_answer(answer, read):
    assert words(answer) == read.split()


@pytest.mark.parametrize(
    ("gold", "answer", "f1"),
    [
        ("the Anna Berg", "Anna Berg!", 1.0),
        ("Anna Berg", "Anna", 2 / 3),
        ("Anna Anna Berg", "Anna Berg Berg", 2 / 3),
        ("Anna", "Berg", 0.0),
        ("", "Berg", 0.0),
        ("Anna", "the", 0.0),
        ("", "a", 1.0),
    ],
)
def test_f1_counts_words_as_often_as_both_have_them(gold, answer, f1):
    assert word_f1(gold, answer) == pytest.approx(f1)
    assert word_f1(answer, gold) == pytest.approx(f1)
