"""BertEmbeddings on its kernel: its inputs, which tables get gradients, and the reasons to fall back."""

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn

import fastbert
from fastbert.testing.models import check, counting, expected_launches, launches_of, run
from tests.models.tiny import BASE, CLM, DEVICE, LENGTH, MLM, ROWS, VOCABULARY, make, make_batch

OP = "embedding_layernorm"
WORDS = "gradient of bert.embeddings.word_embeddings.weight"


def of_tables(launched):
    """The launches of one step, by the suffix of the kernel's name."""
    return {name.removeprefix(f"{OP}_").removesuffix("_kernel") for name in launched if name.startswith(OP)}


def step(model, **changes):
    from fastbert.kernels.core.launch import counts

    before = counts.copy()
    results = run(fastbert.patch(copy.deepcopy(model)), make_batch() | changes)
    return results, of_tables(counts - before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ids(dtype):
    check(make(MLM, dtype), make_batch())
    _, launched = step(make(MLM, dtype))
    assert launched == {"fwd", "bwd", "bwd_order", "bwd_runs", "bwd_sums", "bwd_finish"}


@pytest.mark.parametrize("batch", [1, ROWS])
def test_positions_and_segments(batch):
    positions = (torch.arange(LENGTH).flip(0) + 3).expand(batch, -1).to(DEVICE)
    check(make(), make_batch() | {"position_ids": positions})
    without = {k: v for k, v in make_batch().items() if k != "token_type_ids"}
    check(make(), without | {"position_ids": positions})
    check(make(), without)


def test_rows_that_are_given_have_a_gradient():
    model, batch = make(), make_batch()
    rows = model.get_input_embeddings()(batch.pop("input_ids")).detach() + 0.5
    results = check(model, batch | {"inputs_embeds": rows.requires_grad_()})
    assert results["gradient of inputs_embeds"].any()


def test_the_padding_row_has_no_gradient():
    model, batch = make(tie_word_embeddings=False), make_batch()
    batch["input_ids"][:, -4:] = model.config.pad_token_id
    results = check(model, batch)
    assert not results[WORDS][0].any() and results[WORDS][batch["input_ids"][0, 0]].any()


def test_a_padding_row_of_the_positions_has_no_gradient():
    model = make(tie_word_embeddings=False)
    model.bert.embeddings.position_embeddings.padding_idx = 2
    results = check(model, make_batch())
    table = results["gradient of bert.embeddings.position_embeddings.weight"]
    assert not table[2].any() and table[1].any()


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary(tied):
    model = make(tie_word_embeddings=tied)
    model.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
    batch = make_batch()
    batch["input_ids"][0, 0] = VOCABULARY + 8
    results = check(model, batch)
    assert results[WORDS].shape[0] == VOCABULARY + 9 and results[WORDS][VOCABULARY + 8].any()
    # A tied decoder contributes a gradient to every word, also to those without a token.
    assert bool(results[WORDS][VOCABULARY].any()) == tied


def test_cached_tokens_are_counted():
    model = make(CLM).eval()
    ids = make_batch()["input_ids"]
    patched = fastbert.patch(copy.deepcopy(model))
    with torch.no_grad():
        whole = patched.bert(ids, use_cache=False).last_hidden_state
        first = patched.bert(ids[:, :5], use_cache=True)
        rest = patched.bert(ids[:, 5:], past_key_values=first.past_key_values).last_hidden_state
    torch.testing.assert_close(rest, whole[:, 5:])
    with counting() as launched:
        made = patched.generate(ids[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert launched[f"{OP}_fwd_kernel"] == 4
    assert torch.equal(made, model.generate(ids[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_frozen_embeddings_run_no_backward():
    model = make()
    model.bert.embeddings.requires_grad_(False)
    _, launched = step(model)
    assert launched == {"fwd"}
    model.bert.embeddings.LayerNorm.requires_grad_(True)
    _, launched = step(model)
    assert launched == {"fwd", "bwd", "bwd_finish"}


def subclass(embeddings):
    embeddings.word_embeddings.__class__ = type("Mine", (nn.Embedding,), {})
    return "word_embeddings is a Mine"


def parametrised(embeddings):
    nn.utils.parametrizations.weight_norm(embeddings.position_embeddings)
    return "position_embeddings is a ParametrizedEmbedding"


def with_attribute(table, name, value, reason):
    """A function that sets an attribute of one of the tables."""

    def change(embeddings):
        setattr(getattr(embeddings, table), name, value)
        return reason

    return change


REASONS = {
    "sparse": with_attribute("word_embeddings", "sparse", True, "sparse gradients"),
    "max_norm": with_attribute("position_embeddings", "max_norm", 1.0, "max_norm"),
    "by_frequency": with_attribute("token_type_embeddings", "scale_grad_by_freq", True, "scale_grad_by_freq"),
    "padded_types": with_attribute("token_type_embeddings", "padding_idx", 0, "padding row"),
    "subclass": subclass,
    "parametrised": parametrised,
}


@pytest.mark.parametrize("change", REASONS.values(), ids=REASONS)
def test_what_stays_stock_says_why(change):
    model = make(BASE)
    reason = change(model.embeddings)
    patched = fastbert.patch(model)
    (row,) = [row for row in fastbert.report(patched).rows if row.hf_class == "BertEmbeddings"]
    assert row.state == "untouched" and reason in row.reason
    with counting() as launched:
        patched(**make_batch(BASE))
    assert not launched[f"{OP}_fwd_kernel"] and launched["bias_gelu_fwd_kernel"]


def test_hooks_on_an_embedding_see_its_calls():
    """Also if added after patching: PEFT and gradient checkpointing register them on the word embeddings."""
    model, seen = fastbert.patch(make()), []
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    run(model, make_batch(), backward=False)
    (row,) = [row for row in fastbert.report(model).rows if row.hf_class == "BertEmbeddings"]
    assert seen == [1] and row.state == "fell back" and "hooks" in row.reason
    handle.remove()
    with counting() as launched:
        run(model, make_batch(), backward=False)
    assert launched[f"{OP}_fwd_kernel"] == 1 and seen == [1]


def hooked(embeddings):
    handle = embeddings.LayerNorm.register_forward_hook(lambda *_: None)
    return handle.remove, "hooks"


def hooked_before(embeddings):
    handle = embeddings.dropout.register_forward_pre_hook(lambda *_: None)
    return handle.remove, "hooks"


def own_forward(embeddings):
    dropout = embeddings.dropout
    dropout.forward = lambda x: x
    return lambda: delattr(dropout, "forward"), "hooks"


def padding_row(embeddings):
    embeddings.token_type_embeddings.padding_idx = 0
    return lambda: setattr(embeddings.token_type_embeddings, "padding_idx", None), "padding row"


def another_module(embeddings):
    before = embeddings.LayerNorm
    embeddings.LayerNorm = nn.RMSNorm(before.normalized_shape, device=before.weight.device)
    return lambda: setattr(embeddings, "LayerNorm", before), "RMSNorm"


def no_bias(embeddings):
    before = embeddings.LayerNorm.bias
    embeddings.LayerNorm.bias = None
    return lambda: setattr(embeddings.LayerNorm, "bias", before), "without weight or bias"


def a_retyped_table(embeddings):
    embeddings.token_type_embeddings.double()
    return embeddings.token_type_embeddings.float, "together outside autocast"


def another_class_of_tensor(embeddings):
    before = embeddings.position_embeddings.weight
    embeddings.position_embeddings.weight = nn.Parameter(before.detach().as_subclass(Mine))
    return lambda: setattr(embeddings.position_embeddings, "weight", before), "Mine is not a plain tensor"


def no_probability(embeddings):
    before, embeddings.dropout.p = embeddings.dropout.p, 1.5
    return lambda: setattr(embeddings.dropout, "p", before), "a dropout of 1.5"


def narrower(embeddings):
    before = embeddings.token_type_embeddings
    embeddings.token_type_embeddings = nn.Embedding(2, 1, device=before.weight.device)
    return lambda: setattr(embeddings, "token_type_embeddings", before), "incompatible"


class Mine(torch.Tensor):
    pass


CHANGES = [hooked, hooked_before, own_forward, padding_row, another_module, no_bias, a_retyped_table, another_class_of_tensor]


@pytest.mark.parametrize("change", [*CHANGES, no_probability, narrower], ids=lambda f: f.__name__)
def test_what_changed_is_noticed_by_the_next_call(change):
    """Undoing the change is noticed as well."""
    model = fastbert.patch(make(BASE))
    embeddings, ids = model.embeddings, make_batch(BASE)["input_ids"]

    def launched():
        with counting() as found, suppress(RuntimeError, ValueError):  # stock's own
            embeddings(ids)
        return found[f"{OP}_fwd_kernel"]

    assert launched() == 1
    undo, reason = change(embeddings)
    assert launched() == 0
    (row,) = [row for row in fastbert.report(model).rows if row.hf_class == "BertEmbeddings"]
    assert list(row.fallback_calls.values()) == [1] and reason in row.reason
    undo()
    assert launched() == 1


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a failed assertion on a GPU ends the process")
@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
def test_ids_out_of_range_raise_as_in_torch(name):
    batch = make_batch() | {"position_ids": torch.arange(LENGTH).expand(ROWS, -1).clone()}
    batch[name][0, 0] = 1000
    for model in (make(), fastbert.patch(make())):
        with pytest.raises(IndexError, match="index out of range"):
            model(**batch)


def test_too_many_tokens_are_stocks_error():
    model = make()
    ids = torch.ones(1, model.config.max_position_embeddings + 1, dtype=torch.long, device=DEVICE)
    for candidate in (model, fastbert.patch(copy.deepcopy(model))):
        with pytest.raises(RuntimeError, match="size"):
            candidate(ids)


def test_autocast():
    model, patched = make(), fastbert.patch(make())
    for candidate in (model, patched):
        candidate.bert.embeddings.register_forward_hook(lambda m, i, y, c=candidate: setattr(c, "seen_dtype", y.dtype))
    with torch.autocast(DEVICE.type, dtype=torch.float16), counting() as launched:
        outputs = [candidate(**make_batch()).logits for candidate in (model, patched)]
    assert launched == expected_launches(model, backward=False)
    assert model.seen_dtype == patched.seen_dtype and outputs[0].dtype == outputs[1].dtype


def test_dropout_is_drawn_in_training_only():
    model = make(hidden_dropout_prob=0.5)
    embeddings = fastbert.patch(model).bert.embeddings
    ids = make_batch()["input_ids"]
    assert torch.equal(embeddings(ids), embeddings(ids))
    embeddings.train()
    torch.manual_seed(1)
    one, other = embeddings(ids), embeddings(ids)
    torch.manual_seed(1)
    assert torch.equal(embeddings(ids), one) and not torch.equal(one, other)
    assert 0.3 < (one == 0).double().mean() < 0.7


def test_the_switch():
    model = make()
    with counting() as launched:
        run(fastbert.patch(copy.deepcopy(model), embeddings=False), make_batch())
    assert launched == expected_launches(model) - launches_of(OP)
