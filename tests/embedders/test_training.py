"""Losses and trainers of sentence-transformers on packed rows: stock's losses and gradients."""

import copy
import functools

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Dense, Pooling
from torch import nn

import fastbert
from fastbert.testing.models import assert_equal, gradients
from fastbert.testing.rows import DEVICE
from tests.embedders.tiny import TEXTS, WIDTH, assert_packs, close, features_of, make, row_of

pytestmark = pytest.mark.one_in(2)

OTHERS = ["w6 w5 w4", "w7 w8 w9 w3 w2", "w1"]


def step(model, make_loss, labels=None):
    """The loss of two columns of texts, and every gradient."""
    torch.manual_seed(0)
    loss = make_loss(model)
    value = loss([features_of(model, texts) for texts in (TEXTS, OTHERS)], labels)
    value.backward()
    results = {"loss": value.detach()} | gradients(model.named_parameters())
    model.zero_grad()
    return results


def check(model, make_loss, labels=None):
    """Compare patched with stock; returns the patched copy."""
    patched = fastbert.patch(copy.deepcopy(model))
    results = step(patched, make_loss, labels)
    exact = step(copy.deepcopy(model).double(), make_loss, None if labels is None else labels.double())
    assert_equal(results, step(copy.deepcopy(model), make_loss, labels), exact)
    return patched


SIMILARITIES = torch.tensor([0.9, 0.2, 0.4])
LOSSES = {
    "cosine": (losses.CosineSimilarityLoss, SIMILARITIES),
    "ranking": (losses.MultipleNegativesRankingLoss, None),
    "cosent": (losses.CoSENTLoss, SIMILARITIES),
}


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(folder, loss, mode):
    make_loss, labels = LOSSES[loss]
    patched = check(make(folder, mode).train(), make_loss, labels)
    calls = row_of(patched).kernel_calls
    assert calls in (1, 2)  # the columns may be embedded together
    assert_packs(patched, calls)


@pytest.mark.parametrize("mode", ["mean", ("cls", "max")], ids=str)
def test_cached_gradients(folder, mode):
    """Embeds without gradients in small batches, and again with gradients."""
    make_loss = functools.partial(losses.CachedMultipleNegativesRankingLoss, mini_batch_size=2)
    model = make(folder, mode).train()
    patched = check(model, make_loss)
    row = row_of(patched)
    assert row.kernel_calls >= 4 and not row.fallback_calls
    uncached = step(fastbert.patch(copy.deepcopy(model)), losses.MultipleNegativesRankingLoss)
    for name, value in step(patched, make_loss).items():
        # The loss's gradient comes from embeddings of other batches.
        torch.testing.assert_close(value, uncached[name], rtol=1e-4, atol=1e-5)


def test_cached_gradients_repeat_dropout(folder):
    """Both passes draw the same dropout: the embeddings of the first are those of the second."""
    model = fastbert.patch(make(folder, dropout=0.3).train())
    make_loss = functools.partial(losses.CachedMultipleNegativesRankingLoss, mini_batch_size=8)
    cached = step(model, make_loss)
    plain = step(model, losses.MultipleNegativesRankingLoss)
    assert cached.keys() == plain.keys() and not torch.equal(cached["loss"], step(model.eval(), make_loss)["loss"])
    seen = []
    model.train()[1].register_forward_hook(lambda _, inputs, output: seen.append(output["sentence_embedding"].detach()))
    step(model, make_loss)
    half = len(seen) // 2
    assert len(seen) == 2 * half
    for first, second in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(first, second)


def test_matryoshka(folder):
    def make_loss(model):
        return losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [WIDTH, 16, 8])

    patched = check(make(folder).train(), make_loss)
    assert row_of(patched).fallback_calls == {}


def test_adaptive_layers_stay_padded(folder):
    """The loss requests every layer's output, and pools each."""

    def make_loss(model):
        return losses.AdaptiveLayerLoss(model, losses.MultipleNegativesRankingLoss(model), n_layers_per_step=-1)

    patched = check(make(folder).train(), make_loss)
    assert row_of(patched).kernel_calls == 0
    assert row_of(patched, "BertEncoder").kernel_calls == 0


