"""What a graphed training step relies on, and what it never captures."""

import copy
import logging
import random
import re

import pytest
import torch

import fastbert
from fastbert.graphs import training_report as reports
from fastbert.testing.graphs import recording_graphs
from fastbert.testing.rows import DEVICE

from .stepping import DRIFT, assert_same, fused, ordinary, plain, stock, train

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the stand-in for a graph; test_gpu_training.py has graphs")


@pytest.fixture(autouse=True)
def tapes():
    with recording_graphs() as recorders:
        yield recorders


def freeze(model, optimizer):
    model.bert.embeddings.requires_grad_(False)


def decay(model, optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0.5


def add_group(model, optimizer):
    group = optimizer.param_groups[0]
    left, group["params"] = group["params"][:2], group["params"][2:]
    optimizer.add_param_group({"params": left, "lr": 0.1})


def load_state(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def move(model, optimizer):
    model.classifier.weight.data = model.classifier.weight.detach().clone()


def replace_module(model, optimizer):
    classifier = copy.deepcopy(model.classifier)
    classifier.weight, classifier.bias = model.classifier.weight, model.classifier.bias
    model.classifier = torch.nn.Sequential(classifier, torch.nn.Tanh())


def evaluation_mode(model, optimizer):
    model.bert.encoder.eval()


def change_dropout(model, optimizer):
    model.dropout.p = 1.0


def change_activation(model, optimizer):
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.Tanh()


def change_eps(model, optimizer):
    model.bert.embeddings.LayerNorm.eps = 0.3


def change_config(model, optimizer):
    model.config.problem_type = "multi_label_classification"


CHANGES = (freeze, decay, add_group, load_state, move, replace_module, evaluation_mode)
CHANGES += (change_dropout, change_activation, change_eps)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_change_is_noticed(change, accumulation):
    """The next call runs as usual, and later ones replay a new graph."""
    ours, theirs = stock()
    step = fastbert.graphed_step(ours, fused(ours), accumulation=accumulation)
    optimizer = fused(theirs)
    for number, batch in enumerate(plain(12)):
        if number == 6:
            change(ours, step._optimizer)
            change(theirs, optimizer)
        step(**batch)
        (theirs(**batch).loss / accumulation).backward()
        if (number + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
            assert_same(ours, theirs)
    report = step.report()
    assert report.ordinary[reports.CHANGED] == 1 and report.captured == 2, str(report)
    assert report.replayed == 8


def hook(model):
    model.bert.register_forward_hook(lambda *_: None)


def gradient_hook(model):
    model.classifier.weight.register_hook(lambda grad: 2 * grad)


def checkpointing(model):
    model.gradient_checkpointing_enable()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook, "hooks on a BertModel, which a replay does not call"),
        (gradient_hook, "hooks on parameters, which a replay does not call"),
        (checkpointing, "gradient checkpointing, which reads the state of the random generator"),
    ],
)
def test_what_is_never_captured(change, reason, caplog):
    ours, theirs = stock()
    step = fastbert.graphed_step(ours, fused(ours))
    optimizer = fused(theirs)
    train(step, theirs, optimizer, plain(5))
    for model in (ours, theirs):
        change(model)
    with caplog.at_level(logging.WARNING, "fastbert"):
        train(step, theirs, optimizer, plain(5))
    assert step.report().ordinary[reason] == 5 and step.report().replayed == 2
    assert [record.getMessage() for record in caplog.records if record.name == "fastbert"] == [
        f"graphed_step of BertForSequenceClassification: a step runs without a graph: {reason}"
    ]


def test_wrappers_run_as_usual():
    ours, theirs = stock()
    step = fastbert.graphed_step(torch.nn.DataParallel(ours), fused(ours))
    optimizer = fused(theirs)
    for batch in plain(5):
        torch.testing.assert_close(step(**batch), ordinary(theirs, optimizer, batch))
    assert step.report().ordinary == {"a DataParallel": 5}


