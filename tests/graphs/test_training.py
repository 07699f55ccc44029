"""Graphed training steps equal ordinary ones, on the CPU with a stand-in that records operations and runs them again."""

import re

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import fastbert
from fastbert.graphs import training_report as reports
from fastbert.graphs.training_budgets import rounded
from fastbert.graphs.training_guard import renew_accumulators
from fastbert.lengths import Counted
from fastbert.testing.graphs import recording_graphs
from fastbert.testing.rows import DEVICE
from tests.models.test_trainer import examples
from tests.models.tiny import CLASSIFICATION, CLM, KINDS, MLM, make

from .stepping import DRIFT, SMALL, adamw, assert_same, batches, fused, models, ordinary, plain, stock, train

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the stand-in for a graph; test_gpu_training.py has graphs")

KIND = {kind.name: kind for kind in KINDS}
PRETRAINING, TOKENS, REGRESSION = KIND["pretraining"], KIND["token-classification"], KIND["regression"]


@pytest.fixture(autouse=True)
def tapes():
    with recording_graphs() as recorders:
        yield recorders


def check(kind, ours, theirs, number=7, replayed=4, **options):
    """Train both by the same batches; the losses and parameters are equal."""
    step = fastbert.graphed_step(ours, adamw(ours), **options)
    optimizer = adamw(theirs)
    for batch in batches(kind, number):
        loss = step(**batch)
        torch.testing.assert_close(loss, ordinary(theirs, optimizer, batch), **DRIFT)
    assert_same(ours, theirs)
    assert step.report().replayed == replayed, str(step)
    return step


@pytest.mark.parametrize(
    ("kind", "patch"),
    [
        (CLASSIFICATION, {}),
        (CLASSIFICATION, {"unpad": False}),
        (REGRESSION, {}),
        (TOKENS, {}),
        (TOKENS, {"unpad": True}),
        (MLM, {}),
        (MLM, {"mlm_logits": "none"}),
        (MLM, {"unpad": True}),
        (MLM, {"unpad": True, "mlm_logits": "none"}),
        (CLM, {"mlm_logits": "none"}),
        (PRETRAINING, {"mlm_logits": "none"}),
    ],
    ids=str,
)
def test_steps_equal_ordinary_ones(kind, patch):
    check(kind, *models(kind, **patch))


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}], ids=["", "amsgrad"])
def test_optimizers_of_torch(cls, options):
    ours, theirs = stock()
    step = fastbert.graphed_step(ours, fused(ours, cls, **options))
    train(step, theirs, fused(theirs, cls, **options), plain())
    assert step.report().replayed == 4
    assert all(param.grad is None for param in ours.parameters())


def test_the_loss_is_the_caller_s_own():
    (model,) = stock(number=1)
    step = fastbert.graphed_step(model, fused(model))
    losses = [step(**batch) for batch in plain()]
    assert len({loss.data_ptr() for loss in losses}) == len(losses) == len(set(map(float, losses)))
    assert not any(loss.requires_grad for loss in losses)


def test_a_capture_makes_accumulators_of_gradients_of_its_own():
    """Those that the graph of an older loss holds belong to another stream."""
    (model,) = stock(number=1)
    held = model(**plain(1)[0]).loss
    param = model.classifier.weight
    before, data, version = torch.autograd.graph.get_gradient_edge(param).node, param.data_ptr(), param._version
    assert torch.autograd.graph.get_gradient_edge(param).node is before
    renew_accumulators(model.parameters())
    assert torch.autograd.graph.get_gradient_edge(param).node is not before
    assert (param.data_ptr(), param._version, param.shape) == (data, version, (3, 16))
    held.backward()
    assert param.grad is not None


def test_a_loss_of_the_user_s():
    ours, theirs = stock()

    def loss(outputs, batch):
        return (outputs.logits.log_softmax(1) * batch["labels"][:, None]).square().mean() + 2 * outputs.loss

    step = fastbert.graphed_step(ours, fused(ours), loss=loss)
    optimizer = fused(theirs)
    for batch in plain():
        value = step(**batch)
        expected = loss(theirs(**batch), batch)
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(value, expected.detach())
    assert_same(ours, theirs)
    assert step.report().replayed == 4


