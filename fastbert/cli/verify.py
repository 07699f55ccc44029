"""Implements `fastbert verify`: verifies every task's model on real text and prints one table."""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from fastbert import display, ops
from fastbert.cli.output import console_for, progress, write_json
from fastbert.cli.source import Source
from fastbert.errors import InputError
from fastbert.verify import VerifyResult, verify

_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Rows, and tokens per row: a realistic size on a GPU, one that takes seconds in the interpreter.
_ON_GPU = (8, 128)
_INTERPRETED = (2, 24)
_HEADINGS = ("model", "input", "outputs", "grads", "calls", "error/allowed", "s", "")
_NUMBERS = _HEADINGS[1:-1]
# In the order in which columns are left out where the width does not do.
_SPARED = ("input", "s")


def verify_tasks(
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
    out = console_for(json_file)
    out.print(Text(f"model: {source.name}"))
    batch_size, max_length = _ON_GPU if device.type == "cuda" else _INTERPRETED

    results: dict[str, VerifyResult] = {}
    rows: list[tuple[str, ...]] = []
    with progress("verifying", json_file) as begin:
        for done, name in enumerate(tasks):
            begin(source.class_of(name).__name__, done, len(tasks))
            start = time.perf_counter()
            loaded, batch = source.load(name, _DTYPES[dtype], device, batch_size, max_length)
            results[name] = verify(loaded.train(train), batch)
            shape = "x".join(str(size) for size in batch["input_ids"].shape)
            rows.append(_row(source.class_of(name).__name__, results[name], shape, time.perf_counter() - start))
            del loaded
            gc.collect()  # free four copies of a model and its gradients before the next four are made

    out.print(_Table(f"patched against eager, {dtype} on {device}, {'training' if train else 'evaluation'} mode", rows))
    for result in results.values():
        if not result.ok:
            out.print(result)
    write_json({name: result.to_dict() for name, result in results.items()}, json_file)
    out.print(Text(_verdict(list(results.values()))))
    return all(result.ok for result in results.values())


@dataclass(frozen=True)
class _Table:
    """One line a model, with as many columns as fit."""

    title: str
    rows: list[tuple[str, ...]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Text(self.title)
        yield ""
        for left_out in range(len(_SPARED) + 1):
            kept = [index for index, heading in enumerate(_HEADINGS) if heading not in _SPARED[:left_out]]
            cells = ([row[index] for index in kept] for row in self.rows)
            table = display.table([_HEADINGS[index] for index in kept], cells, right=_NUMBERS)
            if display.fits(table, console, options):
                break
        yield table
        yield ""


def _row(model: str, result: VerifyResult, shape: str, seconds: float) -> tuple[str, ...]:
    comparisons = (*result.outputs, *result.gradients)
    worst = max((c.error / c.bound if c.bound else float(c.error > 0) for c in comparisons), default=0.0)
    return (
        model,
        shape,
        f"{sum(c.ok for c in result.outputs)}/{len(result.outputs)}",
        f"{sum(c.ok for c in result.gradients)}/{len(result.gradients)}",
        str(result.kernel_calls),
        f"{worst:.2f}",
        f"{seconds:.1f}",
        "equal" if result.ok else "DIFFERS" if _differs(result) else "no kernel",
    )


def _differs(result: VerifyResult) -> bool:
    return not all(comparison.ok for comparison in (*result.outputs, *result.gradients))


def _verdict(results: list[VerifyResult]) -> str:
    """One line. Equal numbers prove nothing if no kernel ran."""
    if different := sum(map(_differs, results)):
        return f"DIFFERENT: {different} of {len(results)} models"
    if idle := sum(not result.kernel_calls for result in results):
        return f"NOTHING VERIFIED: no kernel ran in {idle} of {len(results)} models"
    return f"EQUAL: {len(results)} of {len(results)} models"
