"""If the encoder packs, only its tokens are embedded; if other code could see the embeddings, all are."""

import copy
import inspect

import pytest
import torch
from transformers.models.bert import modeling_bert

import fastbert
from fastbert.layers import embeddings as layer
from fastbert.testing.models import assert_bitwise, assert_equal, counting, doubled, run
from tests.models.tiny import BASE, CLASSIFICATION, CLM, DEVICE, LENGTH, MLM, ROWS, make, make_batch

IDS = "embedding_layernorm_ids_kernel"
WORDS = "gradient of bert.embeddings.word_embeddings.weight"
TOKENS = 15  # of the batch, ROWS * LENGTH positions
REAL = make_batch()["attention_mask"].bool()


@pytest.fixture
def embedded(monkeypatch):
    """The shapes of the kernel's results, in order."""
    shapes, embed = [], layer.ops.embed

    def spied(*args, **kwargs):
        y = embed(*args, **kwargs)
        shapes.append(tuple(y.shape[:2]))
        return y

    monkeypatch.setattr(layer.ops, "embed", spied)
    return shapes


def check(model, batch, kind=MLM, within=None, **keywords):
    """Check that loss and every gradient equal eager's; returns the launches."""
    patched = fastbert.patch(copy.deepcopy(model), **{"unpad": True, "mlm_logits": "none"} | keywords)
    with counting(heads=True) as launched:
        results = run(patched, batch, within=within)
    eager, exact = run(copy.deepcopy(model), batch, within=within), run(copy.deepcopy(model).double(), doubled(batch))
    for tensors in (results, eager, exact):
        tensors.pop("logits", None)
    assert_equal(results, eager, exact)
    return launched


def batch_of(kind=MLM, mask="right"):
    batch = make_batch(kind, mask)
    if kind is MLM:
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def positions(rows):
    return (torch.arange(rows * LENGTH).view(rows, LENGTH).flip(1) % 21 + 2).to(DEVICE)


GIVEN = {
    "as usual": {},
    "positions of all": {"position_ids": positions(1)},
    "positions of each": {"position_ids": positions(ROWS)},
    "no types": {"token_type_ids": None},
    "no types, positions": {"token_type_ids": None, "position_ids": positions(1)},
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("kind", [MLM, CLASSIFICATION], ids=str)
def test_only_tokens_are_embedded(kind, given, embedded):
    launched = check(make(kind).train(), batch_of(kind) | GIVEN[given], kind)
    assert embedded == [(1, TOKENS)] and launched[IDS] == 1


@pytest.mark.parametrize("mask", ["left", "holes"])
def test_padding_at_other_places(mask, embedded):
    batch = batch_of(mask=mask)
    check(make().train(), batch)
    assert embedded == [(1, int(batch["attention_mask"].sum()))]


def test_under_autocast(embedded):
    check(make().train(), batch_of(), within=torch.autocast(DEVICE.type, torch.float16))
    assert embedded == [(1, TOKENS)]


@pytest.mark.parametrize("facts", [{"bucket": 8, "lengths": [9, 6], "read": [6, 4]}, {"token_budget": 17, "read_budget": 18}])
def test_spare_capacity_changes_nothing(facts, embedded):
    model, batch = make().train(), batch_of()
    batch["labels"][batch["attention_mask"] == 1] = 5
    if "read" in facts:
        facts = facts | {"read": [9, 6]}
    patched = fastbert.patch(copy.deepcopy(model), unpad=True, mlm_logits="none")
    with fastbert.lengths(patched, **facts):
        results = run(patched, batch)
    eager, exact = run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch))
    for tensors in (eager, exact):
        del tensors["logits"]
    assert_equal(results, eager, exact)
    assert embedded == [(1, 16 if "bucket" in facts else 17)]


def test_the_padding_row_has_no_gradient(embedded):
    model, batch = make(tie_word_embeddings=False).train(), batch_of()
    batch["input_ids"][:, 2] = model.config.pad_token_id  # at real tokens
    patched = fastbert.patch(copy.deepcopy(model), unpad=True)
    assert not run(patched, batch)[WORDS][0].any() and embedded == [(1, TOKENS)]


def test_buffers_of_its_own(embedded):
    """Positions and types that were written into the buffers are read at the tokens' positions."""
    model = make().train()
    with torch.no_grad():
        model.bert.embeddings.token_type_ids[0, ::2] = 1
        model.bert.embeddings.position_ids[0] = model.bert.embeddings.position_ids[0].flip(0)
    check(model, batch_of() | {"token_type_ids": None})
    assert embedded == [(1, TOKENS)]


def test_dropout_repeats_with_its_seed(embedded):
    model = fastbert.patch(make(hidden_dropout_prob=0.4).train(), unpad=True)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(run(model, batch_of()))
    assert_bitwise(*results)
    assert embedded == [(1, TOKENS)] * 2


ALL = [(ROWS, LENGTH)]


def test_rows_that_are_given_are_packed_afterwards(embedded):
    model, batch = make().train(), batch_of()
    rows = model.get_input_embeddings()(batch.pop("input_ids")).detach() + 0.5
    launched = check(model, batch | {"inputs_embeds": rows.requires_grad_()})
    assert embedded == ALL and not launched[IDS]


