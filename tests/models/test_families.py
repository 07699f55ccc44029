"""Every head of every family equals stock's in outputs, loss and gradients, also for inputs that a family treats alone."""

import copy

import pytest
import torch
from torch import nn

import fastbert
from fastbert.testing.models import assert_equal, check, doubled, expected_launches, run
from tests.models.families import (
    COPIES,
    DISCRIMINATOR,
    ELECTRA,
    ERNIE,
    FAMILIES,
    FAMILY_KINDS,
    LIKE_ROBERTA,
    ROBERTA,
    XLM_ROBERTA,
)
from tests.models.test_equality import DTYPES
from tests.models.tiny import LENGTH, ROWS, VOCABULARY, make, make_batch

pytestmark = pytest.mark.one_in(2)

WORDS, POSITIONS, TASKS = (f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "task_type"))
COPIED = tuple(f"{family}" for family in COPIES)
FIRST = [kind for kind in FAMILY_KINDS if not kind.name.startswith(COPIED)]
OF_COPIES = [kind for kind in FAMILY_KINDS if kind.name.startswith(COPIED)]
HEADS_WITH_LOGITS = [kind for kind in FAMILY_KINDS if kind.name.endswith((" mlm", " clm", " pretraining"))]


def table(results, name):
    """The gradient of a table of embeddings, whatever the model in front is called."""
    (found,) = [tensor for key, tensor in results.items() if key.startswith("gradient of") and key.endswith(name)]
    return found


def check_kind(kind, dtype, attention, training, mask="right"):
    # In eval mode dropout is configured and must not be applied.
    options = {"hidden_dropout_prob": 0.0 if training else 0.3}
    model, eager = (make(kind, DTYPES[dtype], chosen, **options).train(training) for chosen in (attention, "eager"))
    results = check(model, make_batch(kind, mask), eager=eager)
    assert len(results) > len(list(model.parameters()))  # every gradient, and outputs beside them


@pytest.mark.one_in(4)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", FIRST, ids=str)
def test_every_head_is_equal(kind, attention, mode):
    check_kind(kind, "fp32", attention, mode == "train")


@pytest.mark.one_in(12)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", OF_COPIES, ids=str)
def test_every_head_of_a_family_with_robertas_code_is_equal(kind, attention, mode):
    check_kind(kind, "fp32", attention, mode == "train")


@pytest.mark.parametrize("kind", [ROBERTA.kind("mlm"), ELECTRA.kind("mlm"), DISCRIMINATOR, ERNIE.kind("base")], ids=str)
def test_a_head_of_every_code_is_equal_in_float64(kind):
    # Rounding hides nothing here: an error of 1e-13 shows.
    check_kind(kind, "fp64", "eager", True, "holes")


@pytest.mark.one_in(12)
@pytest.mark.parametrize("mask", ["none", "left", "holes"])
@pytest.mark.parametrize("kind", FAMILY_KINDS, ids=str)
def test_every_head_is_equal_in_float16(kind, mask):
    check_kind(kind, "fp16", "sdpa", True, mask)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("unpad", ["auto", True])
@pytest.mark.parametrize("kind", HEADS_WITH_LOGITS, ids=str)
def test_without_logits(kind, unpad):
    """Loss and gradients are stock's; the labelled rows alone go through the head."""
    model, batch = make(kind).train(), make_batch(kind)
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    patched = fastbert.patch(copy.deepcopy(model), mlm_logits="none", unpad=unpad)
    results = run(patched, batch)
    assert not {"logits", "prediction_logits"} & results.keys() and "loss" in results
    others = [run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch))]
    for tensors in others:
        tensors.pop("logits", None)
        tensors.pop("prediction_logits", None)
    assert_equal(results, *others)
    (row,) = [row for row in fastbert.report(patched).rows if row.kernel == "linear_cross_entropy"]
    assert (row.state, row.kernel_calls, row.fallback_calls) == ("active", 1, {})
    (row,) = [row for row in fastbert.report(patched).rows if row.hf_class.endswith("Encoder")]
    assert row.kernel_calls == 1, row


@pytest.mark.parametrize("family", [ROBERTA, ELECTRA], ids=str)
def test_without_labels(family):
    """The MLM head is then called as one module."""
    kind = family.kind("mlm")
    assert check(make(kind), make_batch(kind, labels=False))["logits"].shape == (ROWS, LENGTH, VOCABULARY)