def test_inputs_with_gradients_run_as_usual():
    (model,) = stock(number=1)
    step = fastbert.graphed_step(model, fused(model))
    (batch,) = plain(1)
    embeds = torch.randn(2, 9, 16, requires_grad=True)
    for _ in range(4):
        step(inputs_embeds=embeds, labels=batch["labels"])
    assert step.report().ordinary == {"inputs_embeds, which is not a plain tensor without a gradient": 4}
    assert embeds.grad is not None


def toggle_dropout(model, optimizer):
    model.dropout.p = 1.0 - model.dropout.p


def toggle_frozen(model, optimizer):
    for param in model.bert.encoder.parameters():
        param.requires_grad_(not param.requires_grad)


def toggle_mode(model, optimizer):
    model.train(not model.training)


def other_decay(model, optimizer):
    optimizer.param_groups[0]["weight_decay"] += 0.1


def other_rate(model, optimizer):
    optimizer.param_groups[0]["lr"] *= 0.9


def ask_for_zeros(model, optimizer):
    optimizer.zero_grad()


RANDOM = (toggle_dropout, toggle_frozen, toggle_mode, other_decay, other_rate, load_state, move)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_random_changes_between_steps_of_random_shapes(seed, accumulation):
    """Nothing is stale, whatever the order."""
    choices = random.Random(10 * accumulation + seed)
    ours, theirs = stock()
    step, optimizer = fastbert.graphed_step(ours, fused(ours), accumulation=accumulation, max_graphs=2), fused(theirs)
    for number in range(50):
        if choices.random() < 0.15:
            change = choices.choice(RANDOM if number % accumulation else (*RANDOM, ask_for_zeros))
            change(ours, step._optimizer)
            change(theirs, optimizer)
        (batch,) = plain(1, choices.choice((9, 9, 9, 5, 7)), number)
        value, loss = step(**batch), theirs(**batch).loss
        (loss / accumulation).backward()
        torch.testing.assert_close(value, loss.detach(), **DRIFT)
        if number % accumulation == accumulation - 1:
            optimizer.step()
            optimizer.zero_grad()
            assert_same(ours, theirs)
    assert step.report().replayed > 5, str(step)


def test_hooks_on_the_optimizer_are_called():
    ours, theirs = stock()
    optimizer, calls = fused(ours), []
    step = fastbert.graphed_step(ours, optimizer)
    train(step, theirs, other := fused(theirs), plain(5))
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(step, theirs, other, plain(5))
    assert len(calls) == 5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_capture_that_fails_leaves_the_training_as_it_is(accumulation):
    """The user's loss waits for the device."""
    ours, theirs = stock()
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)]

    def loss(outputs, batch):
        return outputs.loss * (1.0 if outputs.loss.item() > 0 else 2.0)

    step = fastbert.graphed_step(ours, fused(ours), loss=loss, scaler=scalers[0], accumulation=accumulation)
    optimizer = fused(theirs)
    for number, batch in enumerate(plain(8)):
        step(**batch)
        scalers[1].scale(theirs(**batch).loss / accumulation).backward()
        if (number + 1) % accumulation == 0:
            scalers[1].step(optimizer)
            scalers[1].update()
            optimizer.zero_grad()
            assert_same(ours, theirs)
    (reason,) = set(step.report().ordinary) - {reports.WARMING_UP}
    assert re.match("its capture failed: RuntimeError: .*_local_scalar_dense.* waits", reason)
    assert step.report().ordinary[reason] == 5


def test_arguments_that_are_no_tensors():
    """Constants are part of the shape; other objects run as usual."""
    (model,) = stock(number=1)
    step = fastbert.graphed_step(model, fused(model))
    for batch in plain(5):
        step(**batch, output_attentions=False, position_ids=None)
    assert step.report().replayed == 2
    step(**plain(1)[0], anything=[1, 2])
    assert step.report().ordinary["anything, which is a list"] == 1
