"""fastbert.lengths and LengthsCollator: no synchronisation, repeated shapes, and no token dropped silently."""

import copy

import pytest
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import fastbert
from fastbert.kernels.core.launch import recording
from fastbert.layers.counts import CallerCounts
from fastbert.layers.packing import rows_of, side_by_side
from fastbert.layers.packing_plan import plan_packing
from fastbert.layers.reading import Reading
from fastbert.testing.models import assert_equal, counting, doubled, run
from tests.models.tiny import BASE, CLASSIFICATION, DEVICE, KINDS, LENGTH, MLM, ROWS, VOCABULARY, make, make_batch

CHOICE = next(kind for kind in KINDS if kind.name == "multiple-choice")
PRETRAINING = next(kind for kind in KINDS if kind.name == "pretraining")
KEYWORDS = {"base": {"unpad": True}, "mlm": {"mlm_logits": "none"}, "pretraining": {"mlm_logits": "none"}}


def known(kind, batch):
    """The counts of this batch that the host knows."""
    facts = {"lengths": batch["attention_mask"].flatten(0, -2).sum(1).tolist()}
    if kind in (MLM, PRETRAINING):
        read = batch["labels"] != -100
        if kind is PRETRAINING:
            read[:, 0] = True
        facts["read"] = read.sum(1).tolist()
    return facts


def batch_of(kind, mask="right"):
    batch = make_batch(kind, mask)
    if kind in (MLM, PRETRAINING):
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def check(kind, batch, **facts):
    """Check that results equal eager's and that the model packed."""
    model = make(kind).train()
    patched = fastbert.patch(copy.deepcopy(model), **KEYWORDS.get(kind.name, {}))
    with fastbert.lengths(patched, **facts), counting(heads=True) as launched:
        results = run(patched, batch)
    assert launched["gather_rows_kernel"] and not encoder_row(patched).fallback_calls
    eager, exact = run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch))
    for tensors in (results, eager, exact):
        for name in ("logits", "prediction_logits"):
            if kind in (MLM, PRETRAINING):
                tensors.pop(name, None)
        if kind is BASE:
            tensors["last_hidden_state"] = tensors["last_hidden_state"][batch["attention_mask"].bool()]
            del tensors["pooler_output"]
    if kind is not BASE:
        assert_equal(results, eager, exact)
    else:
        torch.testing.assert_close(results["last_hidden_state"], eager["last_hidden_state"], rtol=1e-4, atol=1e-4)
    return patched


def encoder_row(model):
    (row,) = [row for row in fastbert.report(model).rows if row.hf_class == "BertEncoder"]
    return row


@pytest.mark.one_in(2)
@pytest.mark.parametrize("bucket", [1, 8])
@pytest.mark.parametrize("kind", [BASE, CLASSIFICATION, CHOICE, MLM, PRETRAINING], ids=str)
def test_given_lengths(kind, bucket):
    batch = batch_of(kind)
    model = check(kind, batch, **known(kind, batch), bucket=bucket)
    assert not any("caller_counts" in vars(module) for module in model.modules())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("budget", [ROWS * LENGTH, 41])
@pytest.mark.parametrize("kind", [BASE, CLASSIFICATION, MLM, PRETRAINING], ids=str)
def test_a_budget(kind, budget):
    check(kind, batch_of(kind), token_budget=budget, read_budget=budget)


def test_a_budget_of_what_is_read_alone():
    """The rows that are read then have more sequences than the tokens."""
    batch = batch_of(MLM)
    check(MLM, batch, lengths=known(MLM, batch)["lengths"], read_budget=ROWS * LENGTH)


def test_the_keys_have_as_many_sequences_as_what_is_read():
    """The keys get empty sequences at the end."""
    chosen = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    keys, read = rows_of(chosen, 3, 6), rows_of(chosen, 3, 11, exact=False)
    found = [bounds.tolist() for bounds in side_by_side(keys, read)]
    assert found == [[0, 3, 6, 6, 6, 6, 6], [0, 3, 6, 9, 11, 11, 11]]
    assert [bounds.tolist() for bounds in side_by_side(keys, keys)] == [[0, 3, 6]] * 2


def test_spare_capacity_is_in_separate_sequences():
    """They fill the capacity and are no longer than max_seqlen: attention writes only rows that belong to a sequence."""
    rows = rows_of(torch.tensor([[True, True, False], [False, True, False]], device=DEVICE), 2, 8, exact=False)
    assert rows.index.tolist() == [0, 1, 4, -1, -1, -1, -1, -1]
    assert rows.cu_seqlens.tolist() == [0, 2, 3, 5, 7, 8, 8]


