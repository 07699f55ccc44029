"""The padding-free encoder: the rows in each product, equality at real positions, and when the batch stays padded."""

import copy
import inspect
import pickle

import pytest
import torch

import fastbert
from fastbert.testing.models import assert_bitwise, assert_equal, counting, doubled, rows_in_products, run
from tests.models.tiny import BASE, CLASSIFICATION, CLM, KINDS, LENGTH, ROWS, make, make_batch

FIRST = ("next-sentence", "regression", "single-label", "multi-label", "multiple-choice")
AT_FIRST = [kind for kind in KINDS if kind.name in FIRST]
OTHERS = [kind for kind in KINDS if kind.name not in FIRST]
TOKEN_LABELS = [kind for kind in KINDS if kind.name in ("mlm", "clm", "token-classification")]
PACKED = 2  # launches: unpack, forward and backward; of what is packed the embeddings are never made padded
READ = 4  # and taking the rows that the last layer is read at
ANYWHERE = READ + 2  # of a causal encoder, and of what its attention gave
WHOLE = 4  # without padding there is nothing to pack


def check(model, batch, unpad, real=None, **switches):
    """Compare patched with eager, outputs at `real` positions only; returns the number of gather launches."""
    patched = fastbert.patch(copy.deepcopy(model), unpad=unpad, **switches)
    with counting(heads=True) as launched:
        results = run(patched, batch)
    eager, exact = run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch))
    for tensors in (eager, exact) if "logits" not in results else ():
        tensors.pop("logits", None)
    if real is not None:
        for tensors in (results, eager, exact):
            for name in [n for n, t in tensors.items() if not n.startswith("gradient") and t.shape[:2] == real.shape]:
                tensors[name] = tensors[name][real]
    assert_equal(results, eager, exact)
    return launched["gather_rows_kernel"]


def batch_of(kind, mask="right"):
    """A batch whose labels are -100 at padding, as collators make them."""
    batch = make_batch(kind, mask)
    if kind in TOKEN_LABELS:
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def encoder_row(model):
    (row,) = [row for row in fastbert.report(model).rows if row.hf_class == "BertEncoder"]
    return row


@pytest.mark.one_in(3)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", AT_FIRST, ids=str)
def test_auto_is_invisible_where_the_first_position_is_read(kind, dtype, attention):
    assert check(make(kind, dtype, attention).train(), make_batch(kind), "auto") == READ


@pytest.mark.parametrize("kind", OTHERS, ids=str)
def test_auto_changes_nothing_elsewhere(kind):
    model = fastbert.patch(make(kind))
    run(model, make_batch(kind), backward=False)
    row = encoder_row(model)
    assert (row.state, row.reason) == ("untouched", "unpad='auto', and outputs at padded positions are visible")


# A causal loss predicts a real token from the position before it, which may be leading padding or a gap.
LABELLED = [(kind, mask) for kind in TOKEN_LABELS for mask in ("right", "left", "holes") if kind is not CLM or mask == "right"]


@pytest.mark.parametrize("kind, mask", LABELLED, ids=str)
def test_true_is_equal_at_every_real_position(kind, mask):
    """The loss and every gradient are equal as well."""
    batch = batch_of(kind, mask)
    labelled = 0 if kind.name == "token-classification" else 2  # an MLM head gathers its labelled rows
    assert check(make(kind).train(), batch, True, batch["attention_mask"].bool()) == PACKED + labelled


@pytest.mark.parametrize("mask", ["right", "left", "holes"])
def test_true_gives_zeros_where_padding_is(mask):
    model, batch = make(BASE), make_batch(BASE, mask)
    expected = model(**batch).last_hidden_state
    result = fastbert.patch(model, unpad=True)(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(result[real], expected[real])
    assert not result[~real].any()


@pytest.mark.parametrize("unpad", ["auto", True])
def test_rows_that_enter_each_product_are_the_tokens(unpad):
    model, batch = fastbert.patch(make(CLASSIFICATION), unpad=unpad), make_batch(CLASSIFICATION)
    tokens = int(batch["attention_mask"].sum())
    rows = rows_in_products(lambda: model(**batch))
    # Per layer: one for q, k and v, attention's output, the two of the feed-forward. In the last layer: q for the
    # first rows, k and v for all rows, the others for the first rows. Then pooler and classifier.
    assert rows == [tokens] * 4 * (model.config.num_hidden_layers - 1) + [ROWS, tokens] + [ROWS] * 5
    assert tokens < ROWS * LENGTH


def padded(model, batch, reason, **keywords):
    """Check that the batch stays padded, with this reason, and that results are equal."""
    patched = fastbert.patch(copy.deepcopy(model), **keywords)
    with counting(heads=True) as launched:
        results = run(patched, batch)
    assert "gather_rows_kernel" not in launched
    assert encoder_row(patched).fallback_calls == {reason: 1}
    assert_equal(results, run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch)))


FIRST_IS_READ = "a padded position is read"


