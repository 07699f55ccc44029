"""fastbert.Windows with models: equal to the loop that users write, stock and patched, in forwards of real tokens only."""

import copy
from collections.abc import Mapping
from contextlib import nullcontext

import pytest
import torch
from transformers import RobertaConfig, RobertaModel, XLMRobertaConfig, XLMRobertaForSequenceClassification

import fastbert
from fastbert.cli.tasks import word_tokenizer
from fastbert.layers.packing_plan import plan_packing
from fastbert.testing.graphs import recording_graphs
from fastbert.testing.models import assert_equal, counting, gradients, rows_in_products
from fastbert.testing.rows import DEVICE
from fastbert.windows import POOLINGS
from tests.gpu import no_synchronisation
from tests.models.tiny import ANOTHER_ORDER, BASE, CLASSIFICATION, make

pytestmark = pytest.mark.one_in(2)

WORDS = [f"w{number:02d}" for number in range(50)]
SIZE, STRIDE = 14, 3
COUNTS = (5, 28, 0, 12, 17)  # tokens of the texts
TEXTS = [" ".join(WORDS[(7 * start + i) % 50] for i in range(count)) for start, count in enumerate(COUNTS)]
LENGTHS = [7, 14, 14, 12, 2, 14, 14, 10]  # tokens of their windows, with [CLS] and [SEP]
FORWARDS = ([14, 14], [14, 14], [12, 10, 7], [2])  # by a budget of 30 tokens


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer([" ".join(WORDS)])


def windows_of(tokenizer, **options):
    return fastbert.Windows(tokenizer, SIZE, **{"stride": STRIDE} | options)


def kind_of(kind, **overrides):
    return make(kind, vocab_size=55, **overrides).train()


def by_hand(model, tokenizer, pooling, of_output):
    """The loop that users write, a window at a time."""
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        outputs, tokens = [], []
        for start in range(0, max(len(ids) - STRIDE, 1), SIZE - 2 - STRIDE):
            window = [tokenizer.cls_token_id, *ids[start : start + SIZE - 2], tokenizer.sep_token_id]
            outputs.append(of_output(model(input_ids=torch.tensor([window], device=DEVICE)))[0])
            tokens.append(len(window))
        stacked, weights = torch.stack(outputs), torch.tensor(tokens, device=DEVICE)[:, None]
        if pooling == "token-mean":
            pooled = (stacked * weights).sum(0) / weights.sum()
        else:
            pooled = {"mean": stacked.mean(0), "max": stacked.max(0).values, "first": stacked[0]}[pooling]
        rows.append(pooled)
    return torch.stack(rows)


def results_of(model, rows):
    """The rows and the gradient of every parameter that a loss of them gives."""
    model.zero_grad()
    torch.nn.functional.cross_entropy(rows.float(), torch.arange(len(rows), device=DEVICE) % rows.shape[1]).backward()
    return {"rows": rows.detach().clone()} | gradients(model.named_parameters())


@pytest.mark.parametrize("token_budget", [None, 30])
@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_and_gradients_are_those_of_a_loop(pooling, patched, token_budget, tokenizer):
    model, windows = kind_of(CLASSIFICATION), windows_of(tokenizer, pooling=pooling)
    eager = results_of(model, by_hand(model, tokenizer, pooling, lambda outputs: outputs.logits))
    double = copy.deepcopy(model).double()
    exact = results_of(double, by_hand(double, tokenizer, pooling, lambda outputs: outputs.logits))
    if patched:
        fastbert.patch(model)
    batch = windows(TEXTS).to(DEVICE)
    assert batch["windows"] == ([1] * 5 if pooling == "first" else [1, 3, 1, 1, 2])
    assert pooling == "first" or batch["lengths"] == LENGTHS
    with counting(heads=True) as launched:
        found = results_of(model, windows.run(model, batch, token_budget=token_budget))
    assert bool(launched) == patched
    assert_equal(found, eager, exact)


