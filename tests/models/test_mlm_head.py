"""The MLM heads' loss from the labelled rows: equality, which rows are computed, what is returned, fallbacks."""

import copy
import inspect
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import fastbert
from fastbert.testing.models import assert_equal, counting, doubled, rows_in_products, run
from tests.models.tiny import CLM, DEVICE, KINDS, LENGTH, MLM, ROWS, VOCABULARY, make, make_batch

PRETRAINING = next(kind for kind in KINDS if kind.name == "pretraining")
HEADS = [MLM, PRETRAINING, CLM]
WIDTH = 20
LOSS = "linear_cross_entropy_fwd_kernel"


def batch_of(kind, mask="right"):
    """A batch whose labels are -100 at padding, as collators make them."""
    batch = make_batch(kind, mask)
    if mask != "none":
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def results_of(model, batch, keywords, within=None):
    """Results of stock, of float64, and of patched with these keywords, without the tensors that are documented to differ."""
    patched = fastbert.patch(copy.deepcopy(model), **keywords)
    with counting(heads=True) as launched:
        results = run(patched, batch, within=within)
    eager, exact = run(copy.deepcopy(model), batch, within=within), run(copy.deepcopy(model).double(), doubled(batch))
    logits = [name for name in eager if name in ("logits", "prediction_logits")]
    if keywords.get("mlm_logits") == "none" and model.training:
        assert logits and not any(name in results for name in logits)
    for tensors in (results, eager, exact):
        for name in logits:
            if keywords.get("mlm_logits") == "none":
                tensors.pop(name, None)
            elif keywords.get("unpad") is True:
                tensors[name] = tensors[name][batch["attention_mask"].bool()]
    return patched, launched, (results, eager, exact)


def check(model, batch, within=None, **keywords):
    """Check equality and that the kernel computed the loss, once. Returns the launches."""
    patched, launched, (results, eager, exact) = results_of(model, batch, keywords, within)
    assert launched[LOSS] == 1
    row = head_row(patched)
    assert (row.state, row.kernel, row.kernel_calls, row.fallback_calls) == ("active", "linear_cross_entropy", 1, {})
    assert_equal(results, eager, exact, torch.float16 if within else torch.float64)
    return launched


def head_row(model):
    (row,) = [row for row in fastbert.report(model).rows if row.hf_class in [kind.cls.__name__ for kind in HEADS]]
    return row


@pytest.mark.one_in(2)
@pytest.mark.parametrize("unpad", ["auto", True, False])
@pytest.mark.parametrize("mlm_logits", ["full", "none"])
@pytest.mark.parametrize("kind", HEADS, ids=str)
def test_training_is_equal(kind, mlm_logits, unpad):
    check(make(kind).train(), batch_of(kind), mlm_logits=mlm_logits, unpad=unpad)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mlm_logits", ["full", "none"])
@pytest.mark.parametrize("mask", ["none", "left", "holes", "4-D"])
@pytest.mark.parametrize("kind", [MLM, PRETRAINING], ids=str)
def test_masks(kind, mask, mlm_logits):
    batch = batch_of(kind, mask) if mask != "4-D" else make_batch(kind, mask)
    check(make(kind).train(), batch, mlm_logits=mlm_logits)


@pytest.mark.parametrize("mlm_logits", ["full", "none"])
def test_in_float16(mlm_logits):
    check(make(MLM, torch.float16).train(), batch_of(MLM), mlm_logits=mlm_logits)


@pytest.mark.parametrize("mlm_logits", ["full", "none"])
@pytest.mark.parametrize("kind", HEADS, ids=str)
def test_under_autocast(kind, mlm_logits):
    autocast = torch.autocast(DEVICE.type, torch.float16)
    check(make(kind).train(), batch_of(kind), within=autocast, mlm_logits=mlm_logits)


@pytest.mark.parametrize("kind", HEADS, ids=str)
def test_labelled_padding_is_computed(kind):
    """A label at padding reads a position that packing would drop."""
    model, batch = make(kind).train(), make_batch(kind)
    check(model, batch, mlm_logits="none")


@pytest.mark.parametrize("kind", [MLM, PRETRAINING], ids=str)
def test_rows_that_enter_each_product(kind):
    """Tokens in the layers; in the last layer and the head the rows that are read, in pre-training also the first ones."""
    model, batch = fastbert.patch(make(kind).train(), mlm_logits="none"), batch_of(kind)
    batch["labels"][:, 0] = -100
    tokens, labelled = int(batch["attention_mask"].sum()), int((batch["labels"] != -100).sum())
    read = labelled + ROWS * (kind is PRETRAINING)
    assert 0 < read < tokens < ROWS * LENGTH
    pooled = [ROWS] if kind is PRETRAINING else []
    with torch.no_grad():
        rows = rows_in_products(lambda: model(**batch))
    # Per layer: q, k, v, attention's output, the two of the feed-forward. Then pooler, transform, loss, next sentence.
    assert rows == [tokens] * 6 + [read, tokens, tokens] + [read] * 3 + pooled + [read] * 2 + pooled


