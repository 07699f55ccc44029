"""Dropout in a model: seeds, no draw when it is off, and equality with stock under the masks that were drawn."""

import copy

import pytest
import torch
from torch import nn

import fastbert
from fastbert.kernels import embedding_layernorm
from fastbert.layers.masks import KernelMask
from fastbert.testing.models import assert_bitwise, assert_equal, counting, doubled, expected_launches, run
from fastbert.testing.rows import DEVICE, drawn_mask
from tests.models.tiny import MLM, make, make_batch

P = 0.4


def train_step(model, seed, backward):
    torch.manual_seed(seed)
    return run(model, make_batch(), backward)


def generator_state():
    return torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.get_rng_state()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_seed_repeats_bitwise_and_another_differs(attention):
    model = make(attention=attention, hidden_dropout_prob=P, attention_probs_dropout_prob=P)
    model = fastbert.patch(model).train()
    # On a GPU the backward of some SDPA kernels sums in no fixed order.
    backward = attention == "eager" or DEVICE.type == "cpu"
    first = train_step(model, 1, backward)
    assert_bitwise(train_step(model, 1, backward), first)
    other = train_step(model, 2, backward)
    assert all(not torch.equal(other[name], first[name]) for name in ("loss", "logits"))


def test_calls_without_a_new_seed_differ():
    model = fastbert.patch(make(hidden_dropout_prob=P)).train()
    assert not torch.equal(model(**make_batch()).loss, model(**make_batch()).loss)


@pytest.mark.parametrize("off", ["eval", "p=0"])
@pytest.mark.usefixtures("each_way")
def test_off_is_bitwise_without(off):
    plain = run(fastbert.patch(make(hidden_dropout_prob=0.0)), make_batch())
    if off == "eval":
        model = fastbert.patch(make(hidden_dropout_prob=P)).eval()
    else:
        model = fastbert.patch(make(hidden_dropout_prob=0.0)).train()
    state = generator_state()
    assert_bitwise(run(model, make_batch()), plain)
    assert torch.equal(generator_state(), state), "a seed was drawn for a dropout that is off"


@pytest.mark.usefixtures("each_way")
def test_only_the_dropout_modules_own_mode_counts():
    # Dropout may be frozen layer by layer: stock reads dropout.training, not its parent's.
    plain = run(fastbert.patch(make()), make_batch())
    model = fastbert.patch(make(hidden_dropout_prob=P)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert_bitwise(run(model, make_batch()), plain)


@pytest.mark.parametrize("unpad", [False, True], ids=["padded", "packed"])
@pytest.mark.usefixtures("each_way")
def test_attention_drops_in_training_only(unpad):
    """Tested by itself, so that no other dropout hides a missing one."""
    plain = run(fastbert.patch(make(), unpad=unpad), make_batch())
    model = fastbert.patch(make(attention_probs_dropout_prob=P), unpad=unpad)
    assert_bitwise(run(model.eval(), make_batch()), plain)
    assert not torch.equal(run(model.train(), make_batch())["loss"], plain["loss"])


def test_a_changed_p_is_honoured():
    model = fastbert.patch(make(hidden_dropout_prob=P)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_bitwise(run(model, make_batch()), run(fastbert.patch(make()), make_batch()))


class Replayed(nn.Module):
    """A dropout with a given mask."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def forward(self, x):
        return torch.where(self.keep, x / (1.0 - P), 0.0)


def dropouts(model):
    """The dropouts in the kernels, in call order."""
    yield model.bert.embeddings
    for layer in model.bert.encoder.layer:
        yield layer.attention.output
        yield layer.output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_stock_under_the_same_masks_is_equal(dtype, monkeypatch):
    seeds = []
    draw_seed, seed_of = embedding_layernorm.draw_seed, KernelMask.seed_of

    def drawn(*args):
        of_layer = seed_of(*args)
        seeds.extend((of_layer[2], of_layer[4]))  # the first one is attention's
        return of_layer

    monkeypatch.setattr(embedding_layernorm, "draw_seed", lambda device: seeds.append(draw_seed(device)) or seeds[-1])
    monkeypatch.setattr(KernelMask, "seed_of", drawn)

    model, batch = make(MLM, dtype, hidden_dropout_prob=P).train(), make_batch()
    patched = fastbert.patch(copy.deepcopy(model))
    with counting() as launched:
        results = run(patched, batch)
    assert launched == expected_launches(model)
    assert len(seeds) == len({int(seed) for seed in seeds}) == 5, "every dropout draws a seed of its own"

    shape = (*batch["input_ids"].shape, model.config.hidden_size)
    for module, seed in zip(dropouts(model), seeds, strict=True):
        keep = drawn_mask(shape, P, seed)
        assert 0.4 < keep.double().mean() < 0.8
        module.dropout = Replayed(keep)
    assert_equal(results, run(copy.deepcopy(model), batch), run(model.double(), doubled(batch)))


def test_mean_over_seeds_is_stocks():
    """The expectation of one layer's output over dropout masks, estimated from many rows at once, for both."""
    rows = 2000
    model = make(hidden_dropout_prob=P, num_hidden_layers=1).train()
    output = model.bert.encoder.layer[0].attention.output
    torch.manual_seed(0)
    x = torch.randn(1, 1, 40, device=model.device).expand(1, rows, -1)
    residual = torch.randn(1, 1, 40, device=model.device).expand(1, rows, -1)
    stock = output(x, residual).detach()[0].double()
    with counting() as launched:
        patched = fastbert.patch(model).bert.encoder.layer[0].attention.output(x, residual).detach()[0].double()
    assert launched["dropout_add_layernorm_fwd_kernel"] == 1
    for power in (1, 2):
        a, b = stock**power, patched**power
        deviation = ((a.var(0) + b.var(0)) / rows).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * deviation + 1e-6).all()