@pytest.mark.parametrize("mask", ["none", "ones"])
def test_without_padding_all_are_embedded(mask, embedded):
    batch = make_batch(CLASSIFICATION, "none")
    if mask == "ones":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for unpad in ("auto", True):
        launched = check(make(CLASSIFICATION).train(), batch, CLASSIFICATION, unpad=unpad)
        assert not launched[IDS] and embedded.pop() in (*ALL, (1, ROWS * LENGTH))


def test_positions_in_order_pack_as_well(embedded):
    """With positional arguments, of which position_ids may be one."""
    model, batch = make(BASE), make_batch(BASE)
    given = [batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
    expected = model(*given).last_hidden_state
    patched = fastbert.patch(copy.deepcopy(model), unpad=True)
    torch.testing.assert_close(patched(*given).last_hidden_state[REAL], expected[REAL])
    expected = model(*given, positions(1)).last_hidden_state
    torch.testing.assert_close(patched(*given, positions(1)).last_hidden_state[REAL], expected[REAL])
    assert embedded == [(1, TOKENS), *ALL]


def hooked_embeddings(model, seen):
    model.bert.embeddings.register_forward_hook(lambda _, inputs, output: seen.append(output))


def hooked_words(model, seen):
    model.bert.embeddings.LayerNorm.register_forward_hook(lambda _, inputs, output: seen.append(output))


def hooked_encoder(model, seen):
    model.bert.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))


def wrapped_embeddings(model, seen):
    forward = model.bert.embeddings.forward
    model.bert.embeddings.forward = lambda *args, **kwargs: seen.append(forward(*args, **kwargs)) or seen[-1]


def masks_of_its_own(model, seen):
    make_masks = model.bert._create_attention_masks

    def spied(**kwargs):
        seen.append(kwargs["embedding_output"])
        return make_masks(**kwargs)

    model.bert._create_attention_masks = spied


WATCHED = [hooked_embeddings, hooked_words, hooked_encoder, wrapped_embeddings, masks_of_its_own]


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("watch", WATCHED, ids=lambda f: f.__name__)
def test_whoever_watches_sees_what_stock_gives(watch, patched_first):
    model, batch = make(), batch_of()
    seen, expected = [], []
    stock = copy.deepcopy(model)
    watch(stock, expected)
    stock(**batch)
    if patched_first:
        fastbert.patch(model, unpad=True)
    watch(model, seen)
    model = fastbert.patch(model, unpad=True)
    result = model(**batch)
    torch.testing.assert_close(seen[0], expected[0])
    torch.testing.assert_close(result.logits[REAL], stock(**batch).logits[REAL])


def test_masks_made_by_somebody_else_see_what_stock_gives(monkeypatch):
    model, batch, seen = make(BASE), make_batch(BASE), []
    made = modeling_bert.create_bidirectional_mask
    name = "inputs_embeds" if "inputs_embeds" in inspect.signature(made).parameters else "input_embeds"

    def spied(*args, **kwargs):
        seen.append(kwargs[name])
        return made(*args, **kwargs)

    monkeypatch.setattr(modeling_bert, "create_bidirectional_mask", spied)
    expected = model(**batch).last_hidden_state
    torch.testing.assert_close(fastbert.patch(model, unpad=True)(**batch).last_hidden_state[REAL], expected[REAL])
    torch.testing.assert_close(seen[1], seen[0])


def test_requested_hidden_states_are_padded(embedded):
    model, batch = make(), batch_of()
    expected = model(**batch, output_hidden_states=True).hidden_states
    result = fastbert.patch(model, unpad=True)(**batch, output_hidden_states=True).hidden_states
    assert embedded == ALL
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("switches", [{"embeddings": False}, {"attention": False}], ids=str)
def test_without_the_kernels_it_needs(switches):
    assert not check(make().train(), batch_of(), **switches)[IDS]


def test_a_replaced_table_is_called(embedded):
    """A replaced table is called; its rows are stock's, packed afterwards."""
    model = make(tie_word_embeddings=False).train()
    model.bert.embeddings.word_embeddings.__class__ = type("Mine", (torch.nn.Embedding,), {})
    assert not check(model, batch_of())[IDS] and not embedded


def test_a_cache_counts_the_tokens_before(embedded):
    model, batch = make(CLM), make_batch(CLM, labels=False)
    patched = fastbert.patch(copy.deepcopy(model), unpad=True)
    for use_cache in (True, False):
        expected = model(**batch, use_cache=use_cache).logits
        torch.testing.assert_close(patched(**batch, use_cache=use_cache).logits[REAL], expected[REAL])
    assert embedded == [*ALL, (1, TOKENS)]


def test_every_call_is_counted_once():
    model = fastbert.patch(make(), unpad=True)
    for mask in ("right", "none"):
        model(**make_batch(mask=mask))
    (row,) = [row for row in fastbert.report(model).rows if row.hf_class == "BertEmbeddings"]
    assert (row.kernel_calls, row.fallback_calls) == (2, {})


def test_a_kernel_that_fails_is_stood_in_for(monkeypatch):
    from fastbert.kernels.core import failures
    from fastbert.kernels.embedding_layernorm import ids as embedding_ids

    def failing(*args, **kwargs):
        raise failures.KernelFailed(IDS, "for a test")

    monkeypatch.setattr(embedding_ids, "launch", failing)
    monkeypatch.setattr(failures, "strict", False)
    try:
        assert not check(make().train(), batch_of())[IDS]
    finally:
        failures.reset()
