"""Packing in every family: rows in products, what reads the encoder's output, and when the batch stays padded."""

import copy

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

import fastbert
from fastbert.kernels.core.launch import counts
from fastbert.testing.models import assert_bitwise, assert_equal, counting, doubled, rows_in_products, run
from tests.models.families import ELECTRA, ERNIE, FAMILIES, FAMILY_KINDS, LIKE_ROBERTA, ROBERTA
from tests.models.test_unpad import PACKED, READ, WHOLE
from tests.models.tiny import ANOTHER_ORDER, LENGTH, make, make_batch

pytestmark = pytest.mark.one_in(2)

POOLED = [kind for kind in FAMILY_KINDS if kind.name.endswith(("single-label", "multiple-choice", "next-sentence"))]
SEEN = "outputs at padded positions are visible"
CLASSIFIER, CHOICE = (ELECTRA.kind(name) for name in ("single-label", "multiple-choice"))
DENSE_HEADS = (*LIKE_ROBERTA, ELECTRA)  # whose head for classification reads the encoder's output itself


def encoder_row(model):
    (row,) = [row for row in fastbert.report(model).rows if row.hf_class.endswith("Encoder")]
    return row


def check(model, batch, gathered, reason=None, **switches):
    """Compare patched with stock; the launches of gather_rows say whether the batch was packed, and `reason` why not."""
    patched = fastbert.patch(copy.deepcopy(model), **switches)
    with counting(heads=True) as launched:
        results = run(patched, batch)
    assert_equal(results, run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch)))
    assert launched["gather_rows_kernel"] == gathered
    assert encoder_row(patched).fallback_calls == ({} if reason is None else {reason: 1})
    return patched


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", POOLED, ids=str)
def test_rows_that_enter_each_product_are_the_tokens(kind):
    """In the last layer one row per sequence, but for keys and values."""
    model, batch = fastbert.patch(make(kind)), make_batch(kind)
    tokens, sequences = int(batch["attention_mask"].sum()), batch["attention_mask"][..., 0].numel()
    rows = rows_in_products(lambda: model(**batch))
    if kind.name.startswith("Electra"):  # which projects its embeddings, of all positions, as stock does
        assert rows.pop(0) == sequences * LENGTH
    last = [sequences, tokens] + [sequences] * 3  # q; k and v; attention's output; the two of the feed-forward
    assert rows[: 4 + len(last)] == [tokens] * 4 * (model.config.num_hidden_layers - 1) + last
    assert set(rows[4 + len(last) :]) == {sequences} and tokens < sequences * LENGTH


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", POOLED, ids=str)
def test_embeddings_are_made_for_tokens_only(kind):
    """And for all positions where a module stands between them and the encoder."""
    model, batch = make(kind).train(), make_batch(kind)
    embedded = PACKED - 1 if kind.name.startswith("Electra") else 0
    check(model, batch, READ + 2 * embedded)


@pytest.mark.parametrize("kind", [CLASSIFIER, CHOICE], ids=str)
def test_an_electra_without_a_projection_embeds_tokens_only(kind):
    check(make(kind, embedding_size=40).train(), make_batch(kind), READ)


@pytest.mark.parametrize("family", [ROBERTA, ELECTRA, ERNIE], ids=str)
def test_without_padding_the_last_layer_runs_at_the_first_rows_still(family):
    kind = family.kind("single-label")
    check(make(kind).train(), make_batch(kind, "none"), WHOLE)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_true_is_equal_at_every_token(family):
    kind = family.kind("base")
    model, batch = make(kind), make_batch(kind, "holes")
    real = batch["attention_mask"].bool()
    stock = model(**batch).last_hidden_state
    patched = fastbert.patch(copy.deepcopy(model), unpad=True)
    result = patched(**batch).last_hidden_state
    torch.testing.assert_close(result[real], stock[real])
    assert not result[~real].any() and encoder_row(patched).kernel_calls == 1


def test_a_left_padded_batch_stays_padded():
    kind = ROBERTA.kind("single-label")
    check(make(kind), make_batch(kind, "left"), 0, "a padded position is read")


class Reads(nn.Module):
    """A classifier of a user's own, which sees all positions."""

    def __init__(self, width, labels):
        super().__init__()
        self.out = nn.Linear(width, labels)

    def forward(self, features, **_):
        return self.out(features.mean(1))


def subclass_of(classifier):
    cls = type(classifier)
    classifier.__class__ = type(cls.__name__, (cls,), {"forward": lambda self, features, **_: self.out_proj(features.mean(1))})


def replace_forward(classifier):
    classifier.forward = lambda features, **_: classifier.out_proj(features.mean(1))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("how", [subclass_of, replace_forward], ids=["a subclass", "a replaced forward"])
@pytest.mark.parametrize("family", DENSE_HEADS, ids=str)
def test_a_classifier_that_reads_more_is_seen(family, how):
    model = make(family.kind("single-label"))
    how(model.classifier)
    batch = make_batch(family.kind("single-label"))
    if how is replace_forward:  # it refers to the module, so a copy would call this one's
        stock = run(model, batch)
        torch.testing.assert_close(run(fastbert.patch(model), batch), stock, **ANOTHER_ORDER)
        assert encoder_row(model).fallback_calls == {SEEN: 1}
    else:
        check(model, batch, 0, SEEN)


@pytest.mark.parametrize("family", DENSE_HEADS, ids=str)
def test_a_users_own_classifier_keeps_the_batch_padded(family):
    model = make(family.kind("single-label"))
    model.classifier = Reads(40, 3)
    check(model, make_batch(family.kind("single-label")), 0, SEEN)


