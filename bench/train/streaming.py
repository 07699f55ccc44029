"""Trains on a stream (`--stream`): shards held back to evaluate, a rank's batches, and the place of these in checkpoints."""

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
from datasets import Dataset

from bench.stream.documents import generator
from bench.stream.loader import Loader, whole
from bench.stream.reader import State, Stream, made
from bench.stream.shards import Shard, find
from bench.stream.source import open_stream
from bench.train import ranks
from bench.train.batches import Batch, checksum
from bench.train.records import DataRecord, Settings
from bench.train.resuming import read_object, step_of
from fastbert.errors import InputError

STATE = "stream.json"
UNREADABLE = 2  # exit code
EVALUATED = 512  # rows at most, of the first block that makes rows


def prepare(settings: Settings, source: Any, workers: int) -> tuple[Stream, Dataset, DataRecord]:
    """The stream to train on, the rows to evaluate with, and what is said about both.

    Raises:
        InputError: the data cannot be used, or readers, ranks and workers do not go together.
    """
    most = source.positions
    if settings.max_length > most:
        raise InputError(f"--max-length: the model has {most} positions, got {settings.max_length}")
    limit = settings.max_length or most
    train, evaluation = _divided(settings)
    stream = open_stream(
        train, source.tokenizer, settings.task, limit, settings.batch, settings.readers, settings.seed, settings.whole_words
    )
    Loader(stream, ranks.rank(), ranks.world(), workers)  # its errors come before training
    alone = dataclasses.replace(stream, shards=evaluation, readers=1)
    with _named("--eval-data" if settings.eval_data else "--data"):
        rows = next(rows for rows, *_ in made(alone, 0, State(), Counter()) if rows)[:EVALUATED]
    ids = numpy.concatenate([row["input_ids"] for row in rows])
    features = Dataset.from_list([_plain(row) for row in rows])
    said = f"{len(train)} shards to train on"
    said += "" if settings.eval_data else f", {len(evaluation)} held back to evaluate"
    data = DataRecord(
        train_rows=0,
        eval_rows=len(rows),
        train_sequences=0,
        eval_sequences=len(rows),
        limit=limit,
        limit_from="--max-length" if settings.max_length else "the model's positions",
        longest=limit,
        cut=0.0,
        unknown=float(numpy.mean(ids == source.tokenizer.unk_token_id)),
        stream=f"{said}; {settings.readers} readers, {stream.budget} tokens of each in a batch",
    )
    return stream, features, data


def _divided(settings: Settings) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    """The shards to train on and those to evaluate with."""
    shards = find([settings.data])
    if settings.eval_data:
        with _named("--eval-data"):
            return shards, find([settings.eval_data])
    if len(shards) < 2:
        raise InputError(f"--eval-data: expected with --stream of one shard, because none can be held back: {settings.data}")
    count = min(max(round(settings.eval_share * len(shards)), 1), len(shards) - 1)
    held_back = {*generator(settings.seed, 2).permutation(len(shards))[:count].tolist()}
    parts = [[shard for i, shard in enumerate(shards) if (i in held_back) == is_held] for is_held in (False, True)]
    return tuple(parts[0]), tuple(parts[1])


@contextmanager
def _named(option: str) -> Iterator[None]:
    """Let errors about shards name the option that the shards came from."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("--data:", f"{option}:", 1)) from None


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a stream as one of a Dataset."""
    lists = {name: value.astype(int).tolist() if isinstance(value, numpy.ndarray) else value for name, value in row.items()}
    return lists | {"attention_mask": [1] * len(lists["input_ids"])}


class Streaming:
    """The batches of this rank behind a checkpoint, without end, with their tokens and checksums."""

    def __init__(self, stream: Stream, workers: int, checkpoint: str | None, accumulation: int) -> None:
        """
        Raises:
            InputError: the checkpoint has no state of this stream.
        """
        state = ranks.agreed(lambda: None if checkpoint is None else read_object(Path(checkpoint) / STATE))
        self.loader = Loader(stream, ranks.rank(), ranks.world(), workers, state)
        if checkpoint and self.loader.batches != step_of(checkpoint) * accumulation:
            taken = f"{step_of(checkpoint)} steps of {accumulation} batches, got {self.loader.batches} batches"
            raise InputError(f"--resume: {Path(checkpoint) / STATE}: expected the place behind {taken}")
        self.tokens: list[int] = []
        self.checksums: list[int] = []

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in self.loader:
                self.tokens.append(int(batch["attention_mask"].sum()))
                self.checksums.append(checksum(batch))
                yield batch
        except InputError as error:
            if ranks.world() == 1:
                raise
            # The others are waiting in the middle of a step, where only the launcher can end them.
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(UNREADABLE)

    def save(self, folder: Path, batches: int) -> None:
        """Write the state of all ranks behind so many batches of the run. Every rank calls it."""
        states = ranks.gathered(self.loader.states(batches))
        if not ranks.rank():
            (folder / STATE).write_text(json.dumps(whole(self.loader.stream, batches, states), indent=1) + "\n")
