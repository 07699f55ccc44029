"""docs/training-graphs.md, with graphs recorded on the CPU: the recipe, and a step for each set of options."""

from pathlib import Path

import pytest
import torch

import fastbert
from fastbert.testing.graphs import recording_graphs
from fastbert.testing.rows import DEVICE
from tests.docs.play import Play
from tests.graphs.stepping import SMALL, adamw, batches, models
from tests.models.tiny import CLASSIFICATION, make


def play(folder: Path) -> Play:
    if DEVICE.type != "cpu":
        pytest.skip("fastbert.testing.graphs records on the CPU only; tests/graphs/test_gpu*.py capture real graphs")
    with recording_graphs():
        model = make(CLASSIFICATION, **SMALL)
        start = [parameter.detach().clone() for parameter in model.parameters()]
        names = {"fastbert": fastbert, "model": model, "batches": batches(CLASSIFICATION, 5)}
        printed = yield names
        assert printed.startswith("graphed_step of BertForSequenceClassification: 2 of 5 steps replayed, 1 graphs now")
        assert names["loss"].isfinite()
        assert any((parameter != old).any() for parameter, old in zip(model.parameters(), start, strict=True))

        model, _ = models()
        scored = []

        def focal_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            scored.append(logits.shape)
            return torch.nn.functional.cross_entropy(logits, labels)

        names = {"fastbert": fastbert, "torch": torch, "model": model, "optimizer": adamw(model), "focal_loss": focal_loss}
        yield names, {"GradScaler()": "GradScaler('cpu')"}
        for batch in batches(CLASSIFICATION, 5):
            names["step"](**batch)
        assert scored and names["step"].report().replayed == 2, "the last step has the loss of one's own"