class TestPositions:
    """RoBERTa counts positions from the padding token's id on, and skips padding."""

    def batch(self, padding, **changes):
        batch = make_batch(ROBERTA.kind("base"))
        ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, padding)
        ids[0, 2:4] = padding  # inside a row, where the mask does not hide it
        return batch | {"input_ids": ids} | changes

    @pytest.mark.parametrize("padding", [0, 1, 5])
    def test_padding_inside_a_row(self, padding):
        results = check(make(ROBERTA.kind("base"), pad_token_id=padding), self.batch(padding))
        words, positions = table(results, WORDS), table(results, POSITIONS)
        assert not words[padding].any() and not positions[: padding + 1].any()
        assert positions[padding + 1].any() and not positions[padding + 1 + LENGTH :].any()

    def test_another_padding_row_than_that_of_the_positions(self):
        """The module counts with its attribute; the tables have rows of their own without a gradient."""
        model = make(ROBERTA.kind("base"))
        model.embeddings.position_embeddings.padding_idx = 4
        model.embeddings.word_embeddings.padding_idx = None
        results = check(model, self.batch(1))
        words, positions = table(results, WORDS), table(results, POSITIONS)
        assert words[1].any() and positions[1].any() and not positions[4].any() and positions[5].any()

    @pytest.mark.parametrize("padding", [1, 3])
    def test_positions_are_given(self, padding):
        positions = torch.arange(LENGTH).flip(0).expand(ROWS, LENGTH) + 2
        batch = self.batch(padding, position_ids=positions.contiguous())
        results = check(make(ROBERTA.kind("base"), pad_token_id=padding), batch)
        assert table(results, POSITIONS)[padding].any() == 0

    def test_one_row_of_positions_for_all(self):
        check(make(ROBERTA.kind("base")), self.batch(1, position_ids=torch.arange(3, LENGTH + 3)[None]))

    def test_embeddings_are_given(self):
        """Then positions count through padding."""
        model, batch = make(ROBERTA.kind("base")), self.batch(1)
        del batch["input_ids"]
        batch["inputs_embeds"] = torch.randn(ROWS, LENGTH, 40, requires_grad=True)
        results = check(model, batch)
        assert table(results, "inputs_embeds").abs().min(-1).values.gt(0).all()
        assert not table(results, POSITIONS)[1].any()

    def test_positions_of_ones_own(self):
        """A function put on the instance, as in stock."""
        model = make(ROBERTA.kind("base"))
        model.embeddings.create_position_ids_from_input_ids = lambda ids, padding, past: ids % 7 + 3
        results = check(model, self.batch(1))
        assert not table(results, POSITIONS)[:3].any() and table(results, POSITIONS)[3].any()

    @pytest.mark.parametrize("unpad", ["auto", True])
    def test_more_tokens_than_positions_are_an_error_as_in_stock(self, unpad):
        model, ids = make(ROBERTA.kind("single-label")), torch.full((1, 23), 5)
        for chosen in (model, fastbert.patch(copy.deepcopy(model), unpad=unpad)):
            with pytest.raises((IndexError, RuntimeError)):
                chosen(input_ids=ids)
            chosen(input_ids=ids[:, :22])

    @pytest.mark.parametrize("family", LIKE_ROBERTA, ids=str)
    def test_one_type_by_default(self, family):
        batch = make_batch(family.kind("mlm"))
        del batch["token_type_ids"]
        results = check(make(family.kind("mlm"), type_vocab_size=1), batch)
        assert table(results, "token_type_embeddings.weight").shape == (1, 40)

    def test_types_from_the_buffer(self):
        """They are taken by position, which padding skips."""
        model, batch = make(ROBERTA.kind("base")), self.batch(1)
        del batch["token_type_ids"]
        model.embeddings.token_type_ids[:, 5:9] = 1
        results = check(model, batch)
        assert table(results, "token_type_embeddings.weight").any(-1).all()

    def test_resized(self):
        model = make(ROBERTA.kind("mlm"))
        model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
        table = nn.Embedding(30, 40, padding_idx=1)
        model.roberta.embeddings.position_embeddings = table
        batch = self.batch(
            1, input_ids=torch.full((ROWS, LENGTH), VOCABULARY + 3), labels=torch.full((ROWS, LENGTH), VOCABULARY)
        )
        check(model, batch)
        ids = torch.full((1, 27), VOCABULARY + 5)
        del model.roberta.embeddings.token_type_ids  # which has one per old position
        check(model, {"input_ids": ids, "labels": ids})


