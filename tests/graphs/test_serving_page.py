"""docs/serving.md and the README's section on graphs: their snippets run, and their tables say what the code does."""

import re
from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import pipeline

import fastbert
from fastbert.cli.tasks import word_tokenizer
from fastbert.graphs.buckets import LEAST, Buckets, token_capacity
from fastbert.graphs.options import Options
from fastbert.testing.graphs import recording_graphs
from fastbert.testing.rows import DEVICE
from tests.graphs.serving import LINES, graphs_row
from tests.models.tiny import BASE, CLASSIFICATION, KINDS, make, make_batch

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="graphs recorded on the CPU")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()
SECTION = (ROOT / "README.md").read_text().partition("## Serve with CUDA graphs")[2].partition("\n## ")[0]
REGRESSION = next(kind for kind in KINDS if kind.name == "regression")


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.fixture
def names():
    """What the snippets use and do not define."""
    tokenizer = word_tokenizer(LINES)
    with recording_graphs() as recorders:
        yield {
            "fastbert": fastbert,
            "torch": torch,
            "model": make(CLASSIFICATION, vocab_size=len(tokenizer), max_position_embeddings=128, num_hidden_layers=1),
            "tokenizer": tokenizer,
            "requests": [make_batch(CLASSIFICATION, labels=False, seed=seed, length=(9, 20)[seed % 2]) for seed in range(6)],
            "recorders": recorders,
        }


@pytest.fixture
def served(names):
    names["model"] = fastbert.patch(names["model"], cuda_graphs=True)
    return names


def saved(folder, kind, tokenizer):
    make(kind, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    return str(folder)


SERVICE, INTERFACES, BUCKETS, TYPICAL, REPORT = snippets(PAGE)


def captures(names):
    return sum(recorder.captures for recorder in names["recorders"])


def single(length):
    ids = torch.ones(1, length, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_the_service(names):
    exec(SERVICE.replace("bfloat16", "float16"), names)  # Triton's interpreter has no bfloat16
    warmed_up = captures(names)
    answers = [names["answer"]([line]) for line in LINES]
    assert all(sum(scores) == pytest.approx(1.0, abs=1e-3) for (scores,) in answers)
    with torch.inference_mode():
        for length in range(1, 129, 7):
            names["model"](**single(length))
    assert captures(names) == warmed_up == 11
    row = graphs_row(names["model"])
    assert names["model"].dtype == torch.float16 and row.kernel_calls == 16 + 6 + 19 and not row.fallback_calls


def test_pipeline_sentence_transformer_and_cross_encoder(names, tmp_path):
    tokenizer = names["tokenizer"]
    folder = saved(tmp_path / "classifier", CLASSIFICATION, tokenizer)
    names |= {
        "pipe": pipeline("text-classification", model=folder, tokenizer=folder),
        "embedder": SentenceTransformer(saved(tmp_path / "embedder", BASE, tokenizer)),
        "reranker": CrossEncoder(saved(tmp_path / "reranker", REGRESSION, tokenizer)),
        "texts": LINES[:4],
    }
    exec(INTERFACES, names)
    assert len(names["answers"]) == len(names["embeddings"]) == 4 and len(names["ranks"]) == 3
    for holder in (names["pipe"].model, names["embedder"], names["reranker"]):
        assert graphs_row(holder).kernel_calls == 1 and not graphs_row(holder).fallback_calls


def test_buckets_of_ones_own(served):
    exec(BUCKETS, served)
    with torch.inference_mode():
        for request in served["requests"]:
            served["model"](**request)
        served["model"](**make_batch(CLASSIFICATION, labels=False, length=128))
    assert graphs_row(served["model"]).kernel_calls == 7
    assert served["model"]._fastbert_graphs.options.max_graphs == 16


def test_typical_batches(served):
    exec(TYPICAL, served | {"typical_batches": served["requests"]})
    assert graphs_row(served["model"]).kernel_calls == 6


def test_the_report_is_the_page_s(served, capsys):
    exec(REPORT, served)
    (printed,) = re.findall(r"this prints\n\n```\n(.*?)```", PAGE, re.S)
    assert capsys.readouterr().out == printed


def test_the_buckets_are_the_page_s():
    def numbers(name):
        (cell,) = re.findall(rf"^\| {name}[^|]*\| ([^|]*) \|$", PAGE, re.M)
        return [int(n) for n in re.findall(r"\d+", cell)]

    rows, lengths, tokens = numbers("rows"), numbers("length"), numbers("tokens")
    of = Buckets().of
    assert sorted({of(n, 1, 512).rows for n in range(1, rows[-1] + 1)}) == rows
    assert sorted({of(1, n, 512).length for n in range(1, lengths[-1] + 1)}) == lengths
    assert sorted({token_capacity(n) for n in range(1, tokens[-1] + 1)}) == tokens and tokens[0] == LEAST
    assert f"`max_graphs` ({Options().max_graphs})" in PAGE


def test_the_readme(names):
    (snippet,) = snippets(SECTION)
    exec(snippet, names | {"batch": names["requests"][0]})
    row = graphs_row(names["model"])
    assert row.kernel_calls == 16 + 1 and not row.fallback_calls
