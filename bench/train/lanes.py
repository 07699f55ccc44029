"""Trains one lane: transformers' Trainer from the common start, with checkpoints and measurements."""

import copy
import gc
import json
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import fastbert
from bench.core.records import Spread
from bench.core.schema import parse
from bench.train.batches import Collator, Rows
from bench.train.metrics import Compute
from bench.train.model import arguments
from bench.train.records import Evaluation, LaneRecord, Settings
from bench.train.tasks import TASKS
from bench.train.windows import loss_and_logits
from fastbert.errors import InputError
from fastbert.kernels.core import failures
from fastbert.kernels.core.launch import counts

RECORD = "lane.json"
WARM_UP = 5  # untimed steps: kernels are compiled and the allocator fills
FEWEST_TIMED = 5
Advance = Callable[[str, int, float | None], None]


@dataclass(frozen=True)
class Work:
    """Everything that both lanes share."""

    settings: Settings
    start: nn.Module
    tokenizer: Any
    train: Dataset
    evaluation: Dataset
    compute: Compute
    folder: Path
    windows: fastbert.Windows | None = None


class Watch(TrainerCallback):
    """Measures step time and peak memory on a GPU; passes the epoch to the rows and the step to the progress bar."""

    def __init__(self, lane: str, rows: Rows, advance: Advance) -> None:
        self.lane, self.rows, self.advance = lane, rows, advance
        self.seconds: list[float] = []
        self.peak_bytes: int | None = None
        self.first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step
        self.advance(self.lane, state.global_step, None)

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.epoch = int(state.epoch or 0)

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            self.begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.begun)
            self.peak_bytes = max(self.peak_bytes or 0, torch.cuda.max_memory_allocated())

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(self.lane, state.global_step, (kwargs.get("logs") or {}).get("loss"))


