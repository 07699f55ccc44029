"""transformers' Trainer and accelerate: the stock model's losses, weights and checkpoints."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import fastbert
from fastbert.testing.models import counting, expected_launches
from fastbert.testing.rows import DEVICE
from tests.models.test_patch import classes
from tests.models.tiny import CLASSIFICATION, MLM, make, make_batch

STEPS, ACCUMULATED, ROWS = 4, 2, 2


def examples(kind):
    """Rows of a data set; `unused` is a column that no forward takes and that Trainer must drop."""
    batches = [make_batch(kind, seed=seed) for seed in range(STEPS * ACCUMULATED)]
    rows = [{name: tensor[i].cpu() for name, tensor in batch.items()} for batch in batches for i in range(ROWS)]
    return [row | {"unused": torch.tensor(0)} for row in rows]


def arguments_in(folder, **settings):
    """Arguments for a few steps that log every loss and write only what `settings` request."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": ROWS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": DEVICE.type == "cpu",
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return TrainingArguments(**(defaults | settings))


def train(model, folder, kind, **settings):
    arguments = arguments_in(folder, max_steps=STEPS, gradient_accumulation_steps=ACCUMULATED, **settings)
    trainer = Trainer(model=model, args=arguments, train_dataset=examples(kind))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    return trainer, torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("kind", [CLASSIFICATION, MLM], ids=str)
def test_trainer_with_accumulation(kind, tmp_path):
    stock = make(kind)
    _, stock_losses = train(stock, tmp_path / "stock", kind)
    model = fastbert.patch(make(kind))
    with counting() as launched:
        trainer, losses = train(model, tmp_path / "patched", kind)
    passes = STEPS * ACCUMULATED
    assert launched == expected_launches(model, forward=passes, backward=passes)
    torch.testing.assert_close(losses, stock_losses, rtol=0.0, atol=1e-5)
    assert losses.unique().numel() == STEPS, "every step has its own batch and its own weights"
    assert_same_weights(model, stock)

    trainer.save_model()
    loaded = kind.cls.from_pretrained(tmp_path / "patched")
    assert classes(loaded) == classes(stock)
    assert_same_weights(loaded.to(model.device), model)


def test_trainer_with_checkpointing(tmp_path):
    stock = make(MLM)
    _, stock_losses = train(stock, tmp_path / "stock", MLM)
    model = fastbert.patch(make(MLM))
    with counting() as launched:
        _, losses = train(model, tmp_path / "patched", MLM, gradient_checkpointing=True)
    passes, layers = STEPS * ACCUMULATED, model.config.num_hidden_layers
    assert launched["bias_gelu_fwd_kernel"] == 2 * passes * layers
    assert launched["bias_gelu_bwd_kernel"] == passes * layers
    torch.testing.assert_close(losses, stock_losses, rtol=0.0, atol=1e-5)


def test_accelerate():
    def losses(model):
        accelerator = Accelerator(cpu=DEVICE.type == "cpu", gradient_accumulation_steps=ACCUMULATED)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        rows = [{k: v for k, v in row.items() if k != "unused"} for row in examples(MLM)]
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=ROWS))
        found = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.detach())
        unwrapped = accelerator.unwrap_model(model)
        accelerator.free_memory()
        return torch.stack(found), unwrapped

    stock_losses, stock = losses(make())
    with counting() as launched:
        patched_losses, model = losses(fastbert.patch(make()))
    passes = STEPS * ACCUMULATED
    assert launched == expected_launches(model, forward=passes, backward=passes)
    torch.testing.assert_close(patched_losses, stock_losses, rtol=0.0, atol=1e-5)
    assert_same_weights(model, stock)


def assert_same_weights(model, other):
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):  # its gradient is noise, which AdamW scales to a full step
            torch.testing.assert_close(parameter, other.get_parameter(name), rtol=0.0, atol=1e-5)