@pytest.mark.parametrize(
    "mask, reason",
    [
        ("left", FIRST_IS_READ),
        ("4-D", "a mask between queries and keys"),
    ],
)
def test_masks_that_stay_padded(mask, reason):
    padded(make(CLASSIFICATION), make_batch(CLASSIFICATION, mask), reason)


def test_padding_alone_stays_padded():
    batch = make_batch(CLASSIFICATION)
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    padded(make(CLASSIFICATION), batch, "a batch of padding only")


@pytest.mark.parametrize("mask", ["none", "ones"])
@pytest.mark.parametrize("kind", AT_FIRST, ids=str)
def test_without_padding_the_last_layer_runs_at_the_first_rows_still(kind, mask):
    batch = make_batch(kind, "none")
    if mask == "ones":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert check(make(kind).train(), batch, "auto") == WHOLE


@pytest.mark.parametrize("mask, reason", [("none", "a batch without a mask"), ("ones", "a batch without padding")])
def test_without_padding_and_read_everywhere_nothing_is_packed(mask, reason):
    batch = make_batch(BASE, "none")
    if mask == "ones":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    padded(make(BASE), batch, reason, unpad=True)


def test_true_and_question_answering():
    """Stock's loss is a softmax that includes padding, so zeros there change it; the logits of tokens are equal."""
    kind = next(kind for kind in KINDS if kind.name == "question-answering")
    model, batch = make(kind), make_batch(kind)
    stock = model(**batch)
    result = fastbert.patch(copy.deepcopy(model), unpad=True)(**batch)
    real = batch["attention_mask"].bool()
    bias = model.qa_outputs.bias
    for i, name in enumerate(("start_logits", "end_logits")):
        torch.testing.assert_close(result[name][real], stock[name][real])
        assert (result[name][~real] == bias[i]).all() and not torch.equal(stock[name][~real], result[name][~real])
    assert abs(result.loss - stock.loss) > 1e-4


def test_the_encoder_called_by_others_than_the_head_is_seen_everywhere():
    """Features are often taken from model.bert, which must return every position."""
    model, batch = make(CLASSIFICATION), make_batch(CLASSIFICATION, labels=False)
    expected = model.bert(**batch).last_hidden_state
    fastbert.patch(model)
    with counting(heads=True) as launched:
        result = model.bert(**batch).last_hidden_state
    assert "gather_rows_kernel" not in launched
    assert encoder_row(model).fallback_calls == {"outputs at padded positions are visible": 1}
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", ["bert", "bert.encoder", "bert.pooler"])
def test_a_hook_on_what_lies_between_sees_every_position(name):
    model, batch, seen = make(CLASSIFICATION), make_batch(CLASSIFICATION), {}
    for key in ("stock", "patched"):
        handle = model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, key=key: seen.update({key: inputs[0] if name == "bert.pooler" else output[0]})
        )
        model(**batch)
        handle.remove()
        fastbert.patch(model)
    torch.testing.assert_close(seen["patched"], seen["stock"])
    assert encoder_row(model).fallback_calls == {"outputs at padded positions are visible": 1}


@pytest.mark.parametrize("switches", [{}, {"residual_norm": False}], ids=["one op", "module by module"])
@pytest.mark.parametrize("kind", [CLASSIFICATION, CLM], ids=str)
def test_a_causal_encoder_is_read_at_requested_rows(kind, switches):
    """At rows other than the last of their sequences, which must also be gathered from attention's output."""
    model, batch = make(kind, is_decoder=True, use_cache=False).train(), make_batch(kind)
    if kind is CLM:
        batch["labels"][:, [1, 3, 4, 6, 7, 8]] = -100
        switches = switches | {"mlm_logits": "none"}
    assert check(model, batch, "auto", **switches) == ANYWHERE + 2 * (kind is CLM)


@pytest.mark.parametrize("mask, gathered", [("right", PACKED), ("none", 0)])
def test_a_causal_encoder_of_which_most_is_read_runs_whole(mask, gathered):
    model, batch = make(CLM).train(), make_batch(CLM, mask)
    batch["labels"][:] = 5
    if mask == "right":
        batch["labels"][batch["attention_mask"] == 0] = -100
    assert check(model, batch, "auto", mlm_logits="none") == gathered + 2  # an MLM head's labelled rows


@pytest.mark.parametrize("mask", ["none", "right"])
def test_of_a_causal_encoder_only_what_is_read_goes_through_the_last_feed_forward(mask):
    model, batch = fastbert.patch(make(CLASSIFICATION, is_decoder=True, use_cache=False)), make_batch(CLASSIFICATION, mask)
    tokens = ROWS * LENGTH if mask == "none" else int(batch["attention_mask"].sum())
    with torch.no_grad():
        rows = rows_in_products(lambda: model(**batch))
    assert rows == [tokens] * 9 + [ROWS] * 5


def test_one_layer_is_the_last():
    assert check(make(CLASSIFICATION, num_hidden_layers=1).train(), make_batch(CLASSIFICATION), "auto") == READ


def test_the_patched_head_keeps_name_and_signature():
    model = make(CLASSIFICATION)
    name, signature = type(model).__name__, inspect.signature(model.forward)
    fastbert.patch(model)
    assert (type(model).__name__, inspect.signature(model.forward)) == (name, signature)