def test_shapes_have_graphs_of_their_own(tapes):
    ours, theirs = stock()
    step = fastbert.graphed_step(ours, fused(ours))
    lengths = (9, 9, 5, 9, 9, 5, 5, 7, 7, 9, 5, 7)
    train(step, theirs, fused(theirs), [plain(1, length, seed)[0] for seed, length in enumerate(lengths)])
    report = step.report()
    # Three steps come before the first graph, and one more before that of length 7.
    assert report.ordinary == {reports.WARMING_UP: 4} and (report.graphs, report.replayed) == (3, 8)
    assert str(step) == (
        "graphed_step of BertForSequenceClassification: 8 of 12 steps replayed, 3 graphs now\n"
        "  4 without a graph: warming up before a capture"
    )
    assert len(tapes) == 1, "all graphs share one memory"


def test_no_more_graphs_than_max_graphs():
    ours, theirs = stock()
    step = fastbert.graphed_step(ours, fused(ours), max_graphs=1)
    lengths = [9] * 4 + [5] * 12 + [9, 9]
    train(step, theirs, fused(theirs), [plain(1, length, seed)[0] for seed, length in enumerate(lengths)])
    report = step.report()
    assert (report.graphs, report.captured) == (1, 2)
    assert report.ordinary == {reports.WARMING_UP: 3 + 1 + 1, reports.RARE: 9 + 1}


def test_schedules_change_the_rate_that_replays_use():
    """Whatever they make of it: a number, also with changing betas. The groups keep numbers, so that checkpoints do too."""
    for schedule in (
        lambda optimizer: LambdaLR(optimizer, lambda number: 1 / (1 + number)),
        lambda optimizer: OneCycleLR(optimizer, 0.1, 20, cycle_momentum=False),
    ):
        ours, theirs = stock()
        optimizers = fused(ours), fused(theirs)
        schedules = [schedule(optimizer) for optimizer in optimizers]
        step = fastbert.graphed_step(ours, optimizers[0])
        for batch in plain():
            loss = step(**batch)
            torch.testing.assert_close(loss, ordinary(theirs, optimizers[1], batch), **DRIFT)
            for one in schedules:
                one.step()
        assert_same(ours, theirs)
        assert step.report().replayed == 4
        assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]
        assert type(optimizers[0].param_groups[0]["lr"]) is float


def test_betas_that_change_reach_a_replay_of_our_optimizer():
    ours, theirs = stock()
    optimizers = adamw(ours), adamw(theirs)
    schedules = [OneCycleLR(optimizer, 0.1, 20) for optimizer in optimizers]
    step = fastbert.graphed_step(ours, optimizers[0])
    for batch in plain(5):
        loss = step(**batch)
        torch.testing.assert_close(loss, ordinary(theirs, optimizers[1], batch), **DRIFT)
        for one in schedules:
            one.step()
    assert_same(ours, theirs)
    assert step.report().replayed == 2


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_accumulation(max_grad_norm):
    """The mean over two batches; a window may hold ordinary and replayed calls."""
    ours, theirs = stock()
    step = fastbert.graphed_step(ours, fused(ours), accumulation=2, max_grad_norm=max_grad_norm)
    optimizer = fused(theirs)
    for number, batch in enumerate(plain(12)):
        value = step(**batch)
        loss = theirs(**batch).loss
        (loss / 2).backward()
        torch.testing.assert_close(value, loss.detach(), **DRIFT)
        if number % 2:
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            assert_same(ours, theirs)
    assert step.report().replayed == 9
    assert step._update_graph is not None


def test_accumulation_over_shapes_beside_zero_grad_of_the_user():
    ours, theirs = stock()
    optimizers = fused(ours), fused(theirs)
    step = fastbert.graphed_step(ours, optimizers[0], accumulation=3)
    for number in range(24):
        (batch,) = plain(1, (9, 5)[number % 2], number)
        step(**batch)
        (theirs(**batch).loss / 3).backward()
        if number % 3 == 2:
            optimizers[1].step()
            optimizers[1].zero_grad()
            optimizers[0].zero_grad()
            assert_same(ours, theirs)
    assert step.report().graphs == 2