class Weighted(nn.Module):
    """A loss of the user's own that reads token embeddings."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, columns, labels):
        a, b = (self.model(features) for features in columns)
        late = (a["token_embeddings"][:, :1] @ b["token_embeddings"].transpose(1, 2)).amax(-1).mean()
        return late + (a["sentence_embedding"] * b["sentence_embedding"]).mean()


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_a_loss_that_reads_token_embeddings(folder, mode):
    check(make(folder, mode).train(), Weighted)


def columns(n=8):
    return Dataset.from_dict(
        {
            "anchor": [f"w{i} w{i + 1} w{i + 2}" if i % 2 else f"w{i}" for i in range(n)],
            "positive": [f"w{i} w{i + 3}" for i in range(n)],
        }
    )


def train(model, folder, **settings):
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **settings,
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=columns(), loss=loss)
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_trainer(folder, tmp_path, settings):
    stock, model = make(folder), fastbert.patch(make(folder))
    expected, result = (train(m, tmp_path, **settings) for m in (stock, model))
    # Adam divides by the size of a gradient, which makes steps of the roundings of the small ones.
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4, msg=name)
    row = row_of(model)
    assert row.kernel_calls and not row.fallback_calls


@pytest.fixture
def one_process():
    """A process group of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a process group of the CPU")
@pytest.mark.parametrize("reads", [False, True], ids=["sentences", "tokens"])
@pytest.mark.parametrize("settings", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_distributed_data_parallel(folder, one_process, settings, reads):
    """It passes all outputs through a function of its own, whether the loss reads them or not."""

    def run(model):
        wrapped = nn.parallel.DistributedDataParallel(model.train(), **settings)
        for _ in range(2):
            model.zero_grad()
            output = wrapped(features_of(model))
            loss = output["sentence_embedding"].square().mean()
            if reads:
                loss = loss + output["token_embeddings"].pow(3).mean()
            loss.backward()
        return {"loss": loss.detach()} | gradients(model.named_parameters())

    def build():
        model = make(folder)
        model[0].model.pooler.requires_grad_(bool(settings))  # plain DDP refuses parameters without a gradient
        return model

    model = fastbert.patch(build())
    assert_equal(run(model), run(build()), run(build().double()))
    if not reads:
        assert_packs(model, calls=2)


def test_modules_behind_the_pooling(folder):
    """A Dense layer, as SetFit's differentiable heads are: gradients reach the encoder through it."""

    def build():
        torch.manual_seed(1)
        return make(folder, "mean", Dense(WIDTH, 4)).train()

    row = row_of(check(build(), losses.CoSENTLoss, SIMILARITIES))
    assert row.kernel_calls and not row.fallback_calls


class Head(nn.Module):
    """What SetFit trains: a classifier on the sentence embeddings of `model_body`."""

    def __init__(self, body):
        super().__init__()
        self.body, self.linear = body, nn.Linear(WIDTH, 3)

    def forward(self, features):
        return {"sentence_embedding": self.linear(self.body(features)["sentence_embedding"])}


def test_a_differentiable_head(folder):
    def run(model):
        torch.manual_seed(1)
        head = Head(model).to(next(model.parameters()).dtype)
        loss = nn.functional.cross_entropy(head(features_of(model))["sentence_embedding"], torch.tensor([0, 2, 1]))
        loss.backward()
        return {"loss": loss.detach()} | gradients(head.named_parameters())

    model = make(folder).train()
    patched = fastbert.patch(copy.deepcopy(model))
    assert_equal(run(patched), run(copy.deepcopy(model)), run(copy.deepcopy(model).double()))
    assert_packs(patched)


@pytest.fixture
def adapted(folder):
    """A SentenceTransformer whose model PEFT has wrapped, or given adapters in place."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.0, init_lora_weights=False)

    def build(way, mode):
        torch.manual_seed(2)
        model = make(folder, mode)
        if way == "wrapped":
            model[0].model = peft.get_peft_model(model[0].model, config)
        else:
            try:
                model[0].model.add_adapter(config)
            except ValueError as error:  # transformers does not take every release of PEFT
                pytest.skip(str(error))
        return model.train()

    return build


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_adapters(adapted, way, mode):
    patched = check(adapted(way, mode), losses.CoSENTLoss, SIMILARITIES)
    assert row_of(patched).kernel_calls and not row_of(patched).fallback_calls
    (encoder,) = [row for row in fastbert.report(patched).rows if row.hf_class == "BertEncoder"]
    assert encoder.kernel_calls and not encoder.fallback_calls


def test_prompt_tuning_stays_padded(folder):
    """It lengthens the batch before the model, so masks and positions are not those of the features."""
    peft = pytest.importorskip("peft")

    def build():
        torch.manual_seed(2)
        model = make(folder)
        config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="FEATURE_EXTRACTION")
        model[0].model = peft.get_peft_model(model[0].model, config)
        return model.eval()

    stock, model = build(), fastbert.patch(build())
    with torch.no_grad():
        expected, result = (m(features_of(m))["sentence_embedding"] for m in (stock, model))
    close(result, expected)
    assert row_of(model).kernel_calls == 0


def test_a_model_of_stock_pooling_alone():
    with pytest.raises(fastbert.UnsupportedModelError):
        fastbert.patch(SentenceTransformer(modules=[Pooling(4)], device="cpu"))
