"""transformers' Trainer on two ranks: the losses and weights of a stock Trainer in one process with the same global batch."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fastbert
from tests.distributed.data import assert_layers, assert_parameters, batch_of, model_of
from tests.models.tiny import CLASSIFICATION
from tests.ranks import on_ranks

STEPS, ACCUMULATED, ROWS = 3, 2, 2
pytestmark = pytest.mark.long


def examples() -> list[dict[str, torch.Tensor]]:
    batches = [batch_of(step % 2, CLASSIFICATION, step) for step in range(2 * STEPS * ACCUMULATED)]
    padding = {"attention_mask": torch.ones(9, dtype=torch.long)}  # a rank's first batch may have no mask
    return [padding | {name: tensor[i] for name, tensor in batch.items()} for batch in batches for i in range(ROWS)]


def train(model: nn.Module, folder: Path, rows: int, patched: bool) -> list[float]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=ACCUMULATED,
        max_steps=STEPS,
        learning_rate=1e-3,
        adam_epsilon=1e-4,
        weight_decay=0.1,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        # True multiplies the loss by the number of ranks, which a model that ignores num_items_in_batch does not undo.
        average_tokens_across_devices=False,
    )
    more = {"optimizer_cls_and_kwargs": fastbert.trainer_optimizer(arguments)} if patched else {}
    trainer = Trainer(model=fastbert.patch(model) if patched else model, args=arguments, train_dataset=examples(), **more)
    trainer.train()
    if patched:
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        assert_layers(model)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def on_a_rank(rank: int, folder: Path) -> None:
    model = model_of(CLASSIFICATION)
    losses = train(model, folder / "patched", ROWS, patched=True)
    if rank == 0:
        torch.save(dict(model.named_parameters()), folder / "parameters.pt")
        (folder / "losses.json").write_text(json.dumps(losses))


def test_trainer_on_two_ranks(tmp_path: Path) -> None:
    on_ranks(2, on_a_rank, tmp_path)
    stock = model_of(CLASSIFICATION)
    expected = train(stock, tmp_path / "stock", 2 * ROWS, patched=False)
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(set(losses)) == STEPS
    # Two ranks add up in another order than one; a step moves parameters a hundred times as far.
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0.0, atol=1e-5)
    assert_parameters(torch.load(tmp_path / "parameters.pt"), dict(stock.named_parameters()))