def test_clipping():
    ours, theirs = stock()
    step = fastbert.graphed_step(ours, fused(ours), max_grad_norm=0.05)
    train(step, theirs, fused(theirs), plain(), max_grad_norm=0.05)
    assert step.report().replayed == 4


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("make_optimizer", [fused, adamw])
def test_a_scaler(make_optimizer, max_grad_norm):
    """Steps with an infinite gradient are left out and halve the scale; others let it grow."""
    ours, theirs = stock()
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3) for _ in range(2)]
    huge = torch.tensor(0.0)

    def loss(outputs, batch):
        return outputs.loss + (outputs.logits.sum() * huge * huge if outputs.logits.requires_grad else 0)

    step = fastbert.graphed_step(ours, make_optimizer(ours), scaler=scalers[0], max_grad_norm=max_grad_norm, loss=loss)
    optimizer = make_optimizer(theirs)
    theirs.register_forward_hook(lambda module, args, outputs: outputs.__setitem__("loss", loss(outputs, None)))
    scales = []
    for number, batch in enumerate(plain(9)):
        huge.fill_(3e38 if number in (1, 5, 7) else 0)
        step(**batch)
        ordinary(theirs, optimizer, batch, max_grad_norm, scalers[1])
        assert_same(ours, theirs)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert scalers[0].state_dict() == scalers[1].state_dict()
        scales.append(scalers[0].get_scale())
    assert len(set(scales)) > 2 and step.report().replayed == 6


def test_a_scaler_that_is_off():
    ours, theirs = stock()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = fastbert.graphed_step(ours, fused(ours), scaler=scaler)
    train(step, theirs, fused(theirs), plain(5))


@pytest.mark.parametrize("ambient", [False, True], ids=["given", "surrounding"])
def test_autocast(ambient):
    """Weights are cast at each replay, and steps without autocast have graphs of their own."""
    ours, theirs = stock()
    step = fastbert.graphed_step(ours, fused(ours), autocast=None if ambient else torch.bfloat16)
    optimizer = fused(theirs)
    for batch in plain(8):
        with torch.autocast("cpu", torch.bfloat16):
            expected = theirs(**batch).loss
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
            torch.testing.assert_close(step(**batch), expected.detach())
    assert_same(ours, theirs)
    assert step.report().replayed == 5
    if ambient:
        train(step, theirs, optimizer, plain(4))
        assert step.report().graphs == 2


def test_autocast_of_the_kernels():
    ours, theirs = models(MLM, mlm_logits="none")
    step, optimizer = fastbert.graphed_step(ours, adamw(ours), autocast=torch.float16), adamw(theirs)
    for batch in batches(MLM, 5):
        expected = ordinary(theirs, optimizer, batch, autocast=torch.float16)
        torch.testing.assert_close(step(**batch), expected, rtol=2e-3, atol=2e-3)  # two roundings of float16
    assert step.report().replayed == 2


def test_dropout_is_drawn_anew_and_repeats_with_the_seed():
    (model,) = stock(number=1, hidden_dropout_prob=0.5)
    step = fastbert.graphed_step(model, fused(model, lr=0.0, weight_decay=0.0))
    (batch,) = plain(1)
    losses = [step(**batch).item() for _ in range(8)]
    assert len(set(losses)) == 8
    torch.manual_seed(3)
    first = [step(**batch).item() for _ in range(2)]
    torch.manual_seed(3)
    assert [step(**batch).item() for _ in range(2)] == first and step.report().replayed == 9


def test_dropout_of_the_kernels_is_drawn_anew():
    model = fastbert.patch(make(CLASSIFICATION, hidden_dropout_prob=0.5, **SMALL).train())
    step = fastbert.graphed_step(model, adamw(model, weight_decay=0.0))
    for group in step._optimizer.param_groups:
        group["lr"] = 0.0
    (batch,) = batches(CLASSIFICATION, 1)
    assert len({step(**batch).item() for _ in range(6)}) == 6


# Budgets.


def test_the_grid_of_budgets():
    assert [rounded(n) for n in (0, 1, 8, 9, 100, 128, 129, 1000, 1024, 1025, 2100)] == [
        8, 8, 8, 16, 104, 128, 144, 1024, 1024, 1152, 2304,
    ]  # fmt: skip
    for count in range(1, 5000):
        assert count <= rounded(count) <= max(count * 1.125, count + 8)


@pytest.mark.parametrize("counted", [False, True], ids=["counted here", "counted by the collator"])
def test_budgets_that_are_given(counted):
    """The smallest that holds the batch; a batch with more tokens than any runs as usual."""
    ours, theirs = models()
    step = fastbert.graphed_step(ours, adamw(ours), token_budget=(16, 15))
    optimizer = adamw(theirs)
    masks = [(9, 6), (9, 6), (9, 6), (9, 6), (9, 7), (9, 7), (9, 9), (4, 2)]
    for lengths in masks:
        (batch,) = batches(CLASSIFICATION, 1)
        batch["attention_mask"] = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
        extra = {"lengths": Counted(lengths)} if counted else {}
        loss = step(**batch, **extra)
        torch.testing.assert_close(loss, ordinary(theirs, optimizer, batch), **DRIFT)
    assert_same(ours, theirs)
    report = step.report()
    assert report.ordinary == {reports.WARMING_UP: 4, "more tokens than the largest budget": 1}
    assert (report.replayed, report.graphs) == (3, 2)


