"""NaN and infinities propagate where they do in eager, and nowhere else."""

import copy
from dataclasses import replace

import pytest
import torch

import fastbert
from fastbert.testing.models import assert_equal, counting, doubled, run
from fastbert.testing.numerics import assert_close
from tests.models.tiny import BASE, make, make_batch

from .cases import cases

BAD = (torch.nan, torch.inf, -torch.inf)


def poisoned(x, bad):
    """x with one bad number, in neither its first row nor its first column."""
    x = x.clone()
    x[tuple(min(1, n - 1) for n in x.shape)] = bad
    return x


def gradient_of(case):
    """dy, or ones for a scalar loss, whose gradient multiplies every row."""
    return ["dy"] if case.dy.dim() else []


def eager_attention(q, k, v, *, key_mask=None, mask=None, causal=False, cu_seqlens=None, max_seqlen=None):
    """transformers' eager attention. The reference clamps scores to the lowest number, which differs for infinities."""
    if cu_seqlens is not None:
        parts = [slice(*cu_seqlens[i : i + 2].tolist()) for i in range(len(cu_seqlens) - 1)]
        return torch.cat([eager_attention(*(x[rows].unsqueeze(0) for x in (q, k, v)))[0] for rows in parts])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(k.shape[1] - q.shape[1])
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    added = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~seen, torch.finfo(q.dtype).min)
    weights = (scores + added + (0.0 if mask is None else mask.to(q.dtype))).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def check(case):
    """Check that results are not finite exactly where eager's are not, and that the rest is within the bound.

    Eager may read masked or ignored elements, because its masks are additive, and the kernel does not. There, the kernel
    may stay finite although eager does not.
    """
    if case.name.startswith("attention"):
        case = replace(case, reference=eager_attention)
    found = case.run(), case.eager(), case.eager(exact=True)
    names = [name for name, tensor in found[0].items() if tensor is not None]
    for name in names:
        ours, eager = (tensors[name].isfinite() for tensors in found[:2])
        spread = eager & ~ours
        if case.name.startswith("attention") and not case.inputs["k"].isfinite().all() and name in ("dk", "dv"):
            # An infinite key that no query sees has finite gradients in eager. In the kernel its own gradient is NaN,
            # because the tile is padded with zero queries: zero times infinity.
            spread = spread & case.inputs["k"].isfinite().all(-1, keepdim=True)
        assert not spread.any(), f"{name}: eager is finite where the kernel is not"
        masked = case.name == "attention" or (name != "y" and case.name.startswith(("attention causal", "linear_cross")))
        if not masked:
            assert not (ours & ~eager).any(), f"{name}: the kernel is finite where eager is not"
    everywhere = {name: torch.stack([tensors[name].isfinite() for tensors in found]).all(0) for name in names}
    assert_close(*({name: torch.where(everywhere[name], tensors[name], 0.0) for name in names} for tensors in found))


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, case in cases().items() for argument in (*case.inputs, *gradient_of(case))],
)
@pytest.mark.one_in(6)
def test_an_op_is_as_eager(name, argument, bad):
    case = cases()[name]
    if name == "attention":  # the bad key is masked; a row that sees no key is the average of all keys
        case.options["key_mask"][1] = torch.tensor([True, False, True, True, False])
    if argument == "dy":
        case = replace(case, dy=poisoned(case.dy, bad))
    else:
        case.inputs[argument] = poisoned(case.inputs[argument], bad)
    check(case)
    assert bad == bad or argument == "dy" or not all(tensor.isfinite().all() for tensor in case.run().values())


def test_a_class_that_is_ruled_out_has_no_gradient():
    """A bias of -inf contributes no loss and no gradient unless its class is a label."""
    case = cases()["linear_cross_entropy mean"]
    case.options["labels"].clamp_(max=3)
    case.inputs["bias"][5] = -torch.inf
    results = case.run()
    case.check(results)
    assert all(tensor.isfinite().all() for tensor in results.values()) and not results["dweight"][5].any()


