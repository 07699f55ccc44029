"""Reads what a run has left in --out, for --resume: its settings, the lanes that it finished, and checkpoints.

These files may be damaged, or made by somebody else. Everything is checked, and the pickles of a checkpoint (optimizer,
schedule, random bits) are loaded by torch with `weights_only`, which makes tensors and plain values and runs no code.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

from bench.core.schema import parse
from bench.train.records import LaneRecord
from fastbert.errors import InputError

Kind = TypeVar("Kind")
COMPLETE = "trainer_state.json"  # the file that Trainer writes last into a checkpoint


@dataclass
class _State:
    """The entries of trainer_state.json that are read; what Trainer writes beside them is ignored."""

    __pydantic_config__ = {"extra": "ignore", "strict": True}
    global_step: int
    epoch: float
    log_history: list[dict[str, Any]]
    stateful_callbacks: dict[str, Any]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: there is none in the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--resume: {path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"--resume: {path}: expected a JSON object, got {type(found).__name__}")
    return found


def _read(kind: type[Kind], path: Path, where: str) -> Kind:
    try:
        return parse(kind, path.read_bytes(), where)
    except (OSError, ValueError) as error:
        raise InputError(f"--resume: {path} cannot be read: {error}") from None


def read_lane(path: Path, lane: str, steps: int) -> LaneRecord:
    """The record of a lane that was finished.

    Raises:
        InputError: the file cannot be read, or has no such record of a run of so many steps.
    """
    found = _read(LaneRecord, path, "lane")
    if found.lane != lane:
        raise InputError(f"--resume: {path}: expected the lane {lane!r}, got {found.lane!r}")
    if not 0 < len(found.losses) <= steps:
        raise InputError(f"--resume: {path}: expected 1 to {steps} losses, got {len(found.losses)}")
    if not 0 <= found.resumed_at <= len(found.losses) or len(found.checksums) < len(found.losses) - found.resumed_at:
        raise InputError(f"--resume: {path}: its checksums do not go with its {len(found.losses)} losses")
    return found


def checkpoints(folder: Path) -> dict[int, Path]:
    """The lane's complete checkpoints by step."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    found = {path.name.removeprefix("checkpoint-"): path for path in sorted(complete)}
    return {int(step): path for step, path in found.items() if step.isdecimal() and step.isascii()}


def last_checkpoint(folder: Path, steps: int) -> str | None:
    """The last checkpoint before the final step: resumed from the final one, Trainer would take one step too many.

    Raises:
        InputError: its state cannot be read, or is that of another step.
    """
    found = {step: path for step, path in checkpoints(folder).items() if step < steps}
    if not found:
        return None
    step = max(found)
    path = found[step] / COMPLETE
    state = _read(_State, path, "state")
    if state.global_step != step:
        raise InputError(f"--resume: {path}: expected global_step {step}, got {state.global_step}")
    for i, entry in enumerate(state.log_history):
        numbers = {name: entry[name] for name in ("step", "loss", "eval_loss") if name in entry}
        if type(entry.get("step")) is not int or not all(type(value) in (int, float) for value in numbers.values()):
            raise InputError(f"--resume: {path}: log_history[{i}]: expected numbers, got {str(numbers)[:60]}")
    return str(found[step])


def step_of(checkpoint: str) -> int:
    """The step behind which a checkpoint was written."""
    return int(Path(checkpoint).name.removeprefix("checkpoint-"))


@contextmanager
def loading(checkpoint: str | None) -> Iterator[None]:
    """Make one line out of whatever torch, safetensors or Trainer raise on a damaged checkpoint.

    Raises:
        InputError: instead of those.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, UnpicklingError):
            said = "a file in it is damaged, or would run code, which is not done: fastbert loads plain values alone"
        else:
            said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ")
        raise InputError(f"--resume: {checkpoint} cannot be loaded: {said}") from None
