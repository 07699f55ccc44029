"""The command `python -m bench train`: fine-tunes or pre-trains on the user's file, stock and fastbert from the same start."""

import logging
import os
import sys
import time
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.core.options import READERS, STDOUT, WORKERS, Json, check_json, write_json
from bench.train.records import DTYPES, LANES, POOLINGS, TRUNCATIONS, WINDOWS, Settings

# fastbert imports transformers, which imports triton, so it is imported after the interpreter has been selected.

console = Console(width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True)
PATIENCE = 5.0  # seconds that other ranks leave to the first one for an error
LINE = 80  # width of the lines about the data
TASKS = ("classification", "matching", "ner", "qa", "multiple-choice", "mlm", "pretraining", "clm")
TaskName = StrEnum("TaskName", {name.replace("-", "_"): name for name in TASKS})
LaneName = StrEnum("LaneName", {name: name for name in LANES})
DtypeName = StrEnum("DtypeName", {name: name for name in DTYPES})
Truncation = StrEnum("Truncation", {name.replace("+", "_"): name for name in TRUNCATIONS})
WindowsName = StrEnum("WindowsName", {name.replace("+", "_"): name for name in WINDOWS})
Pooling = StrEnum("Pooling", {name.replace("-", "_"): name for name in POOLINGS})


