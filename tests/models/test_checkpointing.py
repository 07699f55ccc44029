"""Gradient checkpointing, reentrant or not: equal to stock, and bitwise equal to no checkpointing, with dropout on."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import fastbert
from fastbert.testing.models import assert_bitwise, check, counting, expected_launches, run
from tests.models.tiny import CLM, MLM, make, make_batch


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    return model.train()


def expected(model):
    """Every layer's forward runs twice, the head's once."""
    launches = expected_launches(model)
    for kernel in ("attention", "bias_gelu", "dropout_add_layernorm"):
        launches[f"{kernel}_fwd_kernel"] *= 2
    return launches


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", [MLM, CLM], ids=str)
def test_equal_to_stock(kind, reentrant):
    model = checkpointed(make(kind), reentrant)
    check(model, make_batch(kind), expected=expected(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_on_equals_off_with_dropout(reentrant):
    # The recomputed forward must draw the first one's dropout, in every layer.
    model = fastbert.patch(make(hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.2)).train()
    torch.manual_seed(3)
    off = run(model, make_batch())
    checkpointed(model, reentrant)
    torch.manual_seed(3)
    with counting() as launched:
        on = run(model, make_batch())
    assert_bitwise(on, off)
    assert launched == expected(model)
    torch.manual_seed(4)
    other = run(model, make_batch())
    assert not torch.equal(other["loss"], on["loss"])


def test_selective():
    """The second forward reads what the policy kept of the first one; no kernel may have overwritten it."""
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    model = make().train()
    model.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, products)}
    )
    check(model, make_batch(), expected=expected(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_only_one_layer(reentrant):
    model = make().train()
    checkpointed(model, reentrant)
    model.bert.encoder.layer[0].gradient_checkpointing = False
    launches = expected_launches(model)
    launches["bias_gelu_fwd_kernel"] += 1
    launches["dropout_add_layernorm_fwd_kernel"] += 2
    launches["attention_fwd_kernel"] += 1
    check(model, make_batch(), expected=launches)
