"""Defines the tasks in a table: model class, labels, model inputs and metrics."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from bench.stream.masking import SPECIAL, WORD_STARTS
from bench.train import metrics
from bench.train.file import Row
from bench.train.labels import in_order
from fastbert.errors import InputError

INPUTS = ("input_ids", "token_type_ids", "attention_mask")


@dataclass(frozen=True)
class Task:
    """What distinguishes a task: its name in fastbert.cli.tasks, the columns that the collator takes beside the tokens, the
    labels of loss and metrics, the reduction of the logits, and the metrics (None: made from the data).
    """

    head: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    reduce: Callable[[Any, Any], Any]
    compute: Callable[[Any], metrics.Metrics] | None = None

    @property
    def kept(self) -> tuple[str, ...]:
        return (*INPUTS, *self.columns)


_LABELS = ("labels",)
_SPAN = ("start_positions", "end_positions")
_NEXT = "next_sentence_label"
TASKS = {
    "classification": Task("classification", _LABELS, _LABELS, metrics.best, metrics.classes),
    "matching": Task("classification", _LABELS, _LABELS, metrics.best, metrics.classes),
    "ner": Task("ner", _LABELS, _LABELS, metrics.best),
    "qa": Task("qa", _SPAN, _SPAN, metrics.unchanged),
    "multiple-choice": Task("multiple-choice", _LABELS, _LABELS, metrics.best, metrics.choices),
    "mlm": Task("mlm", (SPECIAL, WORD_STARTS), _LABELS, metrics.masked_likelihood, metrics.perplexity),
    "pretraining": Task(
        "pretraining",
        (SPECIAL, WORD_STARTS, _NEXT),
        ("labels", _NEXT),
        metrics.pretraining,
        metrics.pretraining_metrics,
    ),
    "clm": Task("clm", (), _LABELS, metrics.causal_likelihood, metrics.perplexity),
}


def label_names(rows: list[Row]) -> list[str]:
    """All labels in order; empty for a task without labels."""
    return in_order({row["label"] for row in rows if "label" in row} | {tag for row in rows for tag in row.get("tags", ())})


def check_labels(rows: list[Row], known: list[str], where: str) -> None:
    """Raise InputError for the first row with a label that does not occur in training."""
    own = set(known)
    for row in rows:
        for name in (*((row["label"],) if "label" in row else ()), *row.get("tags", ())):
            if name not in own:
                few = ", ".join(known[:6]) + (", ..." if len(known) > 6 else "")
                raise InputError(f"{where}, row {row['row']}: the label {name!r} does not occur in training: {few}")


def split(task: str, rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split into training and evaluation rows, drawn by `datasets` from the seed."""
    # A random next-sentence pair takes its second sentence from another document of the same part.
    fewest = 2 if task == "pretraining" else 1
    if len(rows) < 2 * fewest:
        what = "documents" if task == "pretraining" else "rows"
        raise InputError(f"--data: expected {2 * fewest} {what} or more to hold some back for evaluation, got {len(rows)}")
    count = min(max(round(share * len(rows)), fewest), len(rows) - fewest)
    parts = Dataset.from_dict({"index": list(range(len(rows)))}).train_test_split(count, seed=seed)
    return [rows[i] for i in parts["train"]["index"]], [rows[i] for i in parts["test"]["index"]]


def sentence_pairs(documents: list[Row], seed: int) -> list[Row]:
    """Next-sentence pairs: in half of them the second sentence follows the first, in the other half it is random."""
    draw = random.Random(seed)
    places = [(d, i) for d, document in enumerate(documents) for i in range(len(document["sentences"]) - 1)]
    if not places or len(documents) < 2:
        raise InputError(
            "--data: next-sentence pairs need two or more documents, separated by empty lines, with two sentences in one "
            f"of them, one sentence per line; got {len(documents)} with {len(places)} pairs"
        )
    kinds = [i % 2 for i in range(len(places))]
    draw.shuffle(kinds)
    pairs = []
    for (d, i), is_random in zip(places, kinds, strict=True):
        second = documents[d]["sentences"][i + 1]
        if is_random:
            other = draw.choice([k for k in range(len(documents)) if k != d])
            second = draw.choice(documents[other]["sentences"])
        pairs.append(
            {
                "row": documents[d]["row"] + i,
                "text": documents[d]["sentences"][i],
                "second": second,
                "random": is_random,
            }
        )
    return pairs


def metrics_for(task: str, names: list[str], rows: list[Row], features: Dataset) -> Callable[[Any], metrics.Metrics]:
    """The function that computes the metrics of the evaluation's predictions."""
    if task == "ner":
        return metrics.entities(names)
    if task == "qa":
        spans = features.select_columns(["spans", "question_row"])
        return metrics.answers(rows, list(spans))
    compute = TASKS[task].compute
    assert compute is not None
    return compute
