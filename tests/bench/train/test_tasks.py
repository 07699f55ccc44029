"""Splits, next-sentence pairs, masks and metrics of `python -m bench train`."""

from collections import Counter

import numpy
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from bench.train import encode, metrics, tasks
from bench.train.batches import Collator, Rows
from bench.train.data import read
from bench.train.encode import IGNORED
from bench.train.sharding import Parts
from fastbert.errors import InputError
from tests.bench.train.training import FILES, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_the_split_is_the_seeds():
    rows = [{"row": i} for i in range(50)]
    train, evaluation = tasks.split("mlm", rows, 0.1, seed=1)
    assert len(evaluation) == 5 and sorted(row["row"] for row in train + evaluation) == list(range(50))
    assert tasks.split("mlm", rows, 0.1, seed=1)[1] == evaluation
    assert tasks.split("mlm", rows, 0.1, seed=2)[1] != evaluation
    assert len(tasks.split("mlm", rows, 0.0, seed=1)[1]) == 1, "there is always something to evaluate"
    with pytest.raises(InputError, match="4 documents or more to hold some back for evaluation, got 3"):
        tasks.split("pretraining", rows[:3], 0.5, 0)


def test_labels_in_their_order():
    assert tasks.label_names([{"label": name} for name in ("10", "9", "-1")]) == ["-1", "9", "10"]
    assert tasks.label_names([{"label": "b"}, {"tags": ["a", "c"]}]) == ["a", "b", "c"]


def test_an_unknown_label_is_one_line():
    with pytest.raises(InputError, match="file, row 7: the label 'c' does not occur in training: a, b$"):
        tasks.check_labels([{"row": 5, "label": "a"}, {"row": 7, "label": "c"}], ["a", "b"], "file")


def test_next_sentence_pairs_are_half_real():
    documents = read("pretraining", FILES["pretraining"])
    pairs = tasks.sentence_pairs(documents, seed=0)
    following = {a: b for d in documents for a, b in zip(d["sentences"], d["sentences"][1:], strict=False)}
    assert Counter(pair["random"] for pair in pairs) == {0: 9, 1: 9}
    for pair in pairs:
        own = next(d["sentences"] for d in documents if pair["text"] in d["sentences"])
        assert (following[pair["text"]] == pair["second"]) == (not pair["random"])
        assert (pair["second"] in own) == (not pair["random"]), "a random one is another document's"
    assert tasks.sentence_pairs(documents, seed=1) != pairs


@pytest.mark.parametrize("documents", [[["one", "two"]], [["one"], ["two"]]])
def test_pairs_need_documents_with_sentences(documents):
    rows = [{"row": i, "sentences": sentences} for i, sentences in enumerate(documents)]
    with pytest.raises(InputError, match="next-sentence pairs need two or more documents"):
        tasks.sentence_pairs(rows, 0)


def masked_batches(tokenizer, epoch=0, seed=0):
    ids = [5 + i % 200 for i in range(400)]
    row = {"input_ids": ids, "token_type_ids": [0] * 400, "attention_mask": [1] * 400, "special_tokens_mask": [0] * 400}
    rows = Rows(Dataset.from_list([row] * 64), seed, tuple(row))
    rows.epoch = epoch
    return Collator("mlm", tokenizer)([rows[i] for i in range(64)])


def test_masks_are_15_percent_of_80_10_10(tokenizer):
    batch = masked_batches(tokenizer)
    chosen = batch["labels"] != IGNORED
    assert chosen.float().mean() == pytest.approx(0.15, abs=0.01)
    ids, labels = batch["input_ids"][chosen], batch["labels"][chosen]
    assert (ids == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.03)
    assert (ids == labels).float().mean() == pytest.approx(0.1, abs=0.03)


def test_masks_are_the_rows_and_the_epochs_alone(tokenizer):
    first = masked_batches(tokenizer)
    torch.rand(5)  # a lane that draws dropout in its own way
    assert torch.equal(masked_batches(tokenizer)["labels"], first["labels"])
    assert not torch.equal(masked_batches(tokenizer, epoch=1)["labels"], first["labels"])
    assert not torch.equal(masked_batches(tokenizer, seed=1)["labels"], first["labels"])
    state = torch.get_rng_state()
    masked_batches(tokenizer)
    assert torch.equal(torch.get_rng_state(), state), "dropout goes on from where it was"


