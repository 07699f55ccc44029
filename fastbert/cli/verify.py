"""Implements `fastbert verify`: verifies every task's model on real text and prints one table."""

import gc
import json
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fastbert import ops
from fastbert.cli.source import Source
from fastbert.errors import InputError
from fastbert.verify import VerifyResult, verify

_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Rows, and tokens per row: a realistic size on a GPU, one that takes seconds in the interpreter.
_ON_GPU = (8, 128)
_INTERPRETED = (2, 24)


def verify_tasks(
    out: Console,
    err: Console,
    model: str | None,
    text: Path | None,
    tasks: list[str] | None,
    dtype: str,
    train: bool,
    json_file: Path | None,
) -> bool:
    """Verify each of `tasks` (default: all), print the table, and return whether all results are equal.

    Raises:
        InputError: as `Source.open` and `Source.check`; triton is missing; bf16 without a GPU.
    """
    if ops.MISSING:
        raise InputError(ops.MISSING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and dtype == "bf16":
        raise InputError("--dtype bf16: Triton's interpreter computes bfloat16 wrongly; this needs a GPU")
    source = Source.open(model, text)
    tasks = tasks or source.tasks()
    source.check(tasks)
    out.print(Text(f"model: {source.name}"))
    batch_size, max_length = _ON_GPU if device.type == "cuda" else _INTERPRETED

    results: dict[str, VerifyResult] = {}
    seconds: dict[str, float] = {}
    shapes: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task("verifying", total=len(tasks))
        for name in tasks:
            progress.update(bar, description=source.class_of(name).__name__)
            start = time.perf_counter()
            loaded, batch = source.load(name, _DTYPES[dtype], device, batch_size, max_length)
            results[name] = verify(loaded.train(train), batch)
            shapes[name] = "x".join(str(size) for size in batch["input_ids"].shape)
            seconds[name] = time.perf_counter() - start
            del loaded
            gc.collect()  # free four copies of a model and its gradients before the next four are made
            progress.advance(bar)

    classes = {name: source.class_of(name).__name__ for name in results}
    out.print(_table(classes, results, shapes, seconds, f"{dtype} on {device}, {'training' if train else 'evaluation'} mode"))
    for result in results.values():
        if not result.ok:
            out.print(result)
    if json_file:
        json_file.write_text(json.dumps({name: r.to_dict() for name, r in results.items()}, indent=1) + "\n")
    equal = sum(result.ok for result in results.values())
    out.print(Text(f"{'EQUAL' if equal == len(results) else 'DIFFERENT'}: {equal} of {len(results)} models"))
    return equal == len(results)


def _table(
    classes: dict[str, str], results: dict[str, VerifyResult], shapes: dict[str, str], seconds: dict[str, float], title: str
) -> Table:
    table = Table(title=f"patched against eager, {title}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("model", "input", "outputs", "grads", "calls", "error/allowed", "s", ""):
        table.add_column(heading, justify="left" if heading in ("model", "") else "right")
    for name, result in results.items():
        comparisons = (*result.outputs, *result.gradients)
        worst = max((c.error / c.bound if c.bound else float(c.error > 0) for c in comparisons), default=0.0)
        table.add_row(
            classes[name],
            shapes[name],
            f"{sum(c.ok for c in result.outputs)}/{len(result.outputs)}",
            f"{sum(c.ok for c in result.gradients)}/{len(result.gradients)}",
            str(result.kernel_calls),
            f"{worst:.2f}",
            f"{seconds[name]:.1f}",
            "equal" if result.ok else "DIFFERS",
        )
    return table
