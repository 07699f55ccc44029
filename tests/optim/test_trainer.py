"""Trainer and accelerate with fastbert.AdamW: stock's losses and weights, and the report in the log."""

import logging

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer

import fastbert
from fastbert.integrations.trainer import ReportCallback
from fastbert.testing.rows import DEVICE
from tests.models.test_trainer import arguments_in as common_arguments
from tests.models.test_trainer import assert_same_weights, examples
from tests.models.tiny import CLASSIFICATION, make

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
STEPS, ROWS = 8, 2  # as many rows as examples() gives


def arguments_in(folder, **settings):
    rates = {"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.98, "adam_epsilon": 1e-7}
    schedule = {"max_steps": STEPS, "lr_scheduler_type": "linear", "warmup_steps": 2}
    return common_arguments(folder, per_device_train_batch_size=ROWS, **rates, **(schedule | settings))


def train(model, arguments, **settings):
    trainer = Trainer(model=model, args=arguments, train_dataset=examples(CLASSIFICATION), **settings)
    trainer.train()
    return trainer, torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def test_trainer(tmp_path, launches, caplog):
    stock = make(CLASSIFICATION, **SMALL)
    _, stock_losses = train(stock, arguments_in(tmp_path / "stock"))
    model = fastbert.patch(make(CLASSIFICATION, **SMALL))
    arguments = arguments_in(tmp_path / "fast")
    with caplog.at_level(logging.INFO, "fastbert"):
        trainer, losses = train(
            model,
            arguments,
            optimizer_cls_and_kwargs=fastbert.trainer_optimizer(arguments),
            callbacks=[ReportCallback()],
        )
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is fastbert.AdamW
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.98), 1e-7)}
    assert launches()["adamw_kernel"] == STEPS
    torch.testing.assert_close(losses, stock_losses, rtol=0.0, atol=1e-5)
    assert_same_weights(model, stock)
    reports = [record.getMessage() for record in caplog.records if "fastbert on BertFor" in record.getMessage()]
    assert [text.split("\n")[0] for text in reports] == ["step 1", f"step {STEPS}"]


def test_trainer_goes_on_from_a_checkpoint(tmp_path):
    def run(name, **settings):
        arguments = arguments_in(tmp_path / name, **settings)
        chosen = fastbert.trainer_optimizer(arguments)
        model = make(CLASSIFICATION, **SMALL)
        rows = examples(CLASSIFICATION)
        return Trainer(model=model, args=arguments, train_dataset=rows, optimizer_cls_and_kwargs=chosen)

    whole = run("whole")
    whole.args.save_strategy, whole.args.save_steps = "steps", 4
    whole.train()
    resumed = run("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, msg=name)


def test_accelerate(launches):
    def losses(optimizer_class):
        model = make(CLASSIFICATION, **SMALL)
        groups = fastbert.param_groups(model, 1e-3, head_lr=5e-3)
        rows = [{k: v for k, v in row.items() if k != "unused"} for row in examples(CLASSIFICATION)]
        accelerator = Accelerator(cpu=DEVICE.type == "cpu")
        model, optimizer, loader = accelerator.prepare(model, optimizer_class(groups), DataLoader(rows, batch_size=ROWS))
        found = []
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        accelerator.free_memory()
        return torch.stack(found)

    torch.testing.assert_close(losses(fastbert.AdamW), losses(torch.optim.AdamW), rtol=0.0, atol=1e-5)
    assert launches()["adamw_kernel"] == STEPS


def test_not_training_arguments():
    with pytest.raises(TypeError, match="training_args: expected a transformers.TrainingArguments, got dict without learn"):
        fastbert.trainer_optimizer({})
