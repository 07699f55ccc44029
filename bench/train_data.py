"""The files that BERT users have, read into rows. Whatever is wrong with one is a line that names the file and the row.

A row is a dictionary with "row", its number in the file (of its first line, or of the question in SQuAD's JSON).
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from fastbert.errors import InputError

Row = dict[str, Any]

COLUMN_SUFFIXES = (".conll", ".bio", ".iob")
FEWEST_ENDINGS = 2


class File:
    """A text file with the option that named it, for its errors."""

    def __init__(self, path: Path, option: str = "--data") -> None:
        self.path, self.option = path, option
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{option}: cannot read {path}: {error.strerror}") from None
        try:
            self.text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.fail(data.count(b"\n", 0, error.start) + 1, "not UTF-8")
        if not self.text.strip():
            raise InputError(f"{option}: {path} is empty")

    def fail(self, row: int, what: str) -> NoReturn:
        raise InputError(f"{self.option}: {self.path}, row {row}: {what}")

    def lines(self) -> Iterator[tuple[int, str]]:
        """Row number and text of every line, empty ones included. Only line feeds end a line, as in an editor."""
        for number, line in enumerate(self.text.split("\n"), 1):
            yield number, line.rstrip("\r")

    def cells(self, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
        """The lines as tab-separated cells, quotes as they stand; a first line that names the columns is left out."""
        for number, line in self.lines():
            if not line.strip():
                continue
            cells = [cell.strip() for cell in line.split("\t")]
            if number == 1 and cells[-1].lower() == columns[-1]:
                continue
            if len(cells) != len(columns):
                self.fail(number, f"expected {len(columns)} columns ({', '.join(columns)}), got {len(cells)}: {line[:40]!r}")
            for name, cell in zip(columns, cells, strict=True):
                if not cell:
                    self.fail(number, f"the column {name} is empty")
            yield number, cells


def classification(file: File) -> list[Row]:
    """`text<TAB>label`."""
    return [{"row": n, "text": text, "label": label} for n, (text, label) in file.cells(("text", "label"))]


def matching(file: File) -> list[Row]:
    """`text_a<TAB>text_b<TAB>label`."""
    rows = file.cells(("text_a", "text_b", "label"))
    return [{"row": n, "text": text, "second": second, "label": label} for n, (text, second, label) in rows]


def ner(file: File) -> list[Row]:
    """`characters-or-words<TAB>labels separated by spaces`, or CoNLL's columns with an empty line between sentences."""
    in_rows = any(" " in line.rpartition("\t")[2].strip() for _, line in file.lines() if "\t" in line)
    if in_rows and file.path.suffix not in COLUMN_SUFFIXES:
        return [_tagged(file, number, *cells) for number, cells in file.cells(("text", "labels"))]
    return _without_positions(_columns(file))


def _tagged(file: File, number: int, text: str, labels: str) -> Row:
    words, tags = text.split(), labels.split()
    if len(words) != len(tags):
        if len(characters := list("".join(words))) != len(tags):
            fits = f"{len(words)} words or {len(characters)} characters"
            file.fail(number, f"{len(tags)} labels do not fit {fits}")
        words = characters
    return {"row": number, "words": words, "tags": tags}


def _columns(file: File) -> list[Row]:
    """The first column is the word, the last its label."""
    rows: list[Row] = []
    inside = False
    for number, line in file.lines():
        cells = [cell for cell in (line.split("\t") if "\t" in line else line.split()) if cell.strip()]
        if not cells or cells[0] == "-DOCSTART-":
            inside = False
            continue
        if len(cells) < 2:
            file.fail(number, f"expected a word and a label, got {line[:40]!r}")
        if not inside:
            rows.append({"row": number, "words": [], "tags": []})
            inside = True
        rows[-1]["words"].append(cells[0].strip())
        rows[-1]["tags"].append(cells[-1].strip())
    return rows


def _without_positions(rows: list[Row]) -> list[Row]:
    """Weibo NER writes each character's place in its word behind it; where all words have such a digit it goes."""
    if all(len(word) > 1 and word[-1].isdigit() for row in rows for word in row["words"]):
        return [row | {"words": [word[:-1] for word in row["words"]]} for row in rows]
    return rows


