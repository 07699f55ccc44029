"""torch.export: a patched model of every class, for any batch and length, saved and loaded, with the kernels as ops."""

import copy
import io

import pytest
import torch

import fastbert
from fastbert.testing.models import assert_equal, counting, doubled, expected_launches, run
from tests.models.test_compile import NINE
from tests.models.tiny import BASE, CLM, LENGTH, make, make_batch

SIZES = {"auto": torch.export.Dim.AUTO, "dynamic": torch.export.Dim.DYNAMIC}


def batch_of(kind, rows=2, length=LENGTH, **keywords):
    """A padded batch without labels, as for inference."""
    batches = [make_batch(kind, length=length, seed=seed, labels=False) for seed in range(rows // 2)]
    batch = {name: torch.cat([other[name] for other in batches]) for name in batches[0]}
    return batch | ({"use_cache": False} if kind is CLM else {}) | keywords


def exported(model, batch, size="auto"):
    """The exported program after saving and loading it."""
    shapes = {
        name: dict.fromkeys(range(x.dim()), SIZES[size]) if isinstance(x, torch.Tensor) else None for name, x in batch.items()
    }
    program, file = torch.export.export(model, (), batch, dynamic_shapes=shapes), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def assert_serves(program, model, batch):
    """Check that the program's outputs equal those of the stock `model`, with one launch per kernel module."""
    with counting() as launched:
        results = run(program, batch, backward=False)
    assert launched == expected_launches(model, backward=False)
    exact = run(copy.deepcopy(model).double(), doubled(batch), backward=False)
    assert_equal(results, run(model, batch, backward=False), exact)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", NINE, ids=str)
def test_every_class(kind):
    model = make(kind, num_hidden_layers=1)
    program = exported(fastbert.patch(copy.deepcopy(model)), batch_of(kind, rows=4))
    for rows, length in ((2, 13), (6, 5)):
        assert_serves(program, model, batch_of(kind, rows, length))


def test_sizes_that_must_be_dynamic():
    """torch raises if the export specialises the batch size or the length."""
    model = make(BASE, num_hidden_layers=1)
    assert_serves(exported(fastbert.patch(copy.deepcopy(model)), batch_of(BASE), "dynamic"), model, batch_of(BASE, 4, 17))


@pytest.mark.long
def test_a_decoder_with_a_cache():
    """transformers must register caches with torch, patched or not: the first call, and a step with its cache."""
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    model = make(CLM, num_hidden_layers=1)
    patched = fastbert.patch(copy.deepcopy(model))
    batch = batch_of(CLM, use_cache=True)
    program = torch.export.export(patched, (), batch).module()
    assert_serves(program, model, batch)
    with torch.no_grad():
        kept = model(**batch).past_key_values
        step = {name: x[:, -1:] for name, x in batch.items() if name in ("input_ids", "token_type_ids")}
        step["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        step["use_cache"] = True

        def outputs(function):
            return function(**step, past_key_values=copy.deepcopy(kept))

        program = torch.export.export(patched, (), step | {"past_key_values": copy.deepcopy(kept)}).module()
        with counting() as launched:
            found = outputs(program)
        assert launched["attention_fwd_kernel"] == 1
        expected = outputs(patched)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.past_key_values.layers[0].keys, expected.past_key_values.layers[0].keys)
