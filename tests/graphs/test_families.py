"""Graphs of every family: inference in buckets, whose positions RoBERTa must have, and training steps."""

import pytest
import torch

import fastbert
from fastbert.layers.positions import longest_text
from fastbert.testing.rows import DEVICE
from tests.graphs.stepping import DRIFT, adamw, batches, ordinary
from tests.graphs.support import close, infer, make_graphed, make_inputs, make_like, row_of
from tests.models import test_distilbert
from tests.models.families import DISCRIMINATOR, ELECTRA, ERNIE, FAMILIES, ROBERTA
from tests.models.tiny import BASE, CLASSIFICATION, make

pytestmark = [
    pytest.mark.skipif(DEVICE.type != "cpu", reason="the stand-in for a graph; test_gpu.py has graphs"),
    pytest.mark.usefixtures("recorders"),
]
KINDS = [family.kind(name) for family in FAMILIES for name in ("base", "single-label", "multiple-choice", "mlm")]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", [*KINDS, DISCRIMINATOR, ERNIE.kind("pretraining")], ids=str)
def test_a_replay_gives_what_the_ordinary_call_gives(kind):
    """Also for another batch in the same bucket, which is longer than both."""
    model, batch = make_graphed(kind), make_inputs(kind)
    for inputs in (batch, make_like(batch, seed=7)):
        close(infer(model, inputs), model(**inputs))
    row = row_of(model)
    assert row.kernel_calls == 2 and row.fallback_calls.keys() <= {
        "gradients are recorded: call the model under torch.inference_mode() or torch.no_grad()"
    }, row


@pytest.mark.parametrize("padding, positions, longest", [(1, 24, 22), (0, 24, 23), (7, 18, 10)])
def test_a_bucket_has_no_more_tokens_than_robertas_positions(padding, positions, longest):
    """The bucket of 17 to 22 tokens would be 24, whose last ones have no position."""
    kind = ROBERTA.kind("base")
    model = make_graphed(kind, config={"pad_token_id": padding, "max_position_embeddings": positions})
    assert longest_text(model) == longest
    for length in (longest, longest - 1):
        inputs = make_inputs(kind, "none", length=length)
        inputs["input_ids"].clamp_(min=padding + 1)
        close(infer(model, inputs), model(**inputs))
    assert row_of(model).kernel_calls == 2


@pytest.mark.parametrize("kind", [BASE, ROBERTA.kind("single-label"), ERNIE.kind("base")], ids=str)
def test_types_of_the_models_own(kind):
    """A call without types reads them from a buffer, in which somebody may have written: a graph is given zeros."""
    model, batch = make_graphed(kind), make_inputs(kind)
    del batch["token_type_ids"]
    infer(model, batch)
    types = getattr(model, "roberta", model).embeddings.token_type_ids
    types[:, 4:9] = 1
    close(infer(model, batch), model(**batch))
    assert row_of(model).kernel_calls == 1 and row_of(model).fallback_calls["the model's own token_type_ids are not all 0"] == 1
    types.zero_()
    close(infer(model, batch), model(**batch))
    assert row_of(model).kernel_calls == 2


@pytest.mark.parametrize("head", ["base", "classification", "mlm", "multiple-choice"])
def test_a_model_without_types(head):
    """DistilBERT."""
    model, batch = fastbert.graphed(fastbert.patch(test_distilbert.make(head))), test_distilbert.make_batch(head)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for inputs in (batch, make_like(batch, seed=7)):
        close(infer(model, inputs), model(**inputs))
    assert row_of(model).kernel_calls == 2, row_of(model)


def test_tasks_that_are_given():
    model, batch = make_graphed(ERNIE.kind("base")), make_inputs(ERNIE.kind("base"))
    infer(model, batch)
    batch["task_type_ids"] = torch.ones_like(batch["input_ids"])
    close(infer(model, batch), model(**batch))
    assert row_of(model).fallback_calls["task_type_ids was given"] == 1


def test_positions_of_the_others():
    for kind in (BASE, ELECTRA.kind("single-label"), ERNIE.kind("mlm")):
        assert longest_text(make(kind)) == 24
    assert longest_text(torch.nn.Linear(1, 1)) is None
    model = make(ROBERTA.kind("mlm"))
    model.roberta.embeddings.padding_idx = None
    assert longest_text(model) == 24


def test_warmup_of_choices():
    model = make_graphed(ROBERTA.kind("multiple-choice"))
    fastbert.warmup(model, [(2, 9)], choices=2)
    infer(model, make_inputs(ROBERTA.kind("multiple-choice")))
    assert row_of(model).kernel_calls == 2


@pytest.mark.parametrize(
    "kind, patch",
    [
        (ROBERTA.kind("single-label"), {}),
        (ROBERTA.kind("mlm"), {"mlm_logits": "none"}),
        (ROBERTA.kind("clm"), {"mlm_logits": "none"}),
        (ELECTRA.kind("single-label"), {}),
        (ERNIE.kind("pretraining"), {"mlm_logits": "none"}),
    ],
    ids=str,
)
def test_a_training_step(kind, patch):
    models = [fastbert.patch(make(kind, num_hidden_layers=1).train(), **patch) for _ in range(2)]
    step, optimizer = fastbert.graphed_step(models[0], adamw(models[0])), adamw(models[1])
    for batch in batches(kind, 6):
        torch.testing.assert_close(step(**batch), ordinary(models[1], optimizer, batch), **DRIFT)
    assert step.report().replayed >= 3, str(step)


@pytest.mark.parametrize("mask", [True, False])
def test_a_training_step_of_the_discriminator(mask):
    """Stock's loss picks the tokens by a mask of bools, which waits for their number: no graph can hold that."""
    models = [fastbert.patch(make(DISCRIMINATOR, num_hidden_layers=1).train()) for _ in range(2)]
    step, optimizer = fastbert.graphed_step(models[0], adamw(models[0])), adamw(models[1])
    for batch in batches(DISCRIMINATOR, 5):
        if not mask:
            del batch["attention_mask"]
        torch.testing.assert_close(step(**batch), ordinary(models[1], optimizer, batch), **DRIFT)
    report = step.report()
    if mask:
        assert report.replayed == 0 and any("aten.index.Tensor waits" in reason for reason in report.ordinary), str(step)
    else:
        assert report.replayed >= 2, str(step)


@pytest.mark.parametrize("kind", [ROBERTA.kind("single-label"), CLASSIFICATION], ids=str)
def test_a_training_step_after_a_write_to_the_models_own_types(kind):
    """RoBERTa's embeddings look at them on the host: the step before the write knows that they are zeros."""
    models = [fastbert.patch(make(kind, num_hidden_layers=1).train()) for _ in range(2)]
    step, optimizer = fastbert.graphed_step(models[0], adamw(models[0])), adamw(models[1])
    for turn, batch in enumerate(batches(kind, 8)):
        del batch["token_type_ids"]
        if turn == 4:
            for model in models:
                getattr(model, kind.cls.base_model_prefix).embeddings.token_type_ids.fill_(1)
        torch.testing.assert_close(step(**batch), ordinary(models[1], optimizer, batch), **DRIFT)
    assert step.report().replayed >= 3, str(step)
