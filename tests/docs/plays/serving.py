"""docs/serving.md, with graphs recorded on the CPU: a service, other holders of a model, buckets, warming up, the report."""

from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import pipeline

import fastbert
from fastbert.cli.tasks import word_tokenizer
from fastbert.testing.graphs import recording_graphs
from fastbert.testing.rows import DEVICE
from tests.docs.play import Names, Play
from tests.graphs.serving import LINES, graphs_row
from tests.models.tiny import BASE, CLASSIFICATION, KINDS, make, make_batch

REGRESSION = next(kind for kind in KINDS if kind.name == "regression")


def play(folder: Path) -> Play:
    if DEVICE.type != "cpu":
        pytest.skip("fastbert.testing.graphs records on the CPU only; tests/graphs/test_gpu*.py capture real graphs")
    tokenizer = word_tokenizer(LINES)
    requests = [make_batch(CLASSIFICATION, labels=False, seed=seed, length=(9, 20)[seed % 2]) for seed in range(6)]
    shared = {"fastbert": fastbert, "torch": torch, "tokenizer": tokenizer, "requests": requests}

    def served() -> Names:
        return shared | {"model": fastbert.patch(small(tokenizer), cuda_graphs=True)}

    with recording_graphs() as recorders:
        names = {"tokenizer": tokenizer, "model": small(tokenizer)}
        yield names, {"bfloat16": "float16"}  # Triton's interpreter has no bfloat16
        warmed_up = sum(recorder.captures for recorder in recorders)
        answers = [names["answer"]([line]) for line in LINES]
        assert all(sum(scores) == pytest.approx(1.0, abs=1e-3) for (scores,) in answers)
        with torch.inference_mode():
            for length in range(1, 129, 7):
                names["model"](**single(length))
        assert sum(recorder.captures for recorder in recorders) == warmed_up == 11
        row = graphs_row(names["model"])
        assert names["model"].dtype == torch.float16 and row.kernel_calls == 16 + 6 + 19 and not row.fallback_calls

        classifier = saved(folder / "classifier", CLASSIFICATION, tokenizer)
        names = shared | {
            "pipe": pipeline("text-classification", model=classifier, tokenizer=classifier),
            "embedder": SentenceTransformer(saved(folder / "embedder", BASE, tokenizer)),
            "reranker": CrossEncoder(saved(folder / "reranker", REGRESSION, tokenizer)),
            "texts": LINES[:4],
        }
        yield names
        assert len(names["answers"]) == len(names["embeddings"]) == 4 and len(names["ranks"]) == 3
        for holder in (names["pipe"].model, names["embedder"], names["reranker"]):
            assert graphs_row(holder).kernel_calls == 1 and not graphs_row(holder).fallback_calls

        names = served()
        yield names
        with torch.inference_mode():
            for request in requests:
                names["model"](**request)
            names["model"](**make_batch(CLASSIFICATION, labels=False, length=128))
        assert graphs_row(names["model"]).kernel_calls == 7
        assert names["model"]._fastbert_graphs.options.max_graphs == 16

        names = served() | {"typical_batches": requests}
        yield names
        assert graphs_row(names["model"]).kernel_calls == 6

        yield served()


def small(tokenizer: object) -> torch.nn.Module:
    return make(CLASSIFICATION, vocab_size=len(tokenizer), max_position_embeddings=128, num_hidden_layers=1)


def saved(folder: Path, kind: object, tokenizer: object) -> str:
    make(kind, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    return str(folder)


def single(length: int) -> dict[str, torch.Tensor]:
    ids = torch.ones(1, length, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