def mean_of_tokens(outputs, inputs):
    mask = inputs["attention_mask"][..., None].to(outputs.last_hidden_state.dtype)
    return (outputs.last_hidden_state * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("output", ["pooler_output", mean_of_tokens], ids=["pooler", "mean of tokens"])
@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
def test_embeddings_and_gradients_are_those_of_a_loop(patched, output, tokenizer):
    def of_output(outputs):
        return outputs.pooler_output if output == "pooler_output" else outputs.last_hidden_state.mean(1)

    model, windows = kind_of(BASE), windows_of(tokenizer)
    eager = results_of(model, by_hand(model, tokenizer, "mean", of_output))
    double = copy.deepcopy(model).double()
    exact = results_of(double, by_hand(double, tokenizer, "mean", of_output))
    if patched:
        fastbert.patch(model, unpad=True)
    batch = windows(TEXTS).to(DEVICE)
    with counting(heads=True) as launched:
        found = results_of(model, windows.run(model, batch, output=output, token_budget=30))
    # The last forward has no padding; the others are packed, and unpacked forward and backward.
    assert launched["gather_rows_kernel"] == patched * 2 * 1
    assert_equal(found, eager, exact)


def test_rows_in_products_are_the_tokens_of_each_forward(tokenizer):
    model, windows = fastbert.patch(kind_of(CLASSIFICATION)), windows_of(tokenizer)
    batch = windows(TEXTS).to(DEVICE)

    def of_forward(lengths):
        # As in test_unpad: the first layer at all tokens, the last one at the first of each window, pooler, classifier.
        tokens, rows = sum(lengths), len(lengths)
        return [tokens] * 4 + [rows, tokens] + [rows] * 5

    whole = rows_in_products(lambda: windows.run(model, batch))
    assert whole == of_forward(LENGTHS)
    in_parts = rows_in_products(lambda: windows.run(model, batch, token_budget=30))
    assert in_parts == [row for lengths in FORWARDS for row in of_forward(lengths)]


def test_rows_in_products_of_another_family(tokenizer):
    """XLM-RoBERTa, whose position ids come from the padding, and whose head is two Linears at the first position."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = "[UNK]"  # its id is 1
    settings = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 56}
    config = XLMRobertaConfig(vocab_size=55, max_position_embeddings=16, pad_token_id=1, num_labels=3, **settings)
    model, windows = XLMRobertaForSequenceClassification(config).to(DEVICE).eval(), windows_of(tokenizer)
    batch = windows(TEXTS).to(DEVICE)
    expected = windows.run(model, batch)
    fastbert.patch(model)
    tokens, rows = sum(LENGTHS), len(LENGTHS)
    found = rows_in_products(lambda: windows.run(model, batch))
    assert found == [tokens] * 4 + [rows, tokens] + [rows] * 5
    for budget in (None, 30):
        torch.testing.assert_close(windows.run(model, batch, token_budget=budget), expected, **ANOTHER_ORDER)


def test_forwards_hold_the_budget_and_little_padding(tokenizer):
    """Shapes and masks that a stock model is called with."""
    model, windows = kind_of(CLASSIFICATION), windows_of(tokenizer)
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    batch = windows(TEXTS).to(DEVICE)
    windows.run(model, batch, token_budget=30)
    assert [tuple(call["input_ids"].shape) for call in seen] == [(len(own), max(own)) for own in FORWARDS]
    assert [call["attention_mask"].sum(1).tolist() for call in seen] == [*FORWARDS]
    seen.clear()
    for budget, forwards in ((sum(LENGTHS), 1), (sum(LENGTHS) - 1, 2), (14, 7)):
        windows.run(model, batch, token_budget=budget)
        assert len(seen) == forwards, budget
        seen.clear()


@pytest.mark.parametrize("unpad", ["auto", True])
@pytest.mark.parametrize("token_budget", [None, 30])
def test_the_encoder_is_told_the_lengths(token_budget, unpad, tokenizer, monkeypatch):
    told = []
    monkeypatch.setattr("fastbert.layers.encoder.plan_packing", lambda *a: told.append(a[2].lengths) or plan_packing(*a))
    model, windows = fastbert.patch(kind_of(CLASSIFICATION), unpad=unpad), windows_of(tokenizer)
    batch = windows(TEXTS).to(DEVICE)
    windows.run(model, batch, token_budget=token_budget)
    assert told == ([tuple(LENGTHS)] if token_budget is None else [tuple(own) for own in FORWARDS])
    assert not any("caller_counts" in vars(module) for module in model.modules())
    told.clear()
    model(**{name: tensor for name, tensor in batch.items() if name != "windows"})
    assert told == [tuple(LENGTHS)], "a loop of one's own tells them as a LengthsCollator does"


@pytest.mark.gpu
@pytest.mark.parametrize("pooling", POOLINGS)
def test_nothing_waits_for_the_gpu(pooling, tokenizer):
    model, windows = fastbert.patch(kind_of(CLASSIFICATION)), windows_of(tokenizer, pooling=pooling)
    batch = windows(TEXTS).to(DEVICE)
    windows.run(model, batch, token_budget=30).sum().backward()  # compiles and allocates everything
    with no_synchronisation():
        windows.run(model, batch, token_budget=30).sum().backward()


def test_lengths_of_the_caller_stay(tokenizer, monkeypatch):
    told = []
    monkeypatch.setattr("fastbert.layers.encoder.plan_packing", lambda *a: told.append(a[2]) or plan_packing(*a))
    model, windows = fastbert.patch(kind_of(CLASSIFICATION)), windows_of(tokenizer)
    with fastbert.lengths(model, token_budget=128):
        windows.run(model, windows(TEXTS).to(DEVICE))
    assert [(counts.lengths, counts.token_budget) for counts in told] == [(None, 128)]


def test_padding_on_the_left(tokenizer, monkeypatch):
    """A head that reads the first position keeps the padding, and counts of the host would deny it."""
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    model, windows = kind_of(CLASSIFICATION), windows_of(tokenizer)
    batch = windows(TEXTS).to(DEVICE)
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args, given: seen.append(given["attention_mask"]), with_kwargs=True)
    expected = [windows.run(model, batch, token_budget=budget) for budget in (None, 30)]
    hook.remove()
    assert [mask.sum(1).tolist() for mask in seen] == [LENGTHS, *FORWARDS] and all(mask[:, -1].all() for mask in seen)
    assert [mask.shape[1] for mask in seen[1:]] == [max(own) for own in FORWARDS]
    fastbert.patch(model)
    for rows, budget in zip(expected, (None, 30), strict=True):
        torch.testing.assert_close(windows.run(model, batch, token_budget=budget), rows, **ANOTHER_ORDER)
    (encoder,) = [row for row in fastbert.report(model).rows if row.hf_class == "BertEncoder"]
    assert encoder.fallback_calls["a padded position is read"] == 2


def test_a_tokenizer_that_names_no_mask(tokenizer, monkeypatch):
    model, windows = kind_of(CLASSIFICATION), windows_of(tokenizer)
    expected = windows.run(model, windows(TEXTS).to(DEVICE))
    monkeypatch.setattr(tokenizer, "model_input_names", ["input_ids"])
    torch.testing.assert_close(windows.run(model, windows(TEXTS).to(DEVICE)), expected)


def test_a_compiled_model_is_not_compiled_for_each_batch(tokenizer):
    model, windows = kind_of(CLASSIFICATION, num_hidden_layers=1), windows_of(tokenizer, max_windows=1)
    batches = [windows([TEXTS[1], TEXTS[0], text]).to(DEVICE) for text in (TEXTS[2], "w01", "w01 w02")]
    expected = [windows.run(model, batch) for batch in batches]
    torch.compiler.reset()
    compiled = torch.compile(fastbert.patch(model), backend="aot_eager", dynamic=False)
    torch._dynamo.utils.counters.clear()
    for batch, rows in zip(batches, expected, strict=True):
        torch.testing.assert_close(windows.run(compiled, batch), rows, **ANOTHER_ORDER)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(DEVICE.type != "cpu", reason="graphs recorded on the CPU")
def test_from_graphs(tokenizer):
    model, windows = kind_of(CLASSIFICATION).eval(), windows_of(tokenizer)
    batch = windows(TEXTS)
    with recording_graphs(), torch.inference_mode():
        expected = windows.run(model, batch, token_budget=30)
        rows = windows.run(fastbert.patch(model, cuda_graphs=True), batch, token_budget=30)
        (graphs,) = [row for row in fastbert.report(model).rows if "graph" in (row.kernel or "")]
        assert graphs.kernel_calls == len(FORWARDS) and not graphs.fallback_calls
    torch.testing.assert_close(rows, expected, **ANOTHER_ORDER)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_budget": 13}, "token_budget: expected the longest window's 14 tokens or more, got 13"),
        ({"token_budget": 0}, "token_budget: expected an integer from 1 on, got 0"),
        ({"output": "hidden"}, "output: expected 'hidden' among the model's outputs, or a function of them, got logits"),
        ({"output": lambda outputs, inputs: outputs.logits[:3]}, "output: expected a row for each of 8 windows, got .3, 3."),
        ({"output": lambda outputs, inputs: None}, "output: expected a row for each of 8 windows, got NoneType"),
    ],
)
def test_bad_arguments(options, message, tokenizer):
    windows = windows_of(tokenizer)
    with pytest.raises(ValueError, match=message):
        windows.run(kind_of(CLASSIFICATION), windows(TEXTS).to(DEVICE), **options)


def test_what_does_not_fit_together(tokenizer):
    windows, model = windows_of(tokenizer), kind_of(BASE)
    with pytest.raises(ValueError, match="output: expected logits or sentence_embedding or scores among the model's outputs"):
        windows.run(model, windows(TEXTS).to(DEVICE))
    with pytest.raises(ValueError, match=r"batch: expected one that Windows made, got \['attention_mask', 'input_ids'"):
        windows.run(model, tokenizer(TEXTS, padding=True, return_tensors="pt"))
    long = fastbert.Windows(tokenizer, 30, stride=3)
    with pytest.raises(ValueError, match="size: the model has 24 positions, and the batch has windows of 30 tokens"):
        long.run(model, long(TEXTS).to(DEVICE))
    assert isinstance(windows(TEXTS), Mapping)


def test_positions_that_count_from_behind_the_padding(tokenizer):
    """RoBERTa's table of 16 positions is for 14 tokens."""
    settings = {"vocab_size": 55, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    for positions, fits in ((16, True), (15, False)):
        model = RobertaModel(RobertaConfig(**settings, max_position_embeddings=positions, pad_token_id=1)).to(DEVICE)
        batch = windows_of(tokenizer)(TEXTS).to(DEVICE)
        with nullcontext() if fits else pytest.raises(ValueError, match="size: the model has 13 positions"):
            assert windows_of(tokenizer).run(model, batch, output="pooler_output").shape == (len(TEXTS), 8)
