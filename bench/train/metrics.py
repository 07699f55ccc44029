"""Computes each task's metrics with scikit-learn, seqeval and SQuAD's rule for answers, without downloads."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from bench.train.data import Row
from bench.train.encode import IGNORED

Metrics = dict[str, float]
Compute = Callable[[EvalPrediction], Metrics]
LONGEST_ANSWER = 30  # tokens, as in SQuAD's own scripts
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def best(logits: Tensor, labels: Any) -> Tensor:
    """Reduce the logits to what the metrics need: the highest class."""
    return logits.argmax(-1)


def unchanged(logits: Any, labels: Any) -> Any:
    return logits


def masked_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Reduce the logits to [rows, 2]: the sum of the negative log-likelihoods of a row's labels, and their number."""
    per_token = cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return torch.stack([per_token.double().sum(1), (labels != IGNORED).double().sum(1)], dim=1)


def causal_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    return masked_likelihood(logits[:, :-1], labels[:, 1:])


def pretraining(logits: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return masked_likelihood(logits[0], labels[0]), logits[1].argmax(-1)


def classes(prediction: EvalPrediction) -> Metrics:
    labels, found = prediction.label_ids, prediction.predictions
    return {"accuracy": accuracy_score(labels, found), "macro F1": f1_score(labels, found, average="macro")}


def choices(prediction: EvalPrediction) -> Metrics:
    return {"accuracy": accuracy_score(prediction.label_ids, prediction.predictions)}


def entities(names: Sequence[str]) -> Compute:
    """Entity F1 if the labels are those of entities (B-PER, I-PER, ..., O), otherwise macro F1 of the tokens."""
    tagged = any(name[:2] in ("B-", "I-", "E-", "S-") for name in names)

    def compute(prediction: EvalPrediction) -> Metrics:
        labels, found = prediction.label_ids, prediction.predictions[:, : prediction.label_ids.shape[1]]
        seen = labels != IGNORED
        accuracy = {"token accuracy": accuracy_score(labels[seen], found[seen])}
        if not tagged:
            return {"macro F1": f1_score(labels[seen], found[seen], average="macro")} | accuracy
        rows = list(zip(labels, found, seen, strict=True))
        truth = [[names[i] for i in own[shown]] for own, _, shown in rows]
        guess = [[names[i] for i in own[shown]] for _, own, shown in rows]
        return {"entity F1": entity_f1(truth, guess, zero_division=0)} | accuracy

    return compute


def perplexity(prediction: EvalPrediction) -> Metrics:
    return {"perplexity": _perplexity(prediction.predictions)}


def pretraining_metrics(prediction: EvalPrediction) -> Metrics:
    likelihoods, found = prediction.predictions
    accuracy = accuracy_score(prediction.label_ids[1], found)
    return {"perplexity": _perplexity(likelihoods), "next-sentence accuracy": accuracy}


def _perplexity(likelihoods: numpy.ndarray) -> float:
    total, count = likelihoods.sum(0)
    return math.exp(min(total / max(count, 1.0), 700.0))


def answers(rows: Sequence[Row], features: Sequence[dict[str, Any]]) -> Compute:
    """Exact match and F1 of the best span over all windows of a question, in percent as in SQuAD."""
    by_row = {row["row"]: row for row in rows}
    may_be_none = any(not row["answers"] for row in rows)

    def compute(prediction: EvalPrediction) -> Metrics:
        starts, ends = prediction.predictions
        found: dict[int, tuple[float, str]] = {}
        none: dict[int, float] = {}
        for feature, start, end in zip(features, starts, ends, strict=True):
            number = feature["question_row"]
            none[number] = min(none.get(number, math.inf), float(start[0] + end[0]))
            score, text = _span(by_row[number]["context"], feature["spans"], start, end)
            if number not in found or score > found[number][0]:
                found[number] = score, text
        said = {n: "" if may_be_none and none[n] > score else text for n, (score, text) in found.items()}
        judged = [(row["answers"] or [""], said[number]) for number, row in by_row.items()]
        exact = [max(words(gold) == words(text) for gold in golds) for golds, text in judged]
        overlap = [max(word_f1(gold, text) for gold in golds) for golds, text in judged]
        return {"exact match": 100 * float(numpy.mean(exact)), "F1": 100 * float(numpy.mean(overlap))}

    return compute


def words(answer: str) -> list[str]:
    """An answer normalised as in SQuAD's evaluation: lower case, no punctuation, then no articles."""
    return re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_NO_PUNCTUATION)).split()


def word_f1(gold: str, answer: str) -> float:
    """F1 of the words of two answers. If either has no words, 1 if both have none, otherwise 0."""
    right, said = words(gold), words(answer)
    if not right or not said:
        return float(right == said)
    shared = (Counter(right) & Counter(said)).total()
    return 2 * shared / (len(right) + len(said))


def _span(context: str, spans: list[list[int]], start: numpy.ndarray, end: numpy.ndarray) -> tuple[float, str]:
    """Score and text of the best span within the context, of at most LONGEST_ANSWER tokens."""
    inside = numpy.array([low >= 0 for low, _ in spans])
    count = len(spans)
    low = numpy.where(inside, start[:count], -numpy.inf)
    high = numpy.where(inside, end[:count], -numpy.inf)
    scores = low[:, None] + high[None, :]
    allowed = numpy.triu(numpy.ones((count, count), dtype=bool)) & numpy.tri(count, k=LONGEST_ANSWER - 1, dtype=bool)
    scores = numpy.where(allowed, scores, -numpy.inf)
    first, last = numpy.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, last]), context[spans[first][0] : spans[last][1]]
