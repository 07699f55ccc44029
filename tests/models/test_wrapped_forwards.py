"""Forwards that a user wrapped while the model was patched, and their behaviour after unpatching."""

import copy
import functools

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import fastbert
from fastbert.testing.models import assert_bitwise, assert_no_fallback, run
from tests.models.tiny import CLASSIFICATION, CLM, MLM, make, make_batch

PARTS = (
    "",
    "bert.embeddings",
    "bert.encoder",
    "bert.encoder.layer.0",
    "bert.encoder.layer.0.attention.self",
    "bert.encoder.layer.0.crossattention.self",
    "bert.encoder.layer.0.attention.output",
    "bert.encoder.layer.0.intermediate",
    "bert.encoder.layer.0.output",
    "cls.predictions.transform",
)


def wrapped(module):
    """Wrap a forward as accelerate's mixed precision does: the previous forward stays in a closure."""
    forward = module.forward

    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    module.forward = wrapper


@pytest.mark.parametrize("part", PARTS)
def test_a_wrapper_outlives_the_patch(part):
    model = make(CLM, attention="sdpa", add_cross_attention=True)
    batch = make_batch(CLM) | {"encoder_hidden_states": torch.ones(2, 5, 40)}
    stock = run(copy.deepcopy(model), batch)
    fastbert.patch(model, unpad=True, mlm_logits="none")
    wrapped(model.get_submodule(part))
    assert_bitwise(run(fastbert.unpatch(model), batch), stock)


@pytest.mark.parametrize("part", ["", "bert.encoder"])
def test_a_wrapper_outlives_the_patch_of_a_head(part):
    for kind in (MLM, CLASSIFICATION):
        model, batch = make(kind), make_batch(kind)
        stock = run(copy.deepcopy(model), batch)
        wrapped(fastbert.patch(model).get_submodule(part))
        assert_bitwise(run(fastbert.unpatch(model), batch), stock)


class Counting(ModelHook):
    def __init__(self):
        self.calls = 0

    def post_forward(self, module, output):
        self.calls += 1
        return output


def test_hooks_of_accelerate_outlive_the_patch():
    model, batch = make(CLASSIFICATION, attention="sdpa"), make_batch(CLASSIFICATION)
    stock = run(copy.deepcopy(model), batch)
    patched = run(fastbert.patch(model), batch)
    hook, parts = Counting(), [model.get_submodule(part) for part in PARTS[1:5] + PARTS[6:9]]
    for module in parts:
        add_hook_to_module(module, hook)
    torch.testing.assert_close(run(model, batch), patched)
    assert_bitwise(run(fastbert.unpatch(model), batch), stock)
    assert hook.calls == 2 * len(parts)
    for module in parts:
        remove_hook_from_module(module)
    assert_bitwise(run(model, batch), stock)
    assert_bitwise(run(fastbert.patch(model), batch), patched)
    assert_no_fallback(model, but=("BertEncoder",))


def test_offloaded_while_patched():
    model, batch = make(CLASSIFICATION), make_batch(CLASSIFICATION)
    stock = run(copy.deepcopy(model), batch, backward=False)
    cpu_offload(fastbert.patch(model), execution_device="cpu")
    run(model, batch, backward=False)
    assert_bitwise(run(fastbert.unpatch(model), batch, backward=False), stock)