def run(work: Work, lane: str, advance: Advance, resume: bool = False) -> LaneRecord:
    """Train a copy of the start and evaluate it. With `resume`, continue from the lane's last checkpoint if it has one."""
    folder = work.folder / lane
    if resume and (folder / RECORD).exists():
        return _read(folder / RECORD)
    model = copy.deepcopy(work.start)
    chosen = arguments(work.settings, folder)
    extra: dict[str, Any] = {}
    if lane == "fastbert":
        fastbert.patch(model)
        extra["optimizer_cls_and_kwargs"] = fastbert.trainer_optimizer(chosen)
    task = TASKS[work.settings.task]
    train, evaluation = (Collator(work.settings.task, work.tokenizer, work.windows) for _ in range(2))
    rows = Rows(work.train, work.settings.seed, task.kept)
    watch = Watch(lane, rows, advance)
    trainer = _Trainer(
        model=model,
        args=chosen,
        data_collator=train,
        train_dataset=rows,
        eval_dataset=Rows(work.evaluation, work.settings.seed, task.kept),
        processing_class=work.tokenizer,
        compute_metrics=work.compute,
        preprocess_logits_for_metrics=task.reduce,
        callbacks=[watch, *_early_stopping(work.settings)],
        **extra,
    )
    trainer.evaluation_collator, trainer.windows = evaluation, work.windows
    # BERT's forward takes num_items_in_batch and ignores it. Trainer would then sum a step's losses instead of averaging them.
    trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    before = counts.total()
    failures.strict = True  # no fallback is timed under a kernel's name
    trainer.train(resume_from_checkpoint=_last_checkpoint(folder, work.settings.steps) if resume else None)
    launches = counts.total() - before
    judged = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    record = LaneRecord(
        lane=lane,
        attention=_attention_name(model),
        optimizer=_optimizer_name(trainer),
        losses=[entry["loss"] if math.isfinite(entry["loss"]) else None for entry in _entries(trainer, "loss")],
        evaluations=[Evaluation(entry["step"], entry["eval_loss"]) for entry in _entries(trainer, "eval_loss")[:-1]],
        final_eval_loss=judged["loss"],
        metrics={name: float(value) for name, value in judged.items() if name not in _NOT_METRICS},
        launches=launches,
        resumed_at=watch.first_step,
        stopped_early=trainer.state.global_step < work.settings.steps,
        **_tally(train, trainer, watch, work.settings),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n")
    del trainer, model
    _free()
    return record


_NOT_METRICS = ("loss", "epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class _Trainer(Trainer):
    """A Trainer with a separate collator for evaluation, so that the tally covers training only, and the loss of windows."""

    evaluation_collator: Collator
    windows: fastbert.Windows | None

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if self.windows is None:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss, logits = loss_and_logits(self.windows, model, inputs)
        return (loss, {"logits": logits}) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        own = self.data_collator
        self.data_collator = self.evaluation_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = own


def checkpoints(folder: Path) -> dict[int, Path]:
    """The lane's checkpoints by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return {int(path.name.removeprefix("checkpoint-")): path for path in sorted(found)}


def _last_checkpoint(folder: Path, steps: int) -> str | None:
    """The last checkpoint before the final step: resumed from the final one, Trainer would take one step too many."""
    found = {step: path for step, path in checkpoints(folder).items() if step < steps}
    return str(found[max(found)]) if found else None


def _early_stopping(settings: Settings) -> list[TrainerCallback]:
    return [EarlyStoppingCallback(settings.patience)] if settings.patience else []


def _entries(trainer: Trainer, name: str) -> list[dict[str, Any]]:
    """The log's entries with `name`, including those before a resumption."""
    return [entry for entry in trainer.state.log_history if name in entry]


def _attention_name(model: nn.Module) -> str:
    """The config's attention implementation, and whether fastbert ran in its place."""
    name = model.config._attn_implementation
    ran = any("attention" in (row.kernel or "").split(", ") and row.kernel_calls for row in fastbert.report(model).rows)
    return f"fastbert over {name}" if ran else name


def _optimizer_name(trainer: Trainer) -> str:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    owner = "fastbert" if isinstance(optimizer, fastbert.AdamW) else "torch"
    fused = " fused" if owner == "torch" and optimizer.defaults.get("fused") else ""
    return f"{owner} {type(optimizer).__name__}{fused}"


def _tally(collator: Collator, trainer: Trainer, watch: Watch, settings: Settings) -> dict[str, Any]:
    """Tokens, checksums and times of the steps of this process. The collator may be a batch ahead of them."""
    sizes = _batches_a_step(len(trainer.train_dataset), settings)
    batches = iter(zip(collator.tokens, collator.checksums, strict=True))
    tokens, checksums = [], []
    for step in range(watch.first_step, trainer.state.global_step):
        own = [next(batches) for _ in range(sizes[step % len(sizes)])]
        tokens.append(sum(count for count, _ in own))
        checksums.append(zlib.crc32(repr([checksum for _, checksum in own]).encode()))
    found: dict[str, Any] = {"tokens": sum(tokens), "checksums": checksums, "peak_bytes": watch.peak_bytes}
    timed = watch.seconds[WARM_UP:]
    if len(timed) >= FEWEST_TIMED:
        found |= {"seconds": Spread.of(timed), "tokens_per_second": sum(tokens[WARM_UP:]) / sum(timed)}
    return found


def _batches_a_step(rows: int, settings: Settings) -> list[int]:
    """The number of batches in each step of an epoch; the last step takes the remainder."""
    batches = math.ceil(rows / settings.batch)
    whole, left = divmod(batches, settings.accumulation)
    return [settings.accumulation] * whole + ([left] if left else [])


def _read(path: Path) -> LaneRecord:
    try:
        return parse(LaneRecord, path.read_bytes(), "lane")
    except (OSError, ValueError) as error:
        raise InputError(f"--resume: {path} cannot be read: {error}") from None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