def test_a_classifier_put_in_place_after_patching_keeps_the_batch_padded():
    kind, batch = ROBERTA.kind("single-label"), make_batch(ROBERTA.kind("single-label"))
    model = fastbert.patch(make(kind))
    run(model, batch)
    model.classifier = Reads(40, 3)
    stock = fastbert.unpatch(copy.deepcopy(model))
    assert_equal(run(model, batch), run(copy.deepcopy(stock), batch), run(stock.double(), doubled(batch)))
    assert encoder_row(model).fallback_calls == {SEEN: 1}


HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("kind, name", [(ROBERTA.kind("single-label"), "classifier"), (CHOICE, "sequence_summary")], ids=str)
def test_a_hook_on_what_reads_sees_every_position(kind, name, register):
    model, batch, shapes = make(kind), make_batch(kind), []
    reader = model.get_submodule(name)
    getattr(reader, register)(lambda *given: shapes.append([tuple(x.shape) for x in given[1] if isinstance(x, torch.Tensor)]))
    patched = fastbert.patch(copy.deepcopy(model))
    shapes.clear()
    results, seen = run(patched, batch), copy.copy(shapes)
    shapes.clear()
    assert_equal(results, run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch)))
    assert seen and seen == shapes[: len(seen)]
    assert encoder_row(patched).fallback_calls == {SEEN: 1}


@pytest.mark.parametrize("kind", ["last", "mean", "cls_index"])
def test_a_summary_of_other_positions_stays_padded(kind):
    check(make(CHOICE, summary_type=kind), make_batch(CHOICE), 0, SEEN)


def test_a_summary_that_is_changed_after_patching():
    model, batch = fastbert.patch(make(CHOICE)), make_batch(CHOICE)
    run(model, batch)
    assert encoder_row(model).kernel_calls == 1
    model.sequence_summary.summary_type = "mean"
    stock = fastbert.unpatch(copy.deepcopy(model))
    assert_equal(run(model, batch), run(copy.deepcopy(stock), batch), run(stock.double(), doubled(batch)))
    assert encoder_row(model).fallback_calls == {SEEN: 1}


def test_code_that_reads_was_replaced(monkeypatch):
    """On the class: then the head's forward is no longer the one that is known to read the first position."""
    kind = ROBERTA.kind("single-label")
    cls = ROBERTA.module.RobertaClassificationHead
    monkeypatch.setattr(cls, "forward", lambda self, features, **_: self.out_proj(features.mean(1)))
    check(make(kind), make_batch(kind), 0, SEEN)


@pytest.mark.parametrize("family", [ROBERTA, ELECTRA], ids=str)
def test_peft_trains_the_classifier_beside_an_adapter(family):
    """LoRA on a classifier's task trains the whole classifier too, in a wrapper that calls a copy of it."""
    kind = family.kind("single-label")
    torch.manual_seed(0)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"], init_lora_weights=False)
    model, batch = get_peft_model(make(kind), lora), make_batch(kind)
    patched = fastbert.patch(copy.deepcopy(model))
    with counting(heads=True) as launched:
        results = run(patched, batch)
    assert launched["gather_rows_kernel"] and encoder_row(patched).kernel_calls == 1
    assert any("modules_to_save" in name for name in results)
    assert_equal(results, run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch)))

    copied = copy.deepcopy(model)
    (wrapper,) = [module for module in copied.modules() if type(module).__name__ == "ModulesToSaveWrapper"]
    wrapper.modules_to_save["default"] = Reads(40, 3)
    patched = fastbert.patch(copy.deepcopy(copied))
    assert_equal(run(patched, batch), run(copy.deepcopy(copied), batch), run(copied.double(), doubled(batch)))
    assert encoder_row(patched).fallback_calls == {SEEN: 1}


@pytest.mark.parametrize("how", ["a hook", "a hook inside", "a replaced forward"])
def test_pefts_wrapper_is_observed(how):
    """A hook on the wrapper or on what it calls, or a forward in its place, sees every position."""
    kind = ROBERTA.kind("single-label")
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query"])
    model, batch, seen = get_peft_model(make(kind), lora), make_batch(kind), []
    (wrapper,) = [module for module in model.modules() if type(module).__name__ == "ModulesToSaveWrapper"]
    if how != "a replaced forward":
        hooked = wrapper if how == "a hook" else wrapper.modules_to_save["default"]
        hooked.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    else:
        classifier = wrapper.modules_to_save["default"]
        wrapper.forward = lambda features, **_: seen.append(features.detach()) or classifier(features.roll(1, 1))
    stock = model(**batch).logits
    torch.testing.assert_close(fastbert.patch(model)(**batch).logits, stock)
    torch.testing.assert_close(*seen)
    assert encoder_row(model).fallback_calls == {SEEN: 1}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("given", [{"lengths": True}, {"token_budget": 16}])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_lengths_that_are_given(family, given):
    kind = family.kind("single-label")
    model, batch = fastbert.patch(make(kind)).train(), make_batch(kind)
    counted = run(model, batch)
    claims = {"lengths": batch["attention_mask"].sum(1).tolist()} if "lengths" in given else given
    before = counts.copy()
    with fastbert.lengths(model, **claims):
        results = run(model, batch)
    assert (counts - before)["gather_rows_kernel"]
    if "lengths" in given:
        assert_bitwise(results, counted)
    else:
        torch.testing.assert_close(results, counted, **ANOTHER_ORDER)


def test_the_model_inside_called_by_others_than_the_head_is_seen_everywhere():
    kind = ROBERTA.kind("single-label")
    model, batch = make(kind), make_batch(kind, labels=False)
    expected = model.roberta(**batch).last_hidden_state
    torch.testing.assert_close(fastbert.patch(model).roberta(**batch).last_hidden_state, expected)
    assert encoder_row(model).fallback_calls == {SEEN: 1}
