"""Shared by the tests of graphs: tiny models with graphs, their batches, and calls that no graph serves."""

import torch

import fastbert
from fastbert.testing.rows import DEVICE
from tests.models.tiny import CLASSIFICATION, make, make_batch


def make_graphed(kind=CLASSIFICATION, patch=None, config=None, **options):
    return fastbert.graphed(fastbert.patch(make(kind, **config or {}), **patch or {}), **options)


def make_inputs(kind=CLASSIFICATION, mask="right", seed=1, length=9):
    return make_batch(kind, mask, seed, labels=False, length=length)


def infer(model, batch):
    with torch.inference_mode():
        return model(**batch)


def ordinary(model, batch):
    """The outputs of a call that no graph serves, because it records gradients."""
    assert any(p.requires_grad for p in model.parameters())
    return model(**batch)


def close(found, expected):
    """Outputs in float32 that may differ by roundings: in a bucket the batch has another shape, and products and kernels split
    it otherwise."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        torch.testing.assert_close(
            value, expected[name].detach(), rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def row_of(model):
    return next(row for row in fastbert.report(model).rows if row.kernel == "CUDA graphs")


def make_like(batch, seed):
    """Other tokens in the same places."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 61, batch["input_ids"].shape, generator=generator)
    return batch | {"input_ids": ids.to(DEVICE)}
