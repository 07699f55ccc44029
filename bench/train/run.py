"""Runs a whole training comparison: rows, features, the common start, the lanes, the comparison, the files."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from bench.core import environment, schema
from bench.train import encode, ranks, report, sharding, streaming, tasks
from bench.train.compare import compare
from bench.train.data import read
from bench.train.file import Row, Say
from bench.train.labels import lines
from bench.train.lanes import RECORD, Advance, Work, run
from bench.train.model import dropout_of, load, open_source
from bench.train.options import SHORTEST
from bench.train.records import LANES, SCHEMA, DataRecord, Settings, TrainResults
from bench.train.resuming import checkpoints, read_object
from bench.train.windows import as_input_error, described, windows_of
from fastbert.errors import InputError
from fastbert.windows import SIZE

SETTINGS = "settings.json"
SplitRows = tuple[list[Row], list[Row], list[str]]


def run_all(
    settings: Settings, out: Path, lanes: Sequence[str], resume: bool, advance: Advance, say: Say = print, workers: int = 0
) -> TrainResults:
    """Train every lane, on every rank, and let rank 0 write the results into `out`, a folder that all ranks can read.

    `say` gets lines about the data before training. `workers`: processes of each rank that read a stream ahead.

    Raises:
        InputError: data, model or folder cannot be used. Nothing was trained.
    """
    datasets.disable_caching()
    resume = ranks.of_first(lambda: _resumes(settings, out, lanes, resume))
    work, data = ranks.agreed(lambda: _prepared(settings, out, say, workers))
    ranks.of_first(lambda: _mark(settings, out))
    records = [run(work, lane, advance, resume) for lane in lanes]
    config = work.start.config
    dropout = dropout_of(config)
    both = {record.lane: record for record in records}
    comparison = compare(settings, dropout, both["stock"], both["fastbert"]) if len(both) == len(LANES) else None
    results = TrainResults(environment.read(), settings, data, records, comparison)
    if not ranks.rank():
        schema.write(results, out / report.RESULTS)
        report.draw(results, out / report.PICTURE)
    return results


def _prepared(settings: Settings, out: Path, say: Say, workers: int) -> tuple[Work, DataRecord]:
    source = open_source(settings.model or None)
    if not settings.stream:
        return prepare(settings, source, read_rows(settings, say), out)
    stream, evaluation, data = streaming.prepare(settings, source, workers)
    compute = tasks.metrics_for(settings.task, [], [], evaluation)
    work = Work(settings, load(source, settings, []), source.tokenizer, None, evaluation, compute, out, None, stream, workers)
    return work, data


def prepare(settings: Settings, source: Any, rows: SplitRows, out: Path) -> tuple[Work, DataRecord]:
    """Prepare everything that both lanes share."""
    task, tokenizer = settings.task, source.tokenizer
    train_rows, eval_rows, labels = rows
    train, evaluation = Dataset.from_list(train_rows), Dataset.from_list(eval_rows)
    lengths, unknown = encode.lengths(train, task, tokenizer)
    most = source.positions
    limit, limit_from = choose_limit(settings.max_length, lengths, most, bool(settings.windows))
    windows = windows_of(settings, tokenizer, limit)
    numbers = {name: i for i, name in enumerate(labels)}
    try:
        features = [encode.encode(part, task, tokenizer, limit, settings.cut, numbers, windows) for part in (train, evaluation)]
    except ValueError as error:
        if windows is None or not str(error).startswith("texts: "):
            raise
        raise as_input_error(error) from None
    sequences = [sum(map(len, part["input_ids"])) if windows else len(part) for part in features]
    sharding.check(len(features[0]), settings.batch, ranks.world())
    model = load(source, settings, labels)
    compute = tasks.metrics_for(task, labels, eval_rows, features[1])
    data = DataRecord(
        train_rows=len(train_rows),
        eval_rows=len(eval_rows),
        train_sequences=sequences[0],
        eval_sequences=sequences[1],
        limit=limit,
        limit_from=limit_from,
        longest=max(lengths),
        cut=sum(length > limit for length in lengths) / len(lengths),
        unknown=unknown / sum(lengths),
        labels=labels,
        windows=described(windows) if windows else "",
    )
    return Work(settings, model, tokenizer, *features, compute, out, windows), data


def read_rows(settings: Settings, say: Say = print) -> SplitRows:
    """Training rows, evaluation rows, and the labels of the training rows."""
    task = settings.task
    rows = read(task, Path(settings.data), columns=settings.columns, say=say)
    for line in lines(rows):
        say(line)
    if settings.eval_data:
        train, evaluation = rows, read(task, Path(settings.eval_data), "--eval-data", settings.columns, say)
        labels = tasks.label_names(train)
        tasks.check_labels(evaluation, labels, f"--eval-data: {settings.eval_data}")
        _check_endings(train, evaluation, settings.eval_data)
    else:
        train, evaluation = tasks.split(task, rows, settings.eval_share, settings.seed)
        labels = tasks.label_names(rows)
    if len(labels) == 1:
        raise InputError(f"--data: {settings.data} has only one label, {labels[0]!r}: there is nothing to learn")
    if task == "pretraining":
        train, evaluation = (tasks.sentence_pairs(part, settings.seed) for part in (train, evaluation))
    return train, evaluation, labels


def _check_endings(train: list[Row], evaluation: list[Row], path: str) -> None:
    counts = {len(row.get("endings", ())) for row in train} | {len(row.get("endings", ())) for row in evaluation}
    if len(counts) > 1:
        raise InputError(f"--eval-data: {path}, row {evaluation[0]['row']}: its number of endings differs from training's")


def choose_limit(requested: int, lengths: Sequence[int], most: int, in_windows: bool = False) -> tuple[int, str]:
    """The length limit in tokens, and where it comes from."""
    if requested > most:
        raise InputError(f"--max-length: the model has {most} positions, got {requested}")
    if requested:
        return requested, "--max-length"
    if in_windows:
        return min(most, SIZE), "a window of the model's positions" if most <= SIZE else "a window"
    limit = encode.percentile(lengths)
    if limit > most:
        return most, f"the model's positions; the 95th percentile is {limit}"
    return max(limit, SHORTEST), "the 95th percentile"


def _resumes(settings: Settings, out: Path, lanes: Sequence[str], asked: bool) -> bool:
    """Whether to continue the run in the folder: if asked, or if it is the one in which a rank has failed.

    Raises:
        InputError: as `_check_folder`.
    """
    resume = asked or (ranks.restarted() and (out / SETTINGS).exists())
    _check_folder(settings, out, lanes, resume)
    return resume


def _check_folder(settings: Settings, out: Path, lanes: Sequence[str], resume: bool) -> None:
    """Raise InputError unless the folder is free or holds the run to be resumed."""
    if not resume:
        if any(checkpoints(out / lane) or (out / lane / RECORD).exists() for lane in lanes):
            raise InputError(f"--out: {out} already holds a run: --resume continues it, another folder starts a new one")
        return
    if not (out / SETTINGS).exists():
        raise InputError(f"--resume: there is no run in {out} to continue")
    before = read_object(out / SETTINGS)
    if before.get("schema") != SCHEMA:
        raise InputError(
            f"--resume: the run in {out} was made by another version of this command, which ordered rows otherwise"
        )
    for name, value in dataclasses.asdict(settings).items():
        if before.get(name) != value:
            raise InputError(f"--resume: the run in {out} has {name} {before.get(name)!r}, this one {value!r}")


def _mark(settings: Settings, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / SETTINGS).write_text(json.dumps({"schema": SCHEMA} | dataclasses.asdict(settings), indent=1) + "\n")
    except OSError as error:
        raise InputError(f"--out: cannot write into {out}: {error.strerror}") from None
