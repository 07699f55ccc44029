"""Turns the command's options into settings. Contradictory options raise a one-line error."""

import math
from importlib.util import find_spec
from typing import Any

from bench.stream.reader import READERS
from bench.train.records import Settings
from fastbert.errors import InputError

NEEDED = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "matplotlib": "matplotlib",
    "pandas": "pandas",
    "pydantic": "pydantic",
    "seqeval": "seqeval",
    "sklearn": "scikit-learn",
    "triton": "triton",
}
SHORTEST = 8  # smallest --max-length in tokens: a pair with its three special tokens, and some text
WITH_COLUMNS = ("classification", "matching", "ner", "multiple-choice")  # tasks whose files have columns
IN_WINDOWS = ("classification", "matching")  # tasks whose long texts may be read in windows
MASKED = ("mlm", "pretraining")  # tasks that predict masked tokens
PIECES = ("mlm", "clm")  # tasks whose texts may be split
SEEDS = 1 << 32  # NumPy's seeds are below
# The largest values of options that count something, far above any run and within what torch and Trainer can count.
MOST = dict.fromkeys(("steps", "eval_steps", "save_steps", "patience"), 10**9) | {
    **dict.fromkeys(("batch", "accumulation"), 1 << 20),
    **dict.fromkeys(("max_length", "stride", "max_windows", "readers"), 1 << 20),
}


def require() -> None:
    """Raise InputError if packages are missing, with their names."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise InputError(f"not installed: {', '.join(missing)}; to fix: pip install {' '.join(missing)}")


def settings(gpu: bool, **options: Any) -> Settings:
    """The settings of a run, with the defaults that depend on others.

    Raises:
        InputError: an option is out of its range, or the options contradict each other or do not suit this machine.
    """
    _check_ranges(options)
    options["dtype"] = options["dtype"] or ("bf16" if gpu else "fp32")
    if options.get("stream"):
        options["readers"] = options.get("readers") or READERS
    made = Settings(**options | _intervals(**{name: options[name] for name in _INTERVALS}))
    if made.dtype != "fp32" and not gpu:
        raise InputError(f"--dtype {made.dtype}: needs a GPU; only fp32 works without one")
    if 0 < made.max_length < SHORTEST:
        raise InputError(f"--max-length: expected {SHORTEST} or more, got {made.max_length}")
    if made.columns and made.task not in WITH_COLUMNS:
        raise InputError(f"--columns: a file for {made.task} has no columns; {', '.join(WITH_COLUMNS)} do")
    if made.truncation == "split" and made.task not in PIECES:
        raise InputError(f"--truncation split: cuts the texts of mlm and clm into pieces, not those of {made.task}")
    if made.truncation and made.task == "qa":
        raise InputError("--truncation: qa cuts long contexts into overlapping windows, so that no answer is lost")
    _check_windows(made)
    _check_stream(made)
    return made


def _check_ranges(options: dict[str, Any]) -> None:
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{option}: expected a finite number, got {value}")
        if name in MOST and value is not None and value > MOST[name]:
            raise InputError(f"{option}: expected at most {MOST[name]}, got {value}")
    if not 0 <= options.get("seed", 0) < SEEDS:
        raise InputError(f"--seed: expected 0 to {SEEDS - 1}, got {options['seed']}")
    if options.get("eval_share") == 0 and not options.get("eval_data"):
        raise InputError("--eval-share: expected more than 0, because every run ends with an evaluation; or give --eval-data")


def _check_stream(made: Settings) -> None:
    if made.task not in MASKED and (made.stream or made.whole_words):
        name = "--stream" if made.stream else "--whole-words"
        raise InputError(f"{name}: is for {' and '.join(MASKED)}, not for {made.task}")
    if made.readers and not made.stream:
        raise InputError("--readers: share the shards of --stream")
    if made.stream and made.truncation:
        raise InputError("--truncation: a stream cuts nothing but sentences that are longer than a row")


def _check_windows(made: Settings) -> None:
    of_several = {"stride": made.stride is not None, "pooling": made.pooling, "max-windows": made.max_windows}
    if made.windows != "overlap" and any(of_several.values()):
        name = next(name for name, given in of_several.items() if given)
        raise InputError(f"--{name}: is about the windows that --windows overlap makes")
    if made.windows and made.task not in IN_WINDOWS:
        raise InputError(f"--windows: reads the texts of {' and '.join(IN_WINDOWS)}, not those of {made.task}")
    if made.windows and made.truncation:
        raise InputError("--truncation: with --windows nothing else is cut; --windows head, tail or head+tail keep that part")


_INTERVALS = ("steps", "eval_steps", "save_steps", "patience")


def _intervals(steps: int, eval_steps: int, save_steps: int, patience: int) -> dict[str, int]:
    """Set the intervals. Early stopping needs evaluations, each with a checkpoint, to return to the best one."""
    if patience:
        eval_steps = eval_steps or max(steps // 10, 1)
        save_steps = save_steps or eval_steps
        if save_steps % eval_steps:
            wanted = f"with --patience, expected a multiple of --eval-steps ({eval_steps})"
            raise InputError(f"--save-steps: {wanted}, got {save_steps}")
    return {"eval_steps": eval_steps, "save_steps": save_steps}
