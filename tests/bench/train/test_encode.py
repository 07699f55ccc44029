"""Rows to tokens: what is cut and where labels and answers stand afterwards."""

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bench.train import data, encode
from bench.train.encode import IGNORED, kept, pieces
from tests.bench.train.training import FILES, make_tokenizer

SINGLE = [None, *[0] * 10, None]  # [CLS] and ten tokens and [SEP]
PAIR = [None, *[0] * 3, None, *[1] * 8, None]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize(
    ("truncation", "places"),
    [("head", [1, 2, 3, 4, 5]), ("tail", [6, 7, 8, 9, 10]), ("head+tail", [1, 2, 3, 9, 10])],
)
def test_what_stays_of_a_text(truncation, places):
    assert kept(SINGLE, 7, truncation) == [0, *places, 11]
    assert kept(SINGLE, 12, truncation) == list(range(12)), "what fits stays whole"


def test_of_a_pair_the_longer_loses_first():
    assert kept(PAIR, 10, "head") == [0, 1, 2, 3, 4, 5, 6, 7, 8, 13]
    assert kept(PAIR, 7, "head") == [0, 1, 2, 4, 5, 6, 13], "then both are cut to a half"
    assert kept(PAIR, 8, "tail") == [0, 1, 2, 3, 4, 11, 12, 13]


def test_pieces_hold_every_token_once():
    found = pieces(SINGLE, 6)
    assert [piece[1:-1] for piece in found] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert all(piece[0] == 0 and piece[-1] == 11 for piece in found)
    assert pieces([None, None], 6) == [[0, 1]], "a text without a token has one piece"


def windows_of(tokenizer, question, context, limit, answer="", start=0):
    row = {
        "row": 1,
        "question": question,
        "context": context,
        "starts": [start] if answer else [],
        "answers": [answer] * (answer != ""),
    }
    return encode.in_windows(tokenizer, [row], limit)


@pytest.mark.parametrize("length", [1, 7, 8, 20, 21, 50])
def test_windows_overlap_and_leave_nothing_out(tokenizer, length):
    found = windows_of(tokenizer, "the the", " ".join(["the"] * length), 14)
    contexts = [[low for low, _ in window["spans"] if low >= 0] for window in found]
    assert sorted({low for context in contexts for low in context}) == [4 * i for i in range(length)]
    assert all(len(window["input_ids"]) <= 14 for window in found)
    assert all(len(set(a) & set(b)) == 9 // 3 for a, b in zip(contexts, contexts[1:], strict=False))
    assert all(set(b) - set(a) for a, b in zip(contexts, contexts[1:], strict=False)), "each adds something"


def test_a_window_is_what_the_tokenizer_makes_of_the_pair(tokenizer):
    for limit in (14, 64):
        found = windows_of(tokenizer, "the soup", "the the the soup the the the soup the the", limit)
        stride = (limit - 3 - 2) // 3
        options = {"truncation": "only_second", "return_overflowing_tokens": True, "return_token_type_ids": True}
        pair = "the soup", "the the the soup the the the soup the the"
        encoded = tokenizer(*pair, max_length=limit, stride=stride, **options)
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            assert [window[name] for window in found] == encoded[name]


def test_a_question_longer_than_the_limit_leaves_room_for_its_context(tokenizer):
    found = windows_of(tokenizer, " ".join(["the"] * 30), " ".join(["the"] * 20), 20)
    assert len(found) > 1 and all(len(window["input_ids"]) <= 20 for window in found)
    assert all(any(low >= 0 for low, _ in window["spans"]) for window in found)


def features_of(task, tokenizer, limit=48, truncation="head", labels=None):
    rows = data.read(task, FILES[task])
    return rows, encode.encode(Dataset.from_list(rows), task, tokenizer, limit, truncation, labels or {})


def test_a_words_label_stands_at_its_first_token(tokenizer):
    labels = {name: i for i, name in enumerate(("O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"))}
    rows, features = features_of("ner", tokenizer, labels=labels)
    for row, own in zip(rows, features, strict=True):
        assert [label for label in own["labels"] if label != IGNORED] == [labels[tag] for tag in row["tags"]]
        tokens = tokenizer.convert_ids_to_tokens(own["input_ids"])
        assert all(label == IGNORED for label, token in zip(own["labels"], tokens, strict=True) if token[:2] == "##")
    assert any(token[:2] == "##" for own in features for token in tokenizer.convert_ids_to_tokens(own["input_ids"]))


def test_a_blank_word_has_no_token_and_shifts_no_label(tokenizer):
    rows = Dataset.from_list([{"row": 1, "words": ["the", " ", "soup"], "tags": ["O", "O", "B"]}])
    (own,) = encode.encode(rows, "ner", tokenizer, 48, "head", {"O": 0, "B": 1})
    assert [label for label in own["labels"] if label != IGNORED] == [0, 1]


@pytest.mark.parametrize("limit", [28, 48, 200])
def test_an_answer_is_found_again_from_its_positions(tokenizer, limit):
    rows, features = features_of("qa", tokenizer, limit)
    by_row = {row["row"]: row for row in rows}
    found = set()
    for own in features:
        first, last = own["start_positions"], own["end_positions"]
        row = by_row[own["question_row"]]
        if (first, last) != (0, 0):
            start, end = own["spans"][first][0], own["spans"][last][1]
            assert row["context"][start:end] == row["answers"][0]
            found.add(row["row"])
    answered = {row["row"] for row in rows if row["answers"]}
    assert found <= answered and (found == answered or limit == 28)


@pytest.mark.parametrize(
    ("answer", "start", "places"),
    [
        ("Anna Berg came home", 0, [(3, 6), (0, 0)]),
        ("Berg came home again", 5, [(0, 0), (0, 0)]),
        ("home again", 15, [(0, 0), (3, 4)]),
        ("home", 15, [(6, 6), (3, 3)]),
    ],
)
def test_an_answer_that_does_not_stand_whole_is_none(answer, start, places):
    """Two windows of four words each, behind [CLS], a question of one word and [SEP]."""
    words = {name: i for i, name in enumerate(("[CLS]", "[SEP]", "[UNK]", "who", "Anna", "Berg", "came", "home", "again"))}
    own = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    found = windows_of(PreTrainedTokenizerFast(tokenizer_object=own), "who", "Anna Berg came home again Anna", 8, answer, start)
    assert [(window["start_positions"], window["end_positions"]) for window in found] == places


def test_each_ending_stands_behind_the_context(tokenizer):
    rows, features = features_of("multiple-choice", tokenizer)
    for row, own in zip(rows, features, strict=True):
        texts = [tokenizer.decode(ids, skip_special_tokens=True).replace(" ##", "") for ids in own["input_ids"]]
        assert len(texts) == len(row["endings"]) == 3 and own["labels"] == row["choice"]
        assert all(own["token_type_ids"][i][-1] == 1 for i in range(3))
        assert len(set(texts)) == 3


def test_the_limit_is_the_95th_percentile(tokenizer):
    assert encode.percentile([*range(1, 101)]) == 96
    rows = Dataset.from_list(data.read("classification", FILES["classification"]))
    lengths, unknown = encode.lengths(rows, "classification", tokenizer)
    assert len(lengths) == 16 and lengths[0] == len(tokenizer(rows[0]["text"])["input_ids"]) and unknown == 0
    rows = Dataset.from_list([{"row": 1, "text": "the \N{SNOWMAN} the", "label": "a"}])
    assert encode.lengths(rows, "classification", tokenizer) == ([5], 1)
