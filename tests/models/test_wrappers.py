"""Models inside other models: PEFT, SentenceTransformer, CrossEncoder, a user's module."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import nn
from transformers import pipeline

import fastbert
from fastbert.cli.tasks import word_tokenizer
from fastbert.testing.models import assert_bitwise, assert_equal, counting, doubled, expected_launches, launches_of, run
from tests.models.test_patch import classes
from tests.models.tiny import BASE, CLASSIFICATION, MLM, make, make_batch

LINES = ("the ferry left the harbour before sunrise", "a good map leaves things out", "it rained")


def with_lora(model, *targets):
    torch.manual_seed(0)
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, lora_alpha=8, target_modules=list(targets), init_lora_weights=False)
    return get_peft_model(model, lora)


@pytest.mark.parametrize("order", ["patch the PeftModel", "patch, then add LoRA"])
@pytest.mark.parametrize("targets", [("query", "value"), ("dense",)], ids=str)
def test_lora(targets, order):
    batch = make_batch(CLASSIFICATION)
    model = with_lora(make(CLASSIFICATION), *targets)
    if order == "patch the PeftModel":
        patched = fastbert.patch(copy.deepcopy(model))
    else:
        patched = with_lora(fastbert.patch(make(CLASSIFICATION)), *targets)
    with counting() as launched:
        results = run(patched, batch)
    # A product with an adapter is called as a module; the next op is still a kernel. The first layer's
    # norms are frozen and pass the gradient on; its attention needs no gradient for its input.
    frozen = targets == ("dense",)
    # Nor do the embeddings.
    without = launches_of("attention", 0, int(frozen)) + launches_of("embedding_layernorm", 0, 1)
    assert launched == expected_launches(model) - without
    assert any("lora_A" in name for name in results)
    assert_equal(results, run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch)))


def test_lora_merged_while_patched_is_plain_again():
    batch = make_batch(CLASSIFICATION)
    model = fastbert.patch(with_lora(make(CLASSIFICATION), "dense"))
    merged = model.merge_and_unload()
    with counting() as launched:
        results = run(merged, batch, backward=False)
    assert launched == expected_launches(merged, backward=False)
    stock = run(fastbert.unpatch(copy.deepcopy(merged)), batch, backward=False)
    torch.testing.assert_close(results, stock)


def test_prompt_tuning():
    # Virtual tokens are embeddings, with a mask longer than the ids.
    config = PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3)
    model, batch = get_peft_model(make(CLASSIFICATION), config).eval(), make_batch(CLASSIFICATION)
    del batch["token_type_ids"]
    with counting() as launched:
        results = run(fastbert.patch(copy.deepcopy(model)), batch)
    assert launched == expected_launches(model)
    assert any("prompt" in name for name in results)
    assert_equal(results, run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny BERT of this kind and a tokenizer, for those libraries to load."""

    def save(kind):
        folder = tmp_path_factory.mktemp(kind.name)
        tokenizer = word_tokenizer(LINES)
        tokenizer.model_max_length = 16
        make(kind, vocab_size=len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


def test_sentence_transformer(saved):
    model = SentenceTransformer(saved(BASE))
    stock = model.encode(list(LINES), convert_to_tensor=True)
    expected = expected_launches(model, backward=False)
    assert fastbert.patch(model) is model
    with counting() as launched:
        embeddings = model.encode(list(LINES), convert_to_tensor=True)
    assert launched == expected
    torch.testing.assert_close(embeddings, stock)
    assert {row.module for row in fastbert.report(model).rows if not row.module.startswith("0.")} == {"1"}  # the pooling
    fastbert.unpatch(model)
    assert torch.equal(model.encode(list(LINES), convert_to_tensor=True), stock)


def test_cross_encoder(saved):
    model = CrossEncoder(saved(CLASSIFICATION))
    pairs = [(LINES[0], LINES[1]), (LINES[2], LINES[2])]
    stock = model.predict(pairs, convert_to_tensor=True)
    expected = expected_launches(model, backward=False)
    with counting() as launched:
        scores = fastbert.patch(model).predict(pairs, convert_to_tensor=True)
    assert launched == expected
    torch.testing.assert_close(scores, stock)


def test_fill_mask_pipeline(saved):
    folder = saved(MLM)
    fill = pipeline("fill-mask", model=folder, tokenizer=folder)
    text = "the ferry left the [MASK] before sunrise"
    stock = fill(text)
    expected = expected_launches(fill.model, backward=False)
    fastbert.patch(fill.model)
    with counting() as launched:
        patched = fill(text)
    assert launched == expected
    assert [answer["token"] for answer in patched] == [answer["token"] for answer in stock]
    # The pipeline looks its task up by the model's class name.
    again = pipeline("fill-mask", model=fill.model, tokenizer=fill.tokenizer)
    assert [answer["token"] for answer in again(text)] == [answer["token"] for answer in stock]


class Pair(nn.Module):
    """Two towers and a layer; one tower is used twice."""

    def __init__(self):
        super().__init__()
        self.question, self.passage = make(BASE, seed=1), make(BASE, seed=2)
        self.again = self.question
        self.score = nn.Linear(40, 1).to(self.question.device)

    def forward(self, **batch):
        question, passage = self.question(**batch).pooler_output, self.passage(**batch).pooler_output
        return self.score(question * passage + self.again(**batch).pooler_output)


def test_a_module_of_ones_own_that_holds_two():
    model, batch = Pair(), make_batch(BASE)
    types = classes(model)
    expected = expected_launches(model.passage) + expected_launches(model.question, forward=2, backward=2)
    patched = fastbert.patch(copy.deepcopy(model))
    with counting() as launched:
        results = run(patched, batch)
    assert launched == expected
    assert_equal(results, run(copy.deepcopy(model), batch), run(copy.deepcopy(model).double(), doubled(batch)))
    assert classes(fastbert.unpatch(patched)) == types


def test_a_part_of_a_model_is_patched_alone():
    model, batch = make(), make_batch()
    stock = run(copy.deepcopy(model), batch)
    fastbert.patch(model.bert)
    with counting() as launched:
        results = run(model, batch)
    assert launched == expected_launches(model, without=["gelu_layernorm"])
    assert_equal(results, stock, run(make().double(), doubled(batch)))
    fastbert.unpatch(model)
    assert_bitwise(run(model, batch), stock)


def replicas_of(model, count):
    """torch.nn.parallel.replicate, which needs GPUs, simulated on one device."""
    modules = list(model.modules())
    places = {module: index for index, module in enumerate(modules)}
    for _ in range(count):
        copies = [module._replicate_for_data_parallel() for module in modules]
        for module, replica in zip(modules, copies, strict=True):
            replica._former_parameters = {}
            for name, child in module._modules.items():
                replica._modules[name] = None if child is None else copies[places[child]]
            for name, parameter in module._parameters.items():
                value = None if parameter is None else parameter * 1.0
                setattr(replica, name, value)
                replica._former_parameters[name] = value
        yield copies[0]


@pytest.mark.parametrize("kind", [CLASSIFICATION, MLM], ids=str)
def test_replicas_of_data_parallel_count_as_the_model(kind):
    model, batch = make(kind, hidden_act="mish").train(), make_batch(kind)
    expected = model(**batch).loss
    fastbert.patch(model)
    losses = [replica(**batch).loss for replica in replicas_of(model, 4)]
    for loss in losses:
        torch.testing.assert_close(loss, expected)
    losses[0].backward()
    assert all(parameter.grad is not None for parameter in model.bert.encoder.parameters())
    rows = [row for row in fastbert.report(model).rows if row.kernel]
    stock = {row.hf_class for row in rows if row.state == "untouched"}
    assert stock == {"BertIntermediate"} | ({"BertPredictionHeadTransform"} if kind is MLM else set())
    assert {row.kernel_calls + sum(row.fallback_calls.values()) for row in rows if row.state == "active"} == {4}