@pytest.mark.parametrize("mask", ["none", "holes", "one token"])
def test_other_masks(mask):
    batch = make_batch(CLASSIFICATION, mask)
    lengths = batch["attention_mask"].sum(1).tolist() if mask != "none" else [LENGTH] * ROWS
    check(CLASSIFICATION, batch, lengths=lengths, bucket=4)


GIVEN = {
    "lengths": CallerCounts(lengths=(4, 2), read=(2, 1)),
    "buckets": CallerCounts(lengths=(4, 2), read=(2, 1), bucket=8),
    "budgets": CallerCounts(token_budget=16, read_budget=8),
}


@pytest.mark.parametrize("read", ["first", "labelled"])
@pytest.mark.parametrize("given", GIVEN)
def test_no_synchronisation(given, read):
    """On the meta device a tensor has no value, so reading one fails."""
    mask = torch.empty(2, 5, dtype=torch.bool, device="meta")
    reading = Reading(None if read == "first" else mask.clone(), alone=True)
    with recording("sm_90", lambda *_: None):
        packing = plan_packing(mask, reading, GIVEN[given], 2, 5, mask.device)
    tokens, reads = {"lengths": (6, 3), "buckets": (8, 8), "budgets": (16, 8)}[given]
    assert packing.tokens.index.shape == (tokens,)
    assert packing.read.index.shape == (2 if read == "first" else reads,)
    with pytest.raises(Exception, match="meta"), recording("sm_90", lambda *_: None):
        plan_packing(mask, reading, CallerCounts(), 2, 5, mask.device)


def test_one_synchronisation_counts_all(monkeypatch):
    """It counts tokens and positions that are read, and whether one of those is padding."""
    waits, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: waits.append(x) or tolist(x))
    mask = make_batch(MLM)["attention_mask"].bool()
    packing = plan_packing(mask, Reading(mask.clone(), alone=True), CallerCounts(), ROWS, LENGTH, mask.device)
    assert len(waits) == 1 and len(packing.tokens.index) == int(mask.sum())


@pytest.mark.parametrize(
    "facts",
    [{"lengths": [LENGTH, LENGTH - 4]}, {"lengths": [LENGTH - 1, LENGTH - 2]}, {"token_budget": 3}],
    ids=["too few", "as many in all, too short a longest", "too small a budget"],
)
def test_numbers_that_are_wrong_stop(facts):
    model = fastbert.patch(make(CLASSIFICATION))
    with fastbert.lengths(model, **facts), pytest.raises(RuntimeError, match="lengths"):
        model(**make_batch(CLASSIFICATION))  # 9 and 6 tokens


def test_lengths_that_deny_the_padding_stop():
    """With these lengths the batch has no padding and need not be packed, but the mask disagrees."""
    model = fastbert.patch(make(BASE), unpad=True)
    with fastbert.lengths(model, [LENGTH] * ROWS), pytest.raises(RuntimeError, match="lengths"):
        model(**make_batch(BASE, "right"))


def test_a_read_position_that_is_padding_stops():
    model = fastbert.patch(make(CLASSIFICATION))
    with fastbert.lengths(model, token_budget=50), pytest.raises(RuntimeError, match="padded position is read"):
        model(**make_batch(CLASSIFICATION, "left"))


@pytest.mark.parametrize(
    "facts, message",
    [
        ({}, "lengths: expected the tokens of each row"),
        ({"lengths": [3, -1]}, "lengths: expected integers from 0 on"),
        ({"lengths": [3.0]}, "lengths: expected integers"),
        ({"lengths": [3], "bucket": 0}, "bucket: expected an integer from 1 on, got 0"),
        ({"token_budget": -1}, "token_budget: expected"),
        ({"token_budget": 2.5}, "token_budget: expected"),
    ],
)
def test_bad_numbers(facts, message):
    with pytest.raises(ValueError, match=message), fastbert.lengths(fastbert.patch(make(CLASSIFICATION)), **facts):
        pass