# Per op: an input, the row of it that goes bad, and the rows of output and gradient that do not read that row.
ROWS = {
    "dropout_add_layernorm": ("x", 0, slice(1, None)),
    "bias_gelu gelu": ("x", 0, slice(1, None)),
    "gelu_layernorm": ("x", 0, slice(1, None)),
    "gather_rows": ("x", 1, [0, 2, 3]),
    "attention": ("k", 0, slice(1, None)),
    "attention packed": ("v", 0, slice(2, None)),
    "linear_cross_entropy none": ("hidden", 0, slice(1, None)),
}


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.one_in(3)
def test_rows_beside_a_bad_one_stay_to_the_bit(name, bad):
    case = cases()[name]
    argument, row, others = ROWS[name]
    before = case.run()
    case.inputs[argument] = case.inputs[argument].index_fill(0, torch.tensor([row], device=case.dy.device), bad)
    after = case.run()
    assert torch.equal(after["y"][others], before["y"][others]) and not torch.equal(after["y"], before["y"])
    gradients = [n for n, t in before.items() if n != "y" and t.shape == case.inputs[argument].shape]
    if name != "gather_rows":  # the gradients of its rows go elsewhere and never read x
        assert all(torch.equal(after[n][others], before[n][others]) for n in gradients)


def test_a_bad_word_stays_where_it_is_read():
    case = cases()["embedding_layernorm"]
    case.options["ids"].fill_(2)[0, 3] = 1
    before = case.run()["y"]
    case.inputs["words"][1] = torch.nan
    after = case.run()["y"]
    assert after[0, 3].isnan().all()
    after[0, 3] = before[0, 3]
    assert torch.equal(after, before)


PARAMETERS = (
    "embeddings.word_embeddings.weight",
    "embeddings.LayerNorm.bias",
    "encoder.layer.0.attention.self.value.bias",
    "encoder.layer.0.attention.output.LayerNorm.weight",
    "encoder.layer.1.intermediate.dense.bias",
    "encoder.layer.1.output.dense.weight",
)


@pytest.mark.parametrize("bad", BAD[:2], ids=str)
@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.one_in(4)
def test_a_model_with_a_bad_weight_is_as_stock(name, bad, launches):
    model, batch = make(BASE), make_batch(BASE, mask="none")
    with torch.no_grad():
        parameter = model.get_parameter(name)
        # A word that occurs in the batch.
        place = (batch["input_ids"][1, 2], 0) if "word" in name else tuple(n // 2 for n in parameter.shape)
        parameter[place] = bad
    patched = fastbert.patch(copy.deepcopy(model))
    results, eager = run(patched, batch, backward=False), run(model, batch, backward=False)
    assert not all(x.isfinite().all() for x in eager.values()) and launches()
    assert_equal(results, eager, run(copy.deepcopy(model).double(), batch, backward=False))


@pytest.mark.parametrize("padded", [False, True], ids=["token", "padding"])
@pytest.mark.parametrize("unpad", [False, True], ids=["not packed", "packed"])
def test_a_bad_row_of_a_batch_stays_in_its_sequence(unpad, padded):
    """NaN in a token spreads to its whole sequence, as in eager; in padding it may spread less than in eager, never more."""
    model, batch = make(BASE), make_batch(BASE)
    words = model.embeddings.word_embeddings(batch.pop("input_ids")).detach()
    clean = batch | {"inputs_embeds": words.clone().requires_grad_()}
    words[1, -1 if padded else 2] = torch.nan
    batch["inputs_embeds"] = words.requires_grad_()
    assert batch["attention_mask"][1, -1] == 0
    patched = fastbert.patch(copy.deepcopy(model), unpad=unpad)
    with counting(heads=True) as launched:
        results = run(patched, batch)
    assert bool(launched["gather_rows_kernel"]) == unpad
    eager, before = run(copy.deepcopy(model), batch), run(copy.deepcopy(model), clean)
    exact = run(copy.deepcopy(model).double(), doubled(clean))
    wholly = "last_hidden_state", "pooler_output"
    for name in wholly:
        assert results[name].isnan().sum() <= eager[name].isnan().sum()
        assert not (results[name].isnan() & ~eager[name].isnan()).any()
        if not padded:
            seen = batch["attention_mask"][1].bool() if name == "last_hidden_state" else slice(None)
            assert results[name][1][seen].isnan().all()
    first = {name: results[name][:1] for name in (*wholly, "gradient of inputs_embeds")}
    seen = batch["attention_mask"][0].bool()
    assert seen.all()
    assert_equal(first, *({name: found[name][:1] for name in first} for found in (before, exact)))