@pytest.mark.parametrize("kind", HEADS, ids=str)
def test_no_tensor_has_the_logits_of_every_position(kind):
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2 or tensor.shape[-2] == WIDTH:
                    continue  # the transposed weight
                if tensor.shape[-1] >= VOCABULARY:
                    Largest.rows = max(Largest.rows, tensor.shape[:-1].numel())
            return out

    model, batch = make(kind, hidden_size=WIDTH, intermediate_size=30).train(), batch_of(kind)
    batch["labels"][:, 2:] = -100
    sizes = {}
    for keywords in ({"mlm_logits": "none"}, {"mlm_logits": "full"}):
        Largest.rows = 0
        patched = fastbert.patch(copy.deepcopy(model), **keywords)
        with Largest():
            patched(**batch).loss.backward()
        sizes[keywords["mlm_logits"]] = Largest.rows
    assert sizes["full"] == ROWS * LENGTH and 0 < sizes["none"] <= ROWS * 2


@pytest.mark.parametrize("mlm_logits", ["full", "none"])
@pytest.mark.parametrize("kind", HEADS, ids=str)
def test_all_labels_ignored(kind, mlm_logits):
    """As in torch, the loss is NaN and the gradients are zeros."""
    model, batch = make(kind).train(), make_batch(kind)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    stock = run(copy.deepcopy(model), batch)
    results = run(fastbert.patch(copy.deepcopy(model), mlm_logits=mlm_logits), batch)
    assert results["loss"].isnan() and stock["loss"].isnan()
    for name in (name for name in stock if name.startswith("gradient")):
        torch.testing.assert_close(results[name], stock[name], equal_nan=True)


@pytest.mark.parametrize("mlm_logits", ["full", "none"])
@pytest.mark.parametrize("kind", HEADS, ids=str)
def test_a_label_that_is_no_token(kind, mlm_logits):
    model, batch = make(kind).train(), make_batch(kind)
    batch["labels"][0, 1] = VOCABULARY
    with pytest.raises(IndexError) as stock:
        model(**batch)
    with pytest.raises(IndexError, match=str(VOCABULARY)) as ours:
        fastbert.patch(model, mlm_logits=mlm_logits)(**batch)
    assert "out of bounds" in str(stock.value) and str(ours.value)


@pytest.mark.parametrize("kind", HEADS, ids=str)
def test_none_gives_logits_in_evaluation_and_without_labels(kind):
    model = fastbert.patch(make(kind), mlm_logits="none")
    outputs = model(**make_batch(kind))
    assert outputs.loss is not None and outputs[1].shape == (ROWS, LENGTH, VOCABULARY)
    outputs = model.train()(**make_batch(kind, labels=False))
    assert outputs.loss is None and outputs[0].shape == (ROWS, LENGTH, VOCABULARY)