def test_a_row_of_padding_alone_stays_padded():
    batch = make_batch(CLASSIFICATION)
    batch["attention_mask"][1] = 0
    padded(make(CLASSIFICATION), batch, FIRST_IS_READ)


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_what_would_show_packed_rows_stays_padded(flag):
    reason = "hidden states or attention weights were requested"
    padded(make(CLASSIFICATION), make_batch(CLASSIFICATION) | {flag: True}, reason)
    padded(make(CLASSIFICATION, **{flag: True}), make_batch(CLASSIFICATION), reason)


def test_packs_again_after_hidden_states_were_requested_once():
    """transformers leaves its hooks on the modules permanently; idle ones are no reason to fall back."""
    model, batch = fastbert.patch(make(CLASSIFICATION)), make_batch(CLASSIFICATION)
    run(model, batch | {"output_hidden_states": True}, backward=False)
    with counting(heads=True) as launched:
        run(model, batch)
    assert launched["gather_rows_kernel"] == READ


def test_chunks_stay_padded():
    padded(make(CLASSIFICATION, chunk_size_feed_forward=3), make_batch(CLASSIFICATION), "a chunked feed-forward")


@pytest.mark.parametrize("name", ["", ".attention.self", ".output.dense"])
def test_a_hook_on_a_layer_sees_the_padded_batch(name):
    model, batch, shapes = make(CLASSIFICATION), make_batch(CLASSIFICATION), []
    module = model.get_submodule("bert.encoder.layer.1" + name)
    handle = module.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[:2]))
    fastbert.patch(model)
    run(model, batch)
    assert shapes == [(ROWS, LENGTH)]
    (reason,) = encoder_row(model).fallback_calls
    assert "hook" in reason or "not the kernel's" in reason
    handle.remove()
    with counting(heads=True) as launched:
        run(model, batch)
    assert launched["gather_rows_kernel"] == READ


def test_without_the_attention_kernel_it_stays_padded():
    padded(make(CLASSIFICATION), make_batch(CLASSIFICATION), "a layer whose attention does not use the kernel", attention=False)


def test_a_cache_stays_padded():
    model = fastbert.patch(make(CLM), unpad=True)
    model(**make_batch(CLM, labels=False), use_cache=True)
    assert encoder_row(model).fallback_calls == {"cross-attention or a cache": 1}


@pytest.mark.parametrize("switches", [{}, {"residual_norm": False}], ids=["one op", "stock layers"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_on_is_off_with_dropout(reentrant, switches):
    model = make(CLASSIFICATION, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    fastbert.patch(model, **switches).train()
    batch = make_batch(CLASSIFICATION)
    torch.manual_seed(3)
    off = run(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(3)
    with counting(heads=True) as launched:
        assert_bitwise(run(model, batch), off)
    assert launched["gather_rows_kernel"] == READ + 1  # the last layer gathers its rows again


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_packs_too(copied):
    model = copied(fastbert.patch(make(CLASSIFICATION)))
    with counting(heads=True) as launched:
        run(model, make_batch(CLASSIFICATION))
    assert launched["gather_rows_kernel"] == READ


def test_false_unpatch_and_a_second_patch():
    model, batch = make(CLASSIFICATION), make_batch(CLASSIFICATION)
    stock = type(model.bert.encoder)
    fastbert.patch(model)
    assert type(model.bert.encoder) is not stock
    fastbert.patch(model, unpad=False)
    assert type(model.bert.encoder) is stock and encoder_row(model).reason == "unpad=False"
    fastbert.patch(model, unpad=True)
    with counting(heads=True) as launched:
        run(model, batch)
    assert launched["gather_rows_kernel"] == READ
    assert type(fastbert.unpatch(model).bert.encoder) is stock


@pytest.mark.parametrize("unpad", ["auto", True])
def test_strict_counts_what_unpad_asks_for(unpad):
    fastbert.patch(make(CLASSIFICATION), unpad=unpad, strict=True)


def test_under_autocast():
    model, batch = make(CLASSIFICATION).train(), make_batch(CLASSIFICATION)
    autocast = torch.autocast(model.device.type, torch.float16)
    with counting(heads=True) as launched:
        results = run(fastbert.patch(copy.deepcopy(model)), batch, within=autocast)
    assert launched["gather_rows_kernel"] == READ
    eager = run(copy.deepcopy(model), batch, within=autocast)
    assert_equal(results, eager, run(copy.deepcopy(model).double(), doubled(batch)))


def test_compiled_stays_padded_and_whole():
    model, batch = make(CLASSIFICATION, num_hidden_layers=1), make_batch(CLASSIFICATION)
    torch.compiler.reset()
    fast = torch.compile(fastbert.patch(copy.deepcopy(model)), fullgraph=True, backend="aot_eager")
    with counting(heads=True) as launched:
        loss = fast(**batch).loss
    assert "gather_rows_kernel" not in launched
    torch.testing.assert_close(loss, model(**batch).loss)