class TestElectra:
    @pytest.mark.parametrize("name", ["base", "mlm", "single-label", "multiple-choice"])
    def test_without_a_projection(self, name):
        kind = ELECTRA.kind(name)
        model = make(kind, embedding_size=40)
        assert not hasattr(getattr(model, "electra", model), "embeddings_project")
        check(model, make_batch(kind))

    def test_the_projection_has_a_gradient(self):
        results = check(make(ELECTRA.kind("base")), make_batch(ELECTRA.kind("base")))
        assert table(results, "embeddings_project.weight").shape == (40, 24)

    @pytest.mark.parametrize("mask", ["none", "right", "left"])
    def test_the_discriminators_loss_counts_tokens_only(self, mask):
        results = check(make(DISCRIMINATOR), make_batch(DISCRIMINATOR, mask))
        assert results["logits"].shape == (ROWS, LENGTH)

    def test_a_discriminator_whose_activation_has_no_kernel(self):
        model, batch = make(DISCRIMINATOR, hidden_act="relu"), make_batch(DISCRIMINATOR)
        model.discriminator_predictions.activation = nn.Softplus()
        expected = expected_launches(model)
        for direction in ("fwd", "bwd"):
            expected[f"bias_gelu_{direction}_kernel"] -= 1
        check(model, batch, expected=expected)
        row = next(row for row in fastbert.report(fastbert.patch(model)).rows if row.module == "discriminator_predictions")
        assert row.reason == "activation Softplus has no kernel"

    @pytest.mark.parametrize("kind", ["last", "mean", "cls_index"])
    @pytest.mark.parametrize("projected", [True, False])
    def test_another_summary(self, kind, projected):
        choice = ELECTRA.kind("multiple-choice")
        model = make(choice, summary_type=kind, summary_use_proj=projected, num_labels=1)
        check(model, make_batch(choice))


class TestErnie:
    def batch(self, kind, **changes):
        return make_batch(kind) | changes

    @pytest.mark.parametrize("name", ["base", "mlm", "single-label"])
    def test_without_tasks(self, name):
        kind = ERNIE.kind(name)
        model = make(kind, use_task_id=False)
        assert not any("task_type" in name for name, _ in model.named_parameters())
        check(model, make_batch(kind))

    def test_the_first_task_by_default(self):
        results = check(make(ERNIE.kind("base")), make_batch(ERNIE.kind("base")))
        assert table(results, TASKS)[0].any() and not table(results, TASKS)[1:].any()

    @pytest.mark.parametrize("name", ["base", "single-label", "mlm"])
    def test_tasks_that_are_given_are_stocks(self, name):
        kind = ERNIE.kind(name)
        batch = self.batch(kind, task_type_ids=torch.randint(3, (ROWS, LENGTH)))
        model = make(kind)
        results = check(model, batch, expected=expected_launches(model, without=["embedding_layernorm"]))
        assert table(results, TASKS)[1:3].any()
        patched = fastbert.patch(model)
        run(patched, batch)
        (row,) = [row for row in fastbert.report(patched).rows if row.hf_class == "ErnieEmbeddings"]
        assert row.fallback_calls == {"task_type_ids": 1}

    def test_a_padding_row_of_the_tasks(self):
        model = make(ERNIE.kind("base"))
        model.embeddings.task_type_embeddings.padding_idx = 0
        batch = make_batch(ERNIE.kind("base"))
        results = check(model, batch, expected=expected_launches(model, without=["embedding_layernorm"]))
        assert not table(results, TASKS).any()

    def test_a_hook_on_the_tasks_sees_its_call(self):
        model, seen = make(ERNIE.kind("base")), []
        model.embeddings.task_type_embeddings.register_forward_hook(lambda *_: seen.append(1))
        run(fastbert.patch(model), make_batch(ERNIE.kind("base")))
        assert seen == [1]

    def test_embeddings_are_given(self):
        batch = make_batch(ERNIE.kind("base"))
        batch["inputs_embeds"] = torch.randn(ROWS, LENGTH, 40, requires_grad=True)
        del batch["input_ids"]
        check(make(ERNIE.kind("base")), batch)


@pytest.mark.parametrize("family", [ROBERTA, ELECTRA, ERNIE], ids=str)
def test_a_transform_before_a_decoder_with_hooks_inside(family):
    """A hook on a part of the MLM head runs as in stock, and the results stay stock's."""
    kind = family.kind("mlm")
    model, seen = make(kind), []
    names = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm) and "encoder" not in name]
    (head_norm,) = [name for name in names if "embeddings" not in name]
    model.get_submodule(head_norm).register_forward_hook(lambda *_: seen.append(1))
    batch, patched = make_batch(kind), fastbert.patch(copy.deepcopy(model))
    results = run(patched, batch)
    assert seen == [1]
    assert_equal(results, run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch)))


@pytest.mark.parametrize("family", [ROBERTA, XLM_ROBERTA], ids=str)
def test_another_gelu_in_transformers_module(family, monkeypatch):
    """RoBERTa's LM head calls a function of its module by name."""
    monkeypatch.setattr(family.module, "gelu", torch.tanh)
    model, batch = make(family.kind("mlm")), make_batch(family.kind("mlm"))
    patched = fastbert.patch(copy.deepcopy(model))
    assert_equal(run(patched, batch), run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch)))
    without_logits = fastbert.patch(copy.deepcopy(model).train(), mlm_logits="none")
    torch.testing.assert_close(without_logits(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_dropout_is_drawn_and_repeats(family):
    model = fastbert.patch(make(family.kind("mlm"), hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)).train()
    batch, losses = make_batch(family.kind("mlm")), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**batch).loss.item())
    assert losses[0] == losses[1] != losses[2]
