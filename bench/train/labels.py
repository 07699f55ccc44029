"""Orders and counts the labels of a file, and detects doubtful ones."""

import re
from collections import Counter
from collections.abc import Iterator

from bench.train.file import File, Row, clip

_WHOLE = re.compile(r"[+-]?[0-9]{1,15}(\.0+)?")
_FRACTION = re.compile(r"[+-]?[0-9]*[.,][0-9]+([eE][+-]?[0-9]+)?")
SHOWN = 20
FEW_ROWS = 5  # rows per label, on average
FEWEST_ROWS, MOST_DIFFERENT = 10, 0.8  # with at least so many rows, no column of labels has this many different labels per row


def of_rows(rows: list[Row]) -> Iterator[str]:
    """Every label of every row; for multiple choice the number of the right ending."""
    for row in rows:
        if "label" in row:
            yield row["label"]
        if "choice" in row:
            yield str(row["choice"])
        yield from row.get("tags", ())


def in_order(found: set[str]) -> list[str]:
    """Labels in order: numeric if all are numbers, otherwise alphabetic."""
    numbers = all(_WHOLE.fullmatch(name) for name in found)
    return sorted(found, key=lambda name: (float(name) if numbers else 0.0, name))


def check_classes(file: File, rows: list[Row]) -> None:
    """Raise InputError if labels are scores, or nearly as many as rows."""
    found = Counter(row["label"] for row in rows)
    scores = [name for name in found if _FRACTION.fullmatch(name) and not _WHOLE.fullmatch(name)]
    numbers = len(scores) + sum(_WHOLE.fullmatch(name) is not None for name in found)
    if scores and (numbers == len(found) or 2 * len(scores) >= len(found)):
        few = ", ".join(sorted(scores, key=lambda name: (len(name), name))[:3])
        file.refuse(f"has numbers with fractions as labels ({few}): scores, not classes; round them, or name the classes")
    if len(rows) >= FEWEST_ROWS and len(found) > MOST_DIFFERENT * len(rows):
        file.refuse(
            f"has {len(found)} labels in {len(rows)} rows, the first {clip(rows[0]['label'])!r}: "
            "--columns label=NAME (or NUMBER) says which column has the labels"
        )


def lines(rows: list[Row], option: str = "--data") -> list[str]:
    """Lines about the labels to print before training: their counts, and a warning if they are many for few rows."""
    counts = Counter(of_rows(rows))
    if not counts:
        return []
    ordered = in_order(set(counts))
    shown = ", ".join(f"{clip(name)} ({counts[name]:,})" for name in ordered[:SHOWN])
    more = f", and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    of_what = "words" if "tags" in rows[0] else "rows"
    total = counts.total()
    found = [f"{option}: {total:,} {of_what}, labels found: {shown}{more}"]
    if len(ordered) > 2 and len(ordered) * FEW_ROWS > total and "choice" not in rows[0]:
        found.append(f"warning: {len(ordered)} labels are many for {total} {of_what}; are these the labels?")
    return found
