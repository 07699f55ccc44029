"""Chooses the sequence lengths of a batch: from a stated distribution, a list of lengths, or a text file.

Lengths are evenly spaced quantiles of the distribution, so all batches and all lanes have the same lengths.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

SIGMA = 0.8  # standard deviation of the logarithm of a text's length
DIGITS = 9  # of a length in a file, at most
SHORTEST = 4  # [CLS], a word, a word, [SEP]
FULL = 1.0


class LengthsError(Exception):
    """A file of lengths or text that cannot be used. The message is one line."""


@dataclass(frozen=True)
class Lengths:
    """Source of lengths. Empty `sizes`: the log-normal with mean fill x S, cut off at S as a tokenizer truncates."""

    name: str = "log-normal"
    sizes: tuple[int, ...] = ()

    def of_batch(self, batch: int, seqlen: int, fill: float) -> list[int]:
        """`batch` lengths from 1 to `seqlen`. Lengths from the distribution have the mean fill x seqlen."""
        if self.sizes:
            return [min(size, seqlen) for size in _quantiles(sorted(self.sizes), batch)]
        return [seqlen] * batch if fill >= FULL else log_normal(batch, seqlen, fill)

    def fill_of(self, batch: int, seqlen: int, fill: float) -> float:
        """The share of real tokens among all positions."""
        return sum(self.of_batch(batch, seqlen, fill)) / (batch * seqlen)


def log_normal(batch: int, seqlen: int, fill: float) -> list[int]:
    """Log-normal lengths, cut off at seqlen, with the median chosen so that their mean is fill x seqlen."""
    steps = [statistics.NormalDist(0.0, SIGMA).inv_cdf((i + 0.5) / batch) for i in range(batch)]

    def lengths(logarithm: float) -> list[int]:
        return [round(min(max(math.exp(logarithm + step), SHORTEST), seqlen)) for step in steps]

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(lengths(middle)) < fill * batch * seqlen else (low, middle)
    return lengths(high)


def _quantiles(ordered: list[int], count: int) -> list[int]:
    return [ordered[int((i + 0.5) / count * len(ordered))] for i in range(count)]


def from_file(path: Path) -> Lengths:
    """Read one length per line.

    Raises:
        LengthsError: the file is missing or empty, or a line is not a positive integer.
    """
    lines = _lines(path, "--lengths")
    for number, line in enumerate(lines, 1):
        if not (line.isascii() and line.isdecimal()) or len(line) > DIGITS or int(line) == 0:
            raise LengthsError(f"--lengths: {path}, line {number}: expected a number of tokens, got {line[:40]!r}")
    return Lengths(path.name, tuple(int(line) for line in lines))


def from_text(path: Path, model: str | None) -> Lengths:
    """Token counts of the lines of a text, by the tokenizer of `model` (default: that of fastbert's demo model).

    Raises:
        LengthsError: the file is missing or empty, or the model cannot be found.
    """
    from fastbert.cli.source import Source
    from fastbert.errors import InputError

    lines = _lines(path, "--data")
    try:
        tokenizer = Source.open(model, path).tokenizer
    except InputError as error:
        raise LengthsError(f"--data: {error}") from None
    encoded = tokenizer(lines, padding=False, truncation=False, verbose=False)["input_ids"]
    return Lengths(path.name, tuple(len(ids) for ids in encoded))


def _lines(path: Path, option: str) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LengthsError(f"{option}: cannot read {path}: {error}") from None
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    if not lines:
        raise LengthsError(f"{option}: {path} is empty")
    return lines