def test_padding_is_dynamic_and_the_tally_counts_real_tokens(tokenizer):
    rows = read("classification", FILES["classification"])
    labels = {"good": 0, "bad": 1, "fair": 2}
    features = encode.encode(Dataset.from_list(rows), "classification", tokenizer, 48, "head", labels)
    data, collator = Rows(features, 0, tasks.TASKS["classification"].kept), Collator("classification", tokenizer)
    for i in (0, 6):
        batch = collator([data[i], data[i + 1]])
        assert batch["input_ids"].shape[1] == max(len(features[j]["input_ids"]) for j in (i, i + 1))
    assert collator.tokens == [sum(len(features[j]["input_ids"]) for j in (i, i + 1)) for i in (0, 6)]
    collator([data[0], data[1]])
    assert collator.checksums[0] == collator.checksums[2] != collator.checksums[1]


def test_rows_with_spans_are_padded_alike_on_every_rank(tokenizer):
    lengths = (4, 9, 5, 7, 3, 8)
    features = [{"input_ids": [5] * n, "attention_mask": [1] * n, "start_positions": 1, "end_positions": 2} for n in lengths]
    rows, collator = Rows(Dataset.from_list(features), 0, tuple(features[0])), Collator("qa", tokenizer)
    alone = next(iter(Parts(rows, 4)))
    parts = [next(iter(Parts(rows, 4, rank, 2))) for rank in range(2)]
    widths = {collator([rows[place] for place in part])["input_ids"].shape[1] for part in (alone, *parts)}
    assert widths == {max(lengths[row] for row, _ in alone)}
    assert collator([rows[0], rows[2]])["input_ids"].shape[1] == 9, "an evaluation pads to the longest of its rows"


def test_perplexity_counts_every_label_once():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    labels[0, 1:] = IGNORED
    reduced = metrics.masked_likelihood(logits, labels).numpy()
    expected = cross_entropy(logits.view(-1, 7), labels.view(-1), ignore_index=IGNORED).exp().item()
    assert metrics.perplexity(EvalPrediction(reduced, None))["perplexity"] == pytest.approx(expected)
    causal = metrics.causal_likelihood(logits, labels).sum(0)
    shifted = cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), ignore_index=IGNORED)
    assert (causal[0] / causal[1]).item() == pytest.approx(shifted.item())


def test_entity_f1_is_of_whole_entities():
    names = ["B-PER", "I-PER", "O"]
    labels = numpy.array([[IGNORED, 0, 1, 2, 0, IGNORED]])
    found = numpy.array([[0, 0, 2, 2, 0, 0, IGNORED]])  # half an entity is none
    scores = metrics.entities(names)(EvalPrediction(found, labels))
    assert scores == {"entity F1": 0.5, "token accuracy": 0.75}
    plain = metrics.entities(["NOUN", "VERB"])(EvalPrediction(numpy.array([[0, 0]]), numpy.array([[0, 1]])))
    assert plain == {"macro F1": pytest.approx(1 / 3), "token accuracy": 0.5}


def test_answers_take_the_best_span_of_all_windows():
    context = "Anna Berg came home"
    spans = [[-1, -1], [0, 4], [5, 9], [10, 14], [15, 19]]
    rows = [{"row": 1, "context": context, "answers": ["Anna Berg"]}]
    features = [{"question_row": 1, "spans": spans}, {"question_row": 1, "spans": spans[:3]}]
    starts = numpy.array([[9, 0, 0, 2, 0], [9, 5, 0, -100, -100]], dtype=float)
    ends = numpy.array([[9, 0, 0, 2, 0], [9, 0, 5, -100, -100]], dtype=float)
    judge = metrics.answers(rows, features)
    assert judge(EvalPrediction((starts, ends), None)) == {"exact match": 100.0, "F1": 100.0}
    starts[1, 1] = 1.0  # now the word "came" of the first window is no worse
    ends[1, 2] = 1.0
    assert judge(EvalPrediction((starts, ends), None)) == {"exact match": 0.0, "F1": 0.0}


def test_no_answer_is_said_only_where_some_question_has_none():
    spans = [[-1, -1], [0, 4]]
    rows = [{"row": 1, "context": "Anna", "answers": ["Anna"]}, {"row": 2, "context": "Anna", "answers": []}]
    features = [{"question_row": n, "spans": spans} for n in (1, 2)]
    logits = numpy.array([[0.0, 5.0], [5.0, 0.0]])
    prediction = EvalPrediction((logits, logits), None)
    assert metrics.answers(rows, features)(prediction)["exact match"] == 100.0
    rows[1]["answers"] = ["Anna"]
    assert metrics.answers(rows, features)(prediction)["exact match"] == 100.0, "then the best span, always"