def qa(file: File) -> list[Row]:
    """SQuAD's JSON, version 1 or 2. A question without answers is one that the text does not answer."""
    try:
        data = json.loads(file.text)
    except ValueError as error:
        file.fail(getattr(error, "lineno", 1), f"not JSON: {error}")
    rows: list[Row] = []
    for place, context, question in _questions(file, data):
        number = len(rows) + 1
        text, answers = question.get("question"), question.get("answers", [])
        if not isinstance(text, str) or not text.strip():
            file.fail(number, f"{place} has no field 'question'")
        if not isinstance(answers, list):
            file.fail(number, f"{place}: expected a list of answers")
        for answer in answers:
            start, words = (answer.get(name) for name in ("answer_start", "text")) if isinstance(answer, dict) else (0, 0)
            if not isinstance(words, str) or not words or type(start) is not int:
                file.fail(number, f"{place}: an answer needs the fields 'text' and 'answer_start'")
            if start < 0 or context[start : start + len(words)] != words:
                file.fail(number, f"{place}: the answer {words[:40]!r} does not stand at {start} in its context")
        rows.append(
            {
                "row": number,
                "question": text,
                "context": context,
                "starts": [answer["answer_start"] for answer in answers],
                "answers": [answer["text"] for answer in answers],
            }
        )
    if not rows:
        raise InputError(f"{file.option}: {file.path} has no questions in it")
    return rows


def _questions(file: File, data: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Place, context and question, each checked for what the next level needs."""
    number = 0

    def listed(owner: Any, name: str, place: str) -> list[Any]:
        found = owner.get(name) if isinstance(owner, dict) else None
        if not isinstance(found, list):
            file.fail(number + 1, f"{place} has no list {name!r}")
        return found

    for i, article in enumerate(listed(data, "data", "the file")):
        for j, paragraph in enumerate(listed(article, "paragraphs", f"data[{i}]")):
            place = f"data[{i}].paragraphs[{j}]"
            for k, question in enumerate(listed(paragraph, "qas", place)):
                context = paragraph.get("context")
                if not isinstance(context, str) or not context.strip():
                    file.fail(number + 1, f"{place} has no field 'context'")
                if not isinstance(question, dict):
                    file.fail(number + 1, f"{place}.qas[{k}]: expected an object")
                yield f"{place}.qas[{k}]", context, question
                number += 1


def multiple_choice(file: File) -> list[Row]:
    """CSV with a first line: `context`, two or more columns that begin with `ending`, `label` (which one, from 0)."""
    reader = csv.reader(io.StringIO(file.text, newline=""), strict=True)
    rows: list[Row] = []
    header: list[str] | None = None
    number = 1
    try:
        for cells in reader:
            first, number = number, reader.line_num + 1  # a quoted cell may hold line ends
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _header(file, first, [cell.strip().lower() for cell in cells])
            elif len(cells) != len(header):
                file.fail(first, f"expected {len(header)} columns ({', '.join(header)}), got {len(cells)}")
            else:
                rows.append(_choice(file, first, header, cells))
    except csv.Error as error:
        file.fail(reader.line_num, f"not CSV: {error}")
    return rows


def _header(file: File, number: int, header: list[str]) -> list[str]:
    for name in ("context", "label"):
        if name not in header:
            file.fail(number, f"the column {name!r} is missing; the first line names {', '.join(header)[:80]}")
    endings = [name for name in header if name.startswith("ending")]
    if len(endings) < FEWEST_ENDINGS:
        file.fail(number, f"expected two or more columns that begin with 'ending', got {len(endings)}")
    return header


def _choice(file: File, number: int, header: list[str], cells: list[str]) -> Row:
    named = list(zip(header, (cell.strip() for cell in cells), strict=True))
    endings = [cell for name, cell in named if name.startswith("ending")]
    for name, cell in named:
        if not cell and (name == "context" or name.startswith("ending")):
            file.fail(number, f"the column {name} is empty")
    label = dict(named)["label"]
    if not re.fullmatch(r"[0-9]+", label) or int(label) >= len(endings):
        file.fail(number, f"label: expected a number from 0 to {len(endings) - 1}, got {label[:40]!r}")
    return {"row": number, "text": dict(named)["context"], "endings": endings, "choice": int(label)}


def documents(file: File) -> list[Row]:
    """Plain text: documents with an empty line between them, a sentence a line."""
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


def texts(file: File) -> list[Row]:
    """Plain text: a document a text where empty lines part documents, otherwise a line a text."""
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


def read(task: str, path: Path, option: str = "--data") -> list[Row]:
    """The rows of a file for `task`.

    Raises:
        InputError: what cannot be read, with the row where it stands.
    """
    file = File(path, option)
    rows = READERS[task](file)
    if not rows:
        raise InputError(f"{option}: {path} has no rows in it")
    return rows