def train(
    task: Annotated[TaskName, typer.Option(help="The task to train.")],
    data: Annotated[Path, typer.Option(help="The rows, in the task's format (docs/own-data.md).")],
    model: Annotated[str | None, typer.Option(help="Directory of a BERT; default: the one of the extra 'demo'.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    eval_data: Annotated[Path | None, typer.Option(help="Rows for evaluation; by default some are held back.")] = None,
    eval_share: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of rows that is held back.")] = 0.1,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per batch, of all GPUs together.")] = 16,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches per step.")] = 1,
    lr: Annotated[float, typer.Option(min=0.0, help="Highest learning rate; it falls linearly to 0.")] = 5e-5,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Weight decay, except for biases and LayerNorm.")] = 0.01,
    warmup: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the steps over which the rate rises.")] = 0.1,
    dropout: Annotated[float | None, typer.Option(min=0.0, max=0.9, help="By default the model's own.")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Autocast's type; bf16 by default, fp32 without a GPU.")] = None,
    max_length: Annotated[
        int, typer.Option(min=0, help="Length limit in tokens; 0: the 95th percentile, or a whole window.")
    ] = 0,
    truncation: Annotated[Truncation | None, typer.Option(help="The part kept of a text over the limit.")] = None,
    windows: Annotated[
        WindowsName | None, typer.Option(help="Read long texts in windows: overlapping ones, or an end.")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=0, help="Tokens that windows share; a quarter of them by default.")] = None,
    pooling: Annotated[Pooling | None, typer.Option(help="Of the logits of a text's windows; mean by default.")] = None,
    max_windows: Annotated[int, typer.Option(min=0, help="Most windows of a text; 0: no limit.")] = 0,
    columns: Annotated[str, typer.Option(help="Which column is which, by name or number: text=review,label=3.")] = "",
    eval_steps: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0: only at the end.")] = 0,
    save_steps: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: none.")] = 0,
    patience: Annotated[int, typer.Option(min=0, help="Stop after this many evaluations without a lower loss; 0: never.")] = 0,
    whole_words: Annotated[bool, typer.Option("--whole-words", help="mlm and pretraining: mask whole words.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="--data names shards of text: a folder, a file, a pattern.")] = False,
    readers: Annotated[int, typer.Option(min=0, max=READERS, help="Readers that share the shards; 0: 8.")] = 0,
    workers: Annotated[int, typer.Option(min=0, max=WORKERS, help="Processes per GPU that read, tokenise and mask ahead.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of new heads, held-back rows, row order, masks, dropout.")] = 0,
    lane: Annotated[list[LaneName] | None, typer.Option(help="Only this lane; both by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoints in --out.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json, losses.png, checkpoints.")] = Path("bench-out/train"),
    json: Json = None,
) -> None:
    """Train twice on your own file, stock and fastbert, from the same start on the same batches.

    Under torchrun or accelerate launch, every GPU trains on its part of each batch: the same run, with the same losses.
    """
    _leave_words_to_first_rank()
    console.quiet |= json == STDOUT
    gpu = _choose_interpreter()
    check_json(json)
    from bench.train import options, ranks
    from fastbert.errors import InputError

    given = dict(
        task=str(task),
        data=str(data),
        model=model or "",
        steps=steps,
        eval_data=eval_data and str(eval_data),
        eval_share=eval_share,
        batch=batch,
        accumulation=accumulation,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        dropout=dropout,
        dtype=str(dtype or ""),
        max_length=max_length,
        truncation=str(truncation or ""),
        columns=columns,
        windows=str(windows or ""),
        stride=stride,
        pooling=str(pooling or ""),
        max_windows=max_windows,
        eval_steps=eval_steps,
        save_steps=save_steps,
        patience=patience,
        seed=seed,
        whole_words=whole_words,
        stream=stream,
        readers=readers,
    )
    try:
        options.require()
        with ranks.joined(gpu):
            code = _train(gpu, given, out, [str(name) for name in lane or LANES], resume, workers, json)
    except InputError as error:  # before the ranks have joined
        code = _refused(error)
        time.sleep(PATIENCE if err.quiet else 0)  # a launcher ends all ranks when one has failed
    except KeyboardInterrupt:
        err.print(f"stopped; with --save-steps, --resume continues from {out}", highlight=False, soft_wrap=True)
        code = ranks.INTERRUPTED
    if code:
        raise typer.Exit(code)


def _train(gpu: bool, given: dict[str, Any], out: Path, lanes: list[str], resume: bool, workers: int, json: Path | None) -> int:
    """Train and report. The exit code: 1 if the lanes differ, 2 if something given cannot be used."""
    from bench.train import options, ranks, report
    from fastbert.errors import InputError

    try:
        settings = options.settings(gpu, **given)
        if workers and not settings.stream:
            raise InputError("--workers: share the readers of --stream")
        results = _run(settings, out, lanes, resume, workers, json)
    except InputError as error:
        return _refused(error)
    report.show(results, console)
    for name in (report.RESULTS, report.PICTURE):
        console.print(f"{out / name}", highlight=False, markup=False, soft_wrap=True)
    if not ranks.rank():
        write_json(results, json)
    return int(bool(results.comparison and results.comparison.problems))


def _refused(error: Exception) -> int:
    err.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
    return 2


def _run(settings: Settings, out: Path, lanes: list[str], resume: bool, workers: int, json: Path | None) -> Any:
    import datasets
    from transformers.utils import logging as transformers_logging

    from bench.train.run import run_all

    hidden = not err.is_terminal or err.quiet or json == STDOUT
    if hidden:
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Lines about the data stay on stdout if that is no terminal.
    with Progress(*columns, console=err, disable=hidden, redirect_stdout=console.is_terminal) as progress:
        bars: dict[str, Any] = {}

        def advance(lane: str, step: int, loss: float | None) -> None:
            if lane not in bars:
                bars[lane] = progress.add_task(lane, total=settings.steps, loss="")
            said = {} if loss is None else {"loss": f"loss {loss:.4f}"}
            progress.update(bars[lane], completed=step, **said)

        return run_all(settings, out, lanes, resume, advance, _say, workers)


def _leave_words_to_first_rank() -> None:
    """Of several ranks let the first one alone print, warn, log and draw progress bars; the others only log errors."""
    console.quiet = err.quiet = os.environ.get("RANK", "0") != "0"
    if err.quiet:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, width=min(console.width, LINE))


def _choose_interpreter() -> bool:
    """Whether there is a GPU; without one Triton's interpreter runs the kernels."""
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before fastbert imports triton, to avoid a restart
    from fastbert.cli.interpreter import use_interpreter_without_gpu

    use_interpreter_without_gpu(lambda line: err.print(f"{line}; no times are taken", soft_wrap=True))
    return gpu
