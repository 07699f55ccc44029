"""docs/fine-tuning.md: each way to train takes two steps on the kernels and moves every parameter."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import fastbert
from fastbert.testing.models import counting
from tests.docs.play import Names, Play
from tests.models.test_trainer import arguments_in, examples
from tests.models.tiny import CLASSIFICATION, make, make_batch

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def names_of(**more: Any) -> Names:
    model = make(CLASSIFICATION, **TINY)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batches = [make_batch(CLASSIFICATION, seed=seed) for seed in range(2)]
    return {"fastbert": fastbert, "model": model, "start": start, "batches": batches} | more


def assert_trained(names: Names, launched: dict[str, int]) -> None:
    assert launched["adamw_kernel"] == 2 and launched["attention_fwd_kernel"] == 2
    for name, parameter in names["model"].named_parameters():
        assert not torch.equal(parameter, names["start"][name]), name


def play(folder: Path) -> Play:
    names = names_of()
    del names["fastbert"]  # the first block imports it
    with counting() as launched:
        yield names
    assert_trained(names, launched)

    yield names
    rates = {group["name"]: group["lr"] for group in names["groups"]}
    assert len(set(rates.values())) == 3, f"head, body and embeddings: {rates}"

    names = names_of(dataset=examples(CLASSIFICATION), training_args=arguments_in(folder, max_steps=2))
    with counting() as launched:
        yield names
    assert_trained(names, launched)

    names = names_of()
    names["batches"] = DataLoader(names["batches"], batch_size=None)
    with counting() as launched:
        yield names
    assert_trained(names, launched)