@pytest.mark.parametrize("lengths", [[9], [9, 6, 1], [9, 10]])
def test_numbers_that_do_not_fit_the_batch(lengths):
    model = fastbert.patch(make(CLASSIFICATION))
    expected = f"lengths: expected {ROWS} numbers from 0 to {LENGTH}"
    with fastbert.lengths(model, lengths), pytest.raises(ValueError, match=expected):
        model(**make_batch(CLASSIFICATION))
    model(**make_batch(CLASSIFICATION))


def test_a_model_that_does_not_pack():
    for model in (make(), fastbert.patch(make()), fastbert.patch(make(CLASSIFICATION), unpad=False)):
        with pytest.raises(ValueError, match="model: expected one whose encoder packs"), fastbert.lengths(model, [9, 6]):
            pass
    with pytest.raises(TypeError), fastbert.lengths("bert", [9, 6]):
        pass


def test_blocks_nest():
    model = fastbert.patch(make(CLASSIFICATION))
    with fastbert.lengths(model, [9, 6]):
        with fastbert.lengths(model, token_budget=50):
            assert model.bert.encoder.caller_counts.token_budget == 50
        assert model.bert.encoder.caller_counts.lengths == (9, 6)
    assert model.bert.encoder.caller_counts is None


@pytest.mark.parametrize("kind", [CLASSIFICATION, MLM], ids=str)
def test_compiled_with_a_budget(kind):
    """It compiles without breaks, and once for batches of all lengths."""
    model = make(kind, num_hidden_layers=1).train()
    patched = fastbert.patch(copy.deepcopy(model), **KEYWORDS.get(kind.name, {}))
    torch.compiler.reset()
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager", dynamic=False)
    torch._dynamo.utils.counters.clear()
    with fastbert.lengths(patched, token_budget=ROWS * LENGTH, read_budget=ROWS * LENGTH), counting(heads=True) as launched:
        for mask in ("right", "holes", "one token"):
            batch = batch_of(kind, mask)
            if kind is MLM:
                batch["labels"][:, 0] = 3
            loss = compiled(**batch).loss
            torch.testing.assert_close(loss, model(**batch).loss)
    loss.backward()
    assert launched["gather_rows_kernel"] == 3 * (3 + (kind is MLM))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert patched.bert.encoder.layer[0].output.dense.weight.grad.isfinite().all()


def test_a_collator_tells_the_trainer_s_model(tmp_path, monkeypatch):
    """Its counts reach the encoder; a stock model takes the same batches."""

    class Tokenizer:  # the part of a tokenizer that DataCollatorWithPadding needs
        def pad(self, features, **_):
            return {name: torch.stack([f[name] for f in features]) for name in features[0]}

    rows = [{name: tensor[i].cpu() for name, tensor in make_batch(CLASSIFICATION).items()} for i in range(ROWS)]
    seen = []
    monkeypatch.setattr("fastbert.layers.encoder.plan_packing", lambda *a: seen.append(a[2].lengths) or plan_packing(*a))
    losses = []
    for patched in (False, True):
        model = make(CLASSIFICATION)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=ROWS, report_to=[], disable_tqdm=True,
            use_cpu=DEVICE.type == "cpu", dataloader_pin_memory=False, save_strategy="no", logging_steps=1, seed=1,
        )  # fmt: skip
        collator = fastbert.LengthsCollator(DataCollatorWithPadding(Tokenizer()))
        trainer = Trainer(
            model=fastbert.patch(model) if patched else model, args=arguments, train_dataset=rows, data_collator=collator
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert [sorted(lengths) for lengths in seen] == [[6, 9]] * 2
    torch.testing.assert_close(losses[0], losses[1], rtol=0.0, atol=1e-5)


def test_what_the_collator_counts():
    batch = batch_of(PRETRAINING)
    batch["labels"][:, 0] = -100
    counted = fastbert.LengthsCollator(lambda _: dict(batch))([])
    labelled = (batch["labels"] != -100).sum(1)
    assert counted["lengths"] == [9, 6] and counted["read_lengths"] == (labelled + 1).tolist()
    del batch["next_sentence_label"]
    batch["labels"][:, -1] = VOCABULARY - 1
    causal = fastbert.LengthsCollator(lambda _: dict(batch), causal=True)([])
    assert causal["read_lengths"] == (batch["labels"][:, 1:] != -100).sum(1).tolist()
    model = fastbert.patch(make(MLM).train(), mlm_logits="none")
    batch = batch_of(MLM)
    torch.testing.assert_close(model(**fastbert.LengthsCollator(lambda _: dict(batch))([])).loss, make(MLM)(**batch).loss)
