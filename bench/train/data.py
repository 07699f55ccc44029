"""Reads users' files into rows. An error is one line that names the file and the row.

A row is a dictionary whose "row" is its number in the file (that of its first line, or of the question in SQuAD's JSON).
"""

from collections.abc import Callable
from pathlib import Path

from bench.train import labels
from bench.train.conll import ner
from bench.train.file import File, Row, Say
from bench.train.squad import qa
from bench.train.tables import classification, matching, multiple_choice
from fastbert.errors import InputError

CLASSES = ("classification", "matching")


def documents(file: File) -> list[Row]:
    """Read plain text: documents separated by empty lines, one sentence per line."""
    if _is_json(file):
        file.refuse("is JSON lines; expected plain text, one text per line")
    rows: list[Row] = []
    inside = False
    for number, line in file.lines():
        if not line.strip():
            inside = False
            continue
        if not inside:
            rows.append({"row": number, "sentences": []})
            inside = True
        rows[-1]["sentences"].append(line.strip())
    return rows


def _is_json(file: File) -> bool:
    try:
        return file.json_lines() is not None
    except InputError:  # some lines are JSON; a text may quote it
        return False


def texts(file: File) -> list[Row]:
    """Read plain text: one text per document if empty lines separate documents, otherwise one text per line."""
    found = documents(file)
    if len(found) > 1:
        return [{"row": row["row"], "text": " ".join(row["sentences"])} for row in found]
    return [{"row": number, "text": line.strip()} for number, line in file.lines() if line.strip()]


READERS: dict[str, Callable[[File], list[Row]]] = {
    "classification": classification,
    "matching": matching,
    "ner": ner,
    "qa": qa,
    "multiple-choice": multiple_choice,
    "mlm": texts,
    "clm": texts,
    "pretraining": documents,
}


def read(task: str, path: Path, option: str = "--data", columns: str = "", say: Say | None = None) -> list[Row]:
    """Read the rows of a file for `task`. `say` gets the notes, one line each; `columns` is the option of that name.

    Raises:
        InputError: the file cannot be read; the message names the row.
    """
    file = File(path, option, columns)
    rows = READERS[task](file)
    if not rows:
        raise InputError(f"{option}: {path} has no rows in it")
    if task in CLASSES:
        labels.check_classes(file, rows)
    for note in file.notes if say else ():
        say(note)
    return rows
