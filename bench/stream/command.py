"""The command `python -m bench input`: how fast the CPU makes the batches that pre-training eats."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bench.core.options import (
    READERS,
    WORKERS,
    Json,
    check_json,
    console,
    fail,
    finite,
    leave_stdout_to,
    print_plainly,
    write_json,
)

# fastbert and transformers are imported in the function: `python -m bench` alone must not import triton.

StreamTask = StrEnum("StreamTask", {name: name for name in ("mlm", "pretraining")})
RESULTS = "results.json"


def measure_input(
    data: Annotated[list[str], typer.Option(help="Shards: files, folders or patterns; may be repeated.")],
    task: Annotated[StreamTask, typer.Option(help="mlm, or pretraining: with next-sentence prediction.")] = StreamTask.mlm,
    model: Annotated[str | None, typer.Option(help="Directory with a tokenizer; default: the one of the extra 'demo'.")] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of the longest row.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Rows of that length per batch.")] = 32,
    readers: Annotated[int, typer.Option(min=1, max=READERS, help="Readers that share the shards.")] = 8,
    workers: Annotated[
        int, typer.Option(min=0, max=WORKERS, help="Processes that share the readers; 0: none but this one.")
    ] = 1,
    whole_words: Annotated[bool, typer.Option("--whole-words", help="Mask whole words.")] = False,
    seconds: Annotated[float, typer.Option(min=0.0, callback=finite, help="Time to measure.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Seed of the order, the rows and the masks.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json; by default nothing is written.")] = None,
    json: Json = None,
) -> None:
    """Measure how many rows per second a core reads, tokenises, builds and masks. Needs no GPU."""
    leave_stdout_to(json)
    check_json(json)
    import datasets

    from bench.core import environment, schema
    from bench.stream import measure
    from bench.stream.loader import Loader
    from bench.stream.source import open_stream
    from bench.train.model import open_source
    from fastbert.cli.output import progress
    from fastbert.errors import InputError

    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # errors are one line of our own
    try:
        tokenizer = open_source(model).tokenizer
        stream = open_stream(data, tokenizer, str(task), max_length, batch, readers, seed, whole_words)
        with progress(f"measuring for {seconds:g} s", json):
            record = measure.measure(Loader(stream, workers=workers), seconds)
    except InputError as error:
        raise fail(error) from None
    console.print(measure.table(record))
    for line in measure.lines(record):
        print_plainly(line)
    results = measure.InputResults(environment.read(), record)
    if out:
        schema.write(results, out / RESULTS)
        print_plainly(out / RESULTS)
    write_json(results, json)
