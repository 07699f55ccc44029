"""Runs the README's training snippets verbatim."""

import re
from pathlib import Path

import pytest
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import fastbert
from fastbert.testing.rows import DEVICE
from tests.models.test_trainer import examples
from tests.models.tiny import CLASSIFICATION, make, make_batch

README = Path(__file__).parents[2] / "README.md"
SECTION = README.read_text().partition("## Train with it")[2].partition("\n## ")[0]
SNIPPETS = re.findall(r"```python\n(.*?)```", SECTION, re.S)
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def test_there_is_one_for_each_way_to_train():
    assert all(name in snippet for snippet, name in zip(SNIPPETS, ("get_scheduler", "Trainer(", "Accelerator"), strict=True))


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["loop", "Trainer", "accelerate"])
def test_snippet(snippet, tmp_path, launches):
    model = make(CLASSIFICATION, **TINY)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = {
        "fastbert": fastbert,
        "model": model,
        "batches": [make_batch(CLASSIFICATION, seed=seed) for seed in range(2)],
        "dataset": examples(CLASSIFICATION),
        "training_args": TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=DEVICE.type == "cpu", save_strategy="no"
        ),
    }
    if "Accelerator" in snippet:
        names["batches"] = DataLoader(names["batches"], batch_size=None)
    exec(snippet, names)
    assert launches()["adamw_kernel"] == 2 and launches()["attention_fwd_kernel"] == 2
    assert all((parameter != start[name]).any() for name, parameter in model.named_parameters())
