"""docs/long-texts.md, on texts that need several windows: classes, embeddings, scores, both ways to train, pooling."""

import copy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import TrainingArguments

import fastbert
from fastbert.cli.tasks import word_tokenizer
from fastbert.testing.models import counting
from fastbert.testing.rows import DEVICE
from tests.docs.play import Names, Play
from tests.models.tiny import BASE, CLASSIFICATION, KINDS, make

REGRESSION = next(kind for kind in KINDS if kind.name == "regression")
WORDS = [f"w{number:02d}" for number in range(50)]
SMALL = {"vocab_size": 55, "max_position_embeddings": 512, "num_hidden_layers": 1}


def play(folder: Path) -> Play:
    tokenizer = word_tokenizer([" ".join(WORDS)])
    texts = [text_of(600), text_of(9, 3)]
    names: Names = {"fastbert": fastbert, "torch": torch, "tokenizer": tokenizer, "texts": texts}

    def saved(name: str, kind: object) -> str:
        make(kind, **SMALL).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        return str(folder / name)

    names["model"] = make(CLASSIFICATION, **SMALL)
    stock = copy.deepcopy(names["model"])
    with counting() as launched:
        yield names
    assert launched and names["batch"]["windows"] == [2, 1] and names["batch"]["lengths"] == [512, 220, 11]
    with torch.inference_mode():
        expected = names["windows"].run(stock, names["batch"]).argmax(-1)
    assert names["labels"].tolist() == expected.tolist()

    names["embedder"] = SentenceTransformer(saved("embedder", BASE), device=str(DEVICE))
    yield names
    assert names["embeddings"].shape == (2, 40)
    torch.testing.assert_close(names["embeddings"].norm(dim=-1), torch.ones(2, device=DEVICE))
    names["bert"] = make(BASE, **SMALL)
    yield names
    assert names["embeddings"].shape == names["first_tokens"].shape == (2, 40) and names["batch"]["windows"] == [3, 1]

    names |= {"reranker": CrossEncoder(saved("reranker", REGRESSION), device=str(DEVICE))}
    names |= {"query": "w01 w02", "documents": texts}
    yield names
    assert names["scores"].shape == (2,) and names["batch"]["windows"] == [2, 1]
    score = names["reranker"].predict([("w01 w02", texts[1])], activation_fn=torch.nn.Identity())
    assert float(names["scores"][1]) == pytest.approx(float(score[0]), abs=1e-5)

    names["batches"] = [(texts, torch.tensor([0, 2], device=DEVICE))]
    before = names["model"].classifier.bias.detach().clone()
    yield names
    assert not torch.equal(names["model"].classifier.bias, before)

    rows = {"text": [*texts, text_of(3), text_of(4)], "label": [0, 2, 1, 1]}
    names["training_args"] = TrainingArguments(
        output_dir=str(folder / "training"), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], disable_tqdm=True, use_cpu=DEVICE.type == "cpu", dataloader_pin_memory=False, save_strategy="no",
        logging_steps=1,
    )  # fmt: skip
    names["dataset"] = Dataset.from_dict(rows)
    start = copy.deepcopy(names["model"]).eval()
    yield names
    trainer = names["trainer"]
    logits = names["windows"].run(start, names["windows"](rows["text"]).to(DEVICE))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(rows["label"], device=DEVICE)).item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)
    predicted = trainer.predict(names["rows"])
    assert predicted.predictions.shape == (4, 3) and predicted.label_ids.tolist() == rows["label"]

    names["model"].eval()
    yield names
    again = names["windows"].run(names["model"], names["batch"])
    torch.testing.assert_close(names["logits"], again)


def text_of(count: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + i) % 50] for i in range(count))
