"""Measures the input side: what a core of a worker makes per second, by phase, and how many cores a GPU therefore needs."""

import os
import platform
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from bench.core.records import Environment, FromJson
from bench.stream.loader import Loader

# What a GPU is taken to train on. bench train has measured no H100; this is a rate above which the input would not matter.
GPU, GPU_ROWS, GPU_LENGTH = "an H100", 1000, 512
PHASES = {
    "read": "read: shards to documents",
    "tokenise": "tokenise: sentences to ids",
    "build": "build: rows of a block, shuffled",
    "mask": "mask: 15 % of the tokens",
    "rest": "rest: arrays to the training process",
}
FEWEST = 2  # batches
SCHEMA = 1


@dataclass(frozen=True)
class InputRecord(FromJson):
    """One measurement. `tokens` are real ones, special tokens included, of the `rows` taken in `seconds` of wall time by a
    process that does nothing else.

    phases: seconds of CPU per token in a worker. collect: in the training process, which joins and pads the parts; without
    workers that is a part of the rest.
    """

    task: str
    whole_words: bool
    max_length: int
    batch_tokens: int
    readers: int
    workers: int
    cpu: str
    cores: int
    batches: int
    rows: int
    tokens: int
    seconds: float
    phases: dict[str, float]
    collect: float

    @property
    def of_a_core(self) -> float:
        """Tokens per second of CPU time in a worker."""
        return 1 / sum(self.phases.values())

    @property
    def cores_for_gpu(self) -> tuple[float, float]:
        """Cores of workers that feed a GPU, and the share of a core that its training process spends on it."""
        needed = GPU_ROWS * GPU_LENGTH
        return needed / self.of_a_core, needed * self.collect


@dataclass(frozen=True)
class InputResults(FromJson):
    """What results.json holds."""

    environment: Environment
    record: InputRecord
    schema: int = SCHEMA


def measure(loader: Loader, seconds: float) -> InputRecord:
    """Take batches for so many seconds, from the second one on.

    Raises:
        InputError: a shard cannot be read.
    """
    batches = iter(loader)
    next(batches)
    rows = tokens = count = 0
    wall, spent = time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - wall) < seconds or count < FEWEST:
        mask = next(batches)["attention_mask"]
        count, rows, tokens = count + 1, rows + len(mask), tokens + int(mask.sum())
    spent = time.process_time() - spent
    stream = loader.stream
    return InputRecord(
        task=stream.task,
        whole_words=stream.encoder.whole_words,
        max_length=stream.max_length,
        batch_tokens=stream.budget * stream.readers,
        readers=stream.readers,
        workers=loader.workers,
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        batches=count,
        rows=rows,
        tokens=tokens,
        seconds=elapsed,
        phases=per_token(sum(loader.numbers(), Counter())),
        collect=spent / tokens if loader.workers else 0.0,
    )


def per_token(numbers: Counter[str]) -> dict[str, float]:
    """Seconds per token by phase. A block is made at once, and its rows are masked as batches need them."""
    known = {name: numbers[name] / numbers["made"] for name in ("read", "tokenise", "build")}
    known["mask"] = numbers["mask"] / numbers["tokens"]
    rest = numbers["all"] - sum(numbers[name] for name in known)
    return known | {"rest": max(rest, 0.0) / numbers["tokens"]}


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def table(record: InputRecord) -> Table:
    """Microseconds of CPU per thousand tokens, by phase."""
    words = ", whole words" if record.whole_words else ""
    made = Table(title=f"{record.task}{words}, rows of up to {record.max_length} tokens, {record.cpu}")
    made.add_column("phase")
    made.add_column("us of a core per 1,000 tokens", justify="right")
    made.add_column("share", justify="right")
    total = sum(record.phases.values())
    for name, phase in PHASES.items():
        made.add_row(phase, f"{record.phases[name] * 1e9:,.0f}", f"{record.phases[name] / total:.0%}")
    made.add_row("together", f"{total * 1e9:,.0f}", "100%")
    return made


def lines(record: InputRecord) -> list[str]:
    """What was measured, and what follows."""
    rate, rows = record.tokens / record.seconds, record.rows / record.seconds
    workers, collect = record.cores_for_gpu
    each = f", {rate / record.workers:,.0f} of each worker" if record.workers > 1 else ""
    where = f"{record.workers} worker processes" if record.workers != 1 else "1 worker process"
    return [
        f"{where if record.workers else 'no worker process'}, {record.readers} readers, {record.cores} cores: "
        f"{rows:,.0f} rows/s of {record.tokens / record.rows:.0f} tokens on average, {rate:,.0f} tokens/s{each} "
        f"({record.rows:,} rows in {record.seconds:.1f} s)",
        f"a core makes {record.of_a_core:,.0f} tokens/s: {record.of_a_core / GPU_LENGTH:,.0f} rows of {GPU_LENGTH}",
        f"{GPU} that trains on {GPU_ROWS:,} rows of {GPU_LENGTH} a second needs {workers:.1f} such cores for workers, and "
        f"{collect:.2f} of one in its training process",
    ]
