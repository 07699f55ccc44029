"""docs/long-texts.md: its snippets run, on texts that need several windows, and do what the page says."""

import copy
import re
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import TrainingArguments

import fastbert
from bench.train import report
from fastbert.cli.tasks import word_tokenizer
from fastbert.testing.models import counting
from fastbert.testing.rows import DEVICE
from tests.bench.train.training import FILES, invoke, save_model
from tests.models.tiny import BASE, CLASSIFICATION, KINDS, make

PAGE = (Path(__file__).parents[2] / "docs" / "long-texts.md").read_text()
CLASSIFY, EMBED, OUTPUT, RERANK, LOOP, TRAINER, POOL = re.findall(r"```python\n(.*?)```", PAGE, re.S)
(COMMAND,) = re.findall(r"```\n(python .*?)\n```", PAGE)
REGRESSION = next(kind for kind in KINDS if kind.name == "regression")
WORDS = [f"w{number:02d}" for number in range(50)]
SMALL = {"vocab_size": 55, "max_position_embeddings": 512, "num_hidden_layers": 1}


def text_of(count, start=0):
    return " ".join(WORDS[(start + i) % 50] for i in range(count))


@pytest.fixture
def names():
    tokenizer = word_tokenizer([" ".join(WORDS)])
    model = make(CLASSIFICATION, **SMALL)
    texts = [text_of(600), text_of(9, 3)]
    return {"fastbert": fastbert, "torch": torch, "tokenizer": tokenizer, "model": model, "texts": texts}


def saved(folder, kind, names):
    make(kind, **SMALL).save_pretrained(folder)
    names["tokenizer"].save_pretrained(folder)
    return str(folder)


def test_classify(names):
    stock = copy.deepcopy(names["model"])
    with counting() as launched:
        exec(CLASSIFY, names)
    assert launched and names["batch"]["windows"] == [2, 1] and names["batch"]["lengths"] == [512, 220, 11]
    with torch.inference_mode():
        expected = names["windows"].run(stock, names["batch"]).argmax(-1)
    assert names["labels"].tolist() == expected.tolist()


def test_embed(names, tmp_path):
    names["embedder"] = SentenceTransformer(saved(tmp_path, BASE, names), device=str(DEVICE))
    exec(EMBED, names)
    assert names["embeddings"].shape == (2, 40)
    torch.testing.assert_close(names["embeddings"].norm(dim=-1), torch.ones(2, device=DEVICE))
    names["bert"] = make(BASE, **SMALL)
    exec(OUTPUT, names)
    assert names["embeddings"].shape == names["first_tokens"].shape == (2, 40) and names["batch"]["windows"] == [3, 1]


def test_rerank(names, tmp_path):
    names["reranker"] = CrossEncoder(saved(tmp_path, REGRESSION, names), device=str(DEVICE))
    names |= {"query": "w01 w02", "documents": names["texts"]}
    exec(RERANK, names)
    assert names["scores"].shape == (2,) and names["batch"]["windows"] == [2, 1]
    score = names["reranker"].predict([("w01 w02", names["texts"][1])], activation_fn=torch.nn.Identity())
    assert float(names["scores"][1]) == pytest.approx(float(score[0]), abs=1e-5)


def test_train(names, tmp_path):
    names["batches"] = [(names["texts"], torch.tensor([0, 2], device=DEVICE))]
    before = copy.deepcopy(names["model"].state_dict())
    exec(LOOP, names)
    assert all(not torch.equal(names["model"].state_dict()[name], before[name]) for name in ("classifier.bias",))
    rows = {"text": [*names["texts"], text_of(3), text_of(4)], "label": [0, 2, 1, 1]}
    names["training_args"] = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        disable_tqdm=True, use_cpu=DEVICE.type == "cpu", dataloader_pin_memory=False, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    names["dataset"] = Dataset.from_dict(rows)
    start = copy.deepcopy(names["model"]).eval()
    exec(TRAINER, names)
    trainer = names["trainer"]
    logits = names["windows"].run(start, names["windows"](rows["text"]).to(DEVICE))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(rows["label"], device=DEVICE)).item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)
    predicted = trainer.predict(names["rows"])
    assert predicted.predictions.shape == (4, 3) and predicted.label_ids.tolist() == rows["label"]
    names["model"].eval()
    exec(POOL, names)
    again = names["windows"].run(names["model"], names["batch"])
    torch.testing.assert_close(names["logits"], again)


def test_the_command(tmp_path):
    torch.manual_seed(0)
    said = {
        "reviews.tsv": str(FILES["classification"]),
        "path/to/bert": str(save_model(tmp_path / "model")),
        "128": "4",
    }
    arguments = [said.get(word, word) for word in shlex.split(COMMAND)[4:]]
    code, text = invoke(*arguments, "--steps", 1, "--max-length", 16, "--lane", "stock", "--out", tmp_path / "out")
    assert code == 0, text
    data = report.read(tmp_path / "out" / report.RESULTS).data
    assert data.windows == "overlap: windows of 16 tokens that share 4, at most 8 of a text; pooling of their logits: mean"