def test_a_tuple_and_labels_by_their_place():
    model, batch = make(MLM).train(), batch_of(MLM)
    expected = model(**batch)
    places = [batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
    fastbert.patch(model)
    results = model(*places, None, None, None, None, batch["labels"], return_dict=False)
    assert type(results) is tuple and head_row(model).kernel_calls == 1
    torch.testing.assert_close(results, (expected.loss, expected.logits))
    fastbert.patch(model, mlm_logits="none")
    (loss,) = model(**batch, return_dict=False)
    torch.testing.assert_close(loss, expected.loss)


@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_the_causal_loss_counts_items_as_stock_does(items):
    check(make(CLM).train(), batch_of(CLM) | {"num_items_in_batch": items})


def test_a_masked_loss_ignores_the_items_as_stock_does():
    check(make(MLM).train(), batch_of(MLM) | {"num_items_in_batch": 7})


def test_labels_that_were_shifted_by_the_caller():
    batch = batch_of(CLM)
    check(make(CLM).train(), batch | {"shift_labels": batch["labels"].roll(-1, 1)})


def test_logits_have_their_gradient():
    """The caller computes another loss on the logits that "full" returns."""
    model, batch = make(MLM).train(), batch_of(MLM)
    found = []
    for patched in (False, True):
        copied = copy.deepcopy(model)
        outputs = (fastbert.patch(copied) if patched else copied)(**batch)
        (outputs.loss + outputs.logits.square().mean()).backward()
        found.append({name: p.grad for name, p in copied.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mlm_logits", ["full", "none"])
def test_names_signature_copies_and_back(mlm_logits, tmp_path):
    model = make(MLM)
    stock, signature = type(model), inspect.signature(model.forward)
    fastbert.patch(model, mlm_logits=mlm_logits)
    assert type(model) is not stock and type(model).__name__ == stock.__name__
    assert inspect.signature(model.forward) == signature
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with counting(heads=True) as launched:
            copied(**batch_of(MLM))
        assert launched[LOSS] == 1
    model.save_pretrained(tmp_path)
    assert type(stock.from_pretrained(tmp_path)) is stock and model.config.architectures == [stock.__name__]
    other = "full" if mlm_logits == "none" else "none"
    assert type(fastbert.patch(model, mlm_logits=other)) is not type(copied)
    assert type(fastbert.unpatch(model)) is stock


def stays_stock(model, batch, **keywords):
    patched, launched, (results, eager, exact) = results_of(model, batch, keywords)
    assert LOSS not in launched
    assert_equal(results, eager, exact)
    row = head_row(patched)
    return row.reason or "; ".join(row.fallback_calls)


def test_a_switch_leaves_the_head_stock():
    assert stays_stock(make(MLM).train(), batch_of(MLM), mlm_head=False) == "mlm_head=False"


@pytest.mark.parametrize("name", ["cls", "cls.predictions", "cls.predictions.decoder"])
def test_hooks_between_are_called(name):
    model, batch, shapes = make(MLM).train(), batch_of(MLM), []
    fastbert.patch(model)
    handle = model.get_submodule(name).register_forward_hook(lambda _, i, out: shapes.append(out.shape))
    model(**batch)
    assert shapes == [(ROWS, LENGTH, VOCABULARY)]
    assert any("hooks" in reason for reason in head_row(model).fallback_calls)
    handle.remove()
    with counting(heads=True) as launched:
        model(**batch)
    assert launched[LOSS] == 1


def test_an_adapted_decoder_is_called():
    batch = batch_of(MLM)
    adapted = get_peft_model(make(MLM), LoraConfig(target_modules=["decoder"], init_lora_weights=False)).train()
    assert "decoder is a" in stays_stock(adapted, batch)


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_labels_of_another_form(change):
    """Stock flattens labels of any shape and accepts what cross_entropy accepts."""
    batch = batch_of(MLM)
    batch["labels"] = batch["labels"].flatten() if change == "shape" else batch["labels"].to(torch.int32)
    model = make(MLM).train()
    try:
        model(**batch)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)):
            fastbert.patch(model)(**batch)
        return
    assert "labels" in stays_stock(model, batch)


def test_a_loss_of_the_users_own():
    model = make(CLM).train()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.float().square().mean()
    patched = fastbert.patch(copy.deepcopy(model))
    torch.testing.assert_close(patched(**batch_of(CLM)).loss, model(**batch_of(CLM)).loss)
    assert head_row(patched).kernel_calls == 0


def test_pretraining_without_the_second_label_has_no_loss():
    model, batch = fastbert.patch(make(PRETRAINING).train(), mlm_logits="none"), batch_of(PRETRAINING)
    del batch["next_sentence_label"]
    outputs = model(**batch)
    assert outputs.loss is None and outputs.prediction_logits.shape == (ROWS, LENGTH, VOCABULARY)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mlm_logits", ["full", "none"])
@pytest.mark.parametrize("kind", HEADS, ids=str)
def test_compiled_whole(kind, mlm_logits):
    model, batch = make(kind, num_hidden_layers=1).train(), batch_of(kind)
    torch.compiler.reset()
    fast = torch.compile(fastbert.patch(copy.deepcopy(model), mlm_logits=mlm_logits), fullgraph=True, backend="aot_eager")
    with counting(heads=True) as launched:
        loss = fast(**batch).loss
        loss.backward()
    assert launched[LOSS] == 1
    torch.testing.assert_close(loss, model(**batch).loss)


def test_trainer_evaluates_with_logits(tmp_path):
    rows = [{name: tensor[i].cpu() for name, tensor in batch_of(MLM).items()} for i in range(ROWS)]
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"tokens": float((prediction.label_ids != -100).sum())}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=ROWS, report_to=[], disable_tqdm=True,
        use_cpu=DEVICE.type == "cpu", dataloader_pin_memory=False, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model=fastbert.patch(make(MLM), mlm_logits="none"), args=arguments, train_dataset=rows, eval_dataset=rows,
        compute_metrics=metrics,
    )  # fmt: skip
    with counting(heads=True) as launched:
        trainer.train()
    assert launched[LOSS] == 2
    assert trainer.evaluate()["eval_tokens"] > 0 and shapes == [(ROWS, LENGTH, VOCABULARY)]


def test_checkpointing_on_is_off_with_dropout():
    model = fastbert.patch(make(MLM, hidden_dropout_prob=0.3).train(), mlm_logits="none")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        found.append(run(model, batch_of(MLM)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