def test_batches_that_a_packing_head_cannot_pack():
    ours, theirs = models()
    step = fastbert.graphed_step(ours, adamw(ours))
    optimizer = adamw(theirs)
    for mask in ("left", "right"):
        train(step, theirs, optimizer, batches(CLASSIFICATION, 2, mask=mask))
    with fastbert.lengths(ours, [9, 6]):
        train(step, theirs, optimizer, batches(CLASSIFICATION, 1))
    assert step.report().ordinary == {
        "a padded position is read": 2,
        reports.WARMING_UP: 1,
        "inside fastbert.lengths: give the budgets to graphed_step": 1,
    }


def test_a_model_on_a_device_without_graphs(monkeypatch):
    from fastbert.graphs.capture import RECORDERS

    ours, theirs = stock()
    step = fastbert.graphed_step(ours, fused(ours))
    with monkeypatch.context() as patched:
        patched.delitem(RECORDERS, "cpu")
        train(step, theirs, fused(theirs), plain(5))
    assert step.report().ordinary == {"a model on cpu, which has no graphs": 5}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": 3}, TypeError, "loss: expected a function of outputs and batch, got 3"),
        ({"accumulation": 0}, ValueError, "accumulation: expected an integer from 1 on, got 0"),
        ({"accumulation": True}, ValueError, "accumulation: expected an integer from 1 on, got True"),
        ({"max_graphs": 1.5}, ValueError, "max_graphs: expected an integer from 1 on, got 1.5"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm: expected a number above 0 or None, got -1.0"),
        (
            {"autocast": torch.float32},
            ValueError,
            "autocast: expected torch.float16, torch.bfloat16 or None, got torch.float32",
        ),
        ({"token_budget": "64"}, ValueError, "token_budget: expected an integer or a sequence of integers, got '64'"),
        ({"read_budget": [3, 0]}, ValueError, "read_budget: expected integers from 1 on, got [3, 0]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments(options, error, message):
    (model,) = stock(number=1)
    with pytest.raises(error, match=re.escape(message)):
        fastbert.graphed_step(model, fused(model), **options)


def test_wrong_models_optimizers_and_losses():
    (model,) = stock(number=1)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        fastbert.graphed_step(3, fused(model))
    with pytest.raises(TypeError, match="optimizer: expected a fastbert.AdamW, torch.optim.AdamW or torch.optim.Adam, got SGD"):
        fastbert.graphed_step(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="scaler: expected a fastbert.AdamW or fused=True with it, got AdamW"):
        fastbert.graphed_step(model, fused(model, fused=False), scaler=torch.amp.GradScaler("cpu"))
    (batch,) = plain(1)
    del batch["labels"]
    with pytest.raises(ValueError, match="loss: expected a function, because the SequenceClassifierOutput has no loss"):
        fastbert.graphed_step(model, fused(model))(**batch)
    with pytest.raises(ValueError, match=re.escape("loss: expected a scalar tensor, got (2, 3)")):
        fastbert.graphed_step(model, fused(model), loss=lambda outputs, _: outputs.logits)(**batch)


def test_trainer_beside_it(tmp_path):
    """Trainer trains the same model in between, with an optimizer of its own and the graphed step's."""
    from transformers import Trainer, TrainingArguments

    (model,) = stock(number=1)
    optimizer = fused(model)
    step = fastbert.graphed_step(model, optimizer)
    for number in range(2):
        for batch in plain(5):
            step(**batch)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no"
        )
        optimizers = (optimizer, None) if number else (None, None)
        trainer = Trainer(model=model, args=arguments, train_dataset=examples(CLASSIFICATION), optimizers=optimizers)
        assert trainer.train().global_step == 2
    optimizer.param_groups[0]["lr"] = 1e-2  # Trainer's schedule has ended at 0
    before = [param.detach().clone() for param in model.parameters()]
    for batch in plain(5):
        loss = step(**batch)
    expected = model(**plain(5)[-1]).loss
    assert any((param != old).any() for param, old in zip(model.parameters(), before, strict=True))
    assert loss.isfinite() and (loss - expected).abs() < 0.5 and step.report().replayed >= 4, str(step)
