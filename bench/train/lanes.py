"""Trains one lane: transformers' Trainer from the common start, with checkpoints and measurements, on one rank or several."""

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
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import fastbert
from bench.stream.reader import Stream
from bench.train import ranks, weighting
from bench.train.batches import Collator, Rows
from bench.train.evaluation import with_loss
from bench.train.metrics import Compute
from bench.train.model import arguments
from bench.train.records import Evaluation, LaneRecord, Settings
from bench.train.resuming import last_checkpoint, loading, read_lane
from bench.train.sharding import Parts
from bench.train.streaming import Streaming
from bench.train.tally import Tally, batches_of_steps, combined
from bench.train.tasks import TASKS
from bench.train.windows import loss_and_logits
from fastbert.kernels.core import failures
from fastbert.kernels.core.launch import counts

RECORD = "lane.json"
Advance = Callable[[str, int, float | None], None]


@dataclass(frozen=True)
class Work:
    """Everything that both lanes share. The rows to train on are in `train`, or come from `stream` through `workers`."""

    settings: Settings
    start: nn.Module
    tokenizer: Any
    train: Dataset | None
    evaluation: Dataset
    compute: Compute
    folder: Path
    windows: fastbert.Windows | None = None
    stream: Stream | None = None
    workers: int = 0


class Watch(TrainerCallback):
    """Measures step time and peak memory on a GPU; passes the epoch to the rows and the step to the progress bar."""

    def __init__(self, lane: str, rows: Rows | None, advance: Advance) -> None:
        self.lane, self.rows, self.advance = lane, rows, advance
        self.seconds: list[float] = []
        self.peak_bytes: int | None = None
        self.first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step
        if ranks.rank():  # Trainer has seeded every rank alike; each draws dropout of its own
            seed_dropout(args.seed, state.global_step)
        self.advance(self.lane, state.global_step, None)

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.rows is not None:
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
    before = ranks.of_first(lambda: _before(folder, lane, work.settings.steps)) if resume else None
    if isinstance(before, LaneRecord):
        return before
    model = copy.deepcopy(work.start)
    # DistributedDataParallel would send the buffers in every forward: positions and types, which never change.
    model._ddp_params_and_buffers_to_ignore = [name for name, _ in model.named_buffers()]
    chosen = arguments(work.settings, folder)
    extra: dict[str, Any] = {}
    if lane == "fastbert":
        fastbert.patch(model)
        extra["optimizer_cls_and_kwargs"] = fastbert.trainer_optimizer(chosen)
    task = TASKS[work.settings.task]
    whole_words = work.settings.whole_words
    train, evaluation = (Collator(work.settings.task, work.tokenizer, work.windows, whole_words) for _ in range(2))
    rows = None if work.train is None else Rows(work.train, work.settings.seed, task.kept)
    stream = None if work.stream is None else Streaming(work.stream, work.workers, before, work.settings.accumulation)
    watch = Watch(lane, rows, advance)
    reduce, compute = with_loss(work.settings.task, task.reduce, work.compute)
    trainer = _Trainer(
        model=model,
        args=chosen,
        data_collator=train,
        train_dataset=rows,
        eval_dataset=Rows(work.evaluation, work.settings.seed, task.kept),
        processing_class=work.tokenizer,
        compute_metrics=compute,
        preprocess_logits_for_metrics=reduce,
        callbacks=[watch, *_early_stopping(work.settings)],
        **extra,
    )
    trainer.evaluation_collator, trainer.work, trainer.stream = evaluation, work, stream
    # BERT's forward takes num_items_in_batch and ignores it. Trainer would then sum a step's losses instead of averaging them.
    trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    launched = counts.total()
    failures.strict = True  # no fallback is timed under a kernel's name
    trainer.train(resume_from_checkpoint=before)
    seen = stream or train
    own = Tally(seen.tokens, seen.checksums, watch.seconds, watch.peak_bytes, counts.total() - launched)
    judged = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    record = LaneRecord(
        lane=lane,
        attention=_attention_name(model),
        optimizer=_optimizer_name(trainer),
        losses=[entry["loss"] if math.isfinite(entry["loss"]) else None for entry in _entries(trainer, "loss")],
        evaluations=[Evaluation(entry["step"], entry["eval_loss"]) for entry in _entries(trainer, "eval_loss")[:-1]],
        final_eval_loss=judged["loss"],
        metrics={name: float(value) for name, value in judged.items() if name not in _NOT_METRICS},
        resumed_at=watch.first_step,
        stopped_early=trainer.state.global_step < work.settings.steps,
        **combined(
            ranks.gathered(own),
            batches_of_steps(None if rows is None else len(rows), work.settings, watch.first_step, trainer.state.global_step),
        ),
    )
    if not ranks.rank():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n")
    del trainer, model
    _free()
    return record


_NOT_METRICS = ("loss", "epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class _Trainer(Trainer):
    """A Trainer that trains on this rank's part of each global batch, with a loss that makes the ranks' mean the batch's.

    It has a separate collator for evaluation, so that the tally covers training only, and the loss of windows.
    """

    evaluation_collator: Collator
    work: Work
    stream: Streaming | None

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        task, shared = self.work.settings.task, model.training and ranks.world() > 1
        if shared:
            own = weighting.counted(task, inputs)
            everyone = ranks.summed(own)  # on its way during the forward
        if self.work.windows is None:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        else:
            loss, logits = loss_and_logits(self.work.windows, model, inputs)
            outputs = {"logits": logits}
        if shared:
            loss = weighting.weighted(weighting.parts(task, loss, outputs, inputs), own, everyone(), ranks.world())
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> Any:
        """A loader of this rank's parts, which accelerate must not divide once more."""
        if self.stream is not None:
            return self.stream
        parts = Parts(self.train_dataset, self.work.settings.batch, ranks.rank(), ranks.world())
        collate, pin = self.data_collator, self.args.dataloader_pin_memory
        return DataLoader(self.train_dataset, batch_sampler=parts, collate_fn=collate, pin_memory=pin)

    def _save_rng_state(self, output_dir: str) -> None:
        """Every rank calls this before the checkpoint is complete."""
        super()._save_rng_state(output_dir)
        if self.stream is not None:
            self.stream.save(Path(output_dir), self.state.global_step * self.args.gradient_accumulation_steps)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Continue the random bits of a checkpoint of as many ranks; another number of ranks draws new ones."""
        if checkpoint is None or len(list(Path(checkpoint).glob("rng_state*.pth"))) == ranks.world():
            with loading(checkpoint):
                super()._load_rng_state(checkpoint)
        else:
            seed_dropout(self.args.seed, self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
            super()._load_scaler(checkpoint)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        own = self.data_collator
        self.data_collator = self.evaluation_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = own


def seed_dropout(seed: int, step: int) -> None:
    """Seed this rank's generators by its rank, and by the step at which it starts."""
    torch.manual_seed(zlib.crc32(f"{seed} {ranks.rank()} of {ranks.world()} from {step}".encode()))


def _before(folder: Path, lane: str, steps: int) -> LaneRecord | str | None:
    """The record of a lane that was finished, or the checkpoint to continue from, if there is one."""
    record = folder / RECORD
    return read_lane(record, lane, steps) if record.exists() else last_checkpoint(folder, steps)


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


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
