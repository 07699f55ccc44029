"""Writes results as JSON and reads them back. An error is one line that names the file and the place in it.

Reading checks everything, by pydantic, which is imported only there: a machine that measures needs no pydantic.
"""

import base64
import dataclasses
import json
import os
import pickle
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bench.core.records import (
    SCHEMA,
    STATUSES,
    Ceiling,
    EncodeRecord,
    HostRecord,
    LatencyRecord,
    ModelRecord,
    OpRecord,
    Results,
    Spread,
    SuiteRecord,
    Timed,
    TuneRecord,
)

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

Kind = TypeVar("Kind")
# The list of Results that a record belongs to.
FIELDS = {
    Ceiling: "ceilings",
    ModelRecord: "models",
    OpRecord: "ops",
    TuneRecord: "tuning",
    HostRecord: "host",
    LatencyRecord: "latency",
    EncodeRecord: "encode",
}
TIMED = [name for kind, name in FIELDS.items() if issubclass(kind, Timed)]


class ResultsError(Exception):
    """A results file that cannot be used. The message is one line."""


def read(path: Path) -> Results:
    """Read the results in `path`.

    Raises:
        ResultsError: the file is missing, is not JSON, or has another schema; a field is missing, unknown or of the
            wrong type; or a record contradicts itself (a time without a passed check, a time in a dry run).
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict) or "schema" not in data:
        raise ResultsError(f"{path}: not a results file of `python -m bench`")
    if data["schema"] != SCHEMA:
        raise ResultsError(f"{path}: has schema {data['schema']!r}, this version reads {SCHEMA}")
    try:
        results = parse(Results, text, "results")
        _check(results)
    except ValueError as error:
        raise ResultsError(f"{path}: {error}") from None
    return results


def write(results: Results, path: Path) -> None:
    """Write `path` atomically, so that a killed process leaves a complete file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dataclasses.asdict(results), indent=1) + "\n")
    os.replace(partial, path)


def read_all(paths: Sequence[Path]) -> Results:
    """Merge the results of several files of one machine. Of a case measured twice the last measurement counts.

    Raises:
        ResultsError: as for `read`, or the files do not belong together.
    """
    loaded = [(path, read(path)) for path in paths]
    first_path, first = loaded[0]
    for path, other in loaded[1:]:
        if (other.dry_run, other.invented) != (first.dry_run, first.invented):
            raise ResultsError(f"{path}: cannot stand beside {first_path}: only one of them was measured")
        if other.environment.identity != first.environment.identity:
            raise ResultsError(
                f"{path}: measured with {_named(other)}, {first_path} with {_named(first)}: report them one at a time"
            )
        for name in TIMED:
            merged = {_key(record): record for record in getattr(first, name) + getattr(other, name)}
            setattr(first, name, list(merged.values()))
        first.ceilings = list({c.name: c for c in first.ceilings + other.ceilings}.values())
        first.tests = other.tests or first.tests
        first.stages += other.stages
    return first


def _named(results: Results) -> str:
    return "/".join(str(part) for part in results.environment.identity)


def _key(record: Any) -> tuple[Any, ...]:
    config = tuple(record.config.items()) if isinstance(record, TuneRecord) else ()
    return record.case, record.lane, config


def parse(kind: type[Kind], text: str | bytes, where: str) -> Kind:
    """Parse JSON into `kind`, a dataclass. A ValueError says in one line what is wrong and where, below `where`."""
    from pydantic import ValidationError

    try:
        return adapter(kind).validate_json(text)
    except ValidationError as error:
        raise ValueError(_line(error.errors(include_url=False)[0], where)) from None


@cache
def adapter(kind: type[Kind]) -> "TypeAdapter[Kind]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _line(error: "ErrorDetails", where: str) -> str:
    place = where + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error["loc"])
    if error["type"] in ("missing", "json_invalid"):  # there is no input to show
        return f"{place}: {error['msg']}"
    return f"{place}: {error['msg']}, got {json.dumps(error['input'])[:60]}"


def _check(results: Results) -> None:
    for name in TIMED:
        for i, record in enumerate(getattr(results, name)):
            check_record(record, results.dry_run, f"results.{name}[{i}]")
    if results.dry_run and results.ceilings:
        raise ValueError("results.ceilings: a dry run cannot have measured any")


def check_record(record: Timed, dry_run: bool, where: str) -> None:
    """Raise ValueError for a time without a passed check, or a passed check without a time."""
    if record.status not in STATUSES:
        raise ValueError(f"{where}: status {record.status!r} is none of {', '.join(STATUSES)}")
    if (record.status == "ok") != (record.seconds is not None):
        raise ValueError(f"{where}: status {record.status!r} {'without' if record.seconds is None else 'with'} a time")
    if dry_run and record.status == "ok":
        raise ValueError(f"{where}: a time in a dry run")
    if record.seconds is not None:
        _check_spread(record.seconds, where)
    if isinstance(record, LatencyRecord | EncodeRecord):
        median = record.seconds and record.seconds.median
        if (record.p99 is None) != (median is None) or (record.p99 or 0.0) < (median or 0.0):
            raise ValueError(f"{where}: p99 {record.p99} does not go with its quartiles")


def _check_spread(spread: Spread, where: str) -> None:
    if not 0 < spread.low <= spread.median <= spread.high:
        raise ValueError(f"{where}.seconds: quartiles {spread.low}, {spread.median}, {spread.high} are not in order")


def to_line(record: Any) -> str:
    """One record as a line for `from_lines`: pickled, in base64. Workers hand over their records this way, one at a time."""
    return base64.b64encode(pickle.dumps(record)).decode()


def from_lines(lines: Iterable[str]) -> list[Any]:
    """The records of this run's own workers. A last line that a kill cut off is ignored."""
    records = []
    for line in lines:
        try:
            records.append(pickle.loads(base64.b64decode(line, validate=True)))
        except Exception:  # what unpickling raises depends on where the line was cut
            continue
    return records


def add(results: Results, records: Iterable[Any]) -> None:
    """Add records to `results`. Of a case measured twice the last measurement counts.

    Raises:
        ValueError: a record contradicts itself and would make the whole file unreadable. The others are added.
    """
    wrong = None
    for record in records:
        if isinstance(record, SuiteRecord):
            results.tests = record
            continue
        found = getattr(results, FIELDS[type(record)])
        if isinstance(record, Timed):
            try:
                check_record(record, results.dry_run, f"{type(record).__name__} {record.case} {record.lane}")
            except ValueError as error:
                wrong = error
                continue
            found[:] = [other for other in found if _key(other) != _key(record)]
        found.append(record)
    if wrong:
        raise wrong
