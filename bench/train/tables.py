"""Reads tables: cells separated by tabs or commas, or JSON lines with one field per column."""

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

from bench.train.columns import NO_AGREEMENT, Cells, Layout, Numbered, chosen, settle
from bench.train.file import File, Row, clip, listed
from bench.train.names import by_name, normal

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
FEWEST_ENDINGS = 2
_ENDING = re.compile(r"ending.*|(choice|option|answer|sol)([0-9]+|[a-h])")


def classification(file: File) -> list[Row]:
    """Read rows of a text and its label."""
    return [{"row": n, "text": text, "label": label} for n, (text, label) in _read(file, ("text", "label"))]


def matching(file: File) -> list[Row]:
    """Read rows of two texts and the label of the pair."""
    rows = _read(file, ("text_a", "text_b", "label"))
    return [{"row": n, "text": text, "second": second, "label": label} for n, (text, second, label) in rows]


def _read(file: File, roles: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row in the order of the roles."""
    named = _records(file)
    rows = named or _table(file)
    layout = settle(file, roles, rows, named is not None)
    if layout.header:
        used = ", ".join(f"{clip(layout.names[place])} ({role})" for role, place in layout.places.items())
        if [normal(layout.names[place]) for place in layout.places.values()] != [normal(role) for role in roles]:
            file.note(f"columns used: {used}")
    header = rows[0][1]
    again = unsettled = 0
    for number, cells in rows[1:] if layout.header else rows:
        if layout.header and list(cells) == list(header):
            again += 1
            continue
        own = _checked(file, number, cells, roles, layout)
        if own[-1] == NO_AGREEMENT and layout.header and normal(layout.names[layout.places["label"]]) == "goldlabel":
            unsettled += 1
            continue
        yield number, own
    if again:
        file.note(f"the header occurs {again} more times among the rows: left out")
    if unsettled:
        file.note(f"{unsettled} rows have the gold label '-', which means that their annotators did not agree: left out")


def _checked(file: File, number: int, cells: Cells, roles: tuple[str, ...], layout: Layout) -> list[str]:
    width = len(layout.names)
    if len(cells) < width or any(cells[width:]):
        shown = clip(" ".join(cell or "" for cell in cells))
        names = listed(layout.names if layout.header else list(roles))
        file.fail(number, f"expected {width} columns ({names}), got {len(cells)}: {shown!r}")
    own = []
    for role in roles:
        cell = cells[layout.places[role]]
        name = layout.names[layout.places[role]] if layout.header else role
        if cell is None:
            file.fail(number, f"{clip(name)}: expected one text or number")
        if not cell:
            file.fail(number, f"the column {clip(name)} is empty")
        own.append(cell)
    return own


def _records(file: File) -> list[Numbered] | None:
    """JSON records as rows under a header of their field names."""
    records = file.json_lines()
    if records is None:
        if file.path.suffix.lower() in JSON_SUFFIXES:
            file.refuse("is neither JSON lines (one object per line) nor a list of objects")
        return None
    names = [name for name in records[0][1] if name]
    rows: list[Numbered] = [(records[0][0], names)]
    for number, record in records:
        rows.append((number, [_cell(file, number, record, name) for name in names]))
    return rows


def _cell(file: File, number: int, record: dict[str, Any], name: str) -> str | None:
    if name not in record:
        file.fail(number, f"there is no field {clip(name)!r}, which the first row has")
    value = record[name]
    if isinstance(value, list | dict):
        return None
    return "" if value is None else str(value).strip()


def _table(file: File, default: str = "\t") -> list[Numbered]:
    """Row number and cells of every line that is not empty. There is at least one."""
    lines = [(number, line) for number, line in file.lines() if line.strip()]
    mark = _separator(file, [line for _, line in lines], default)
    if mark != "\t":
        return list(_quoted(file, mark)) or file.refuse("has no rows in it")
    rows = [(number, [cell.strip() for cell in line.split("\t")]) for number, line in lines]
    return list(_quoted(file, mark)) if _all_quoted([cells for _, cells in rows]) else rows


def _separator(file: File, lines: list[str], default: str) -> str:
    """The separator: tabs, or commas or semicolons if the file is a .csv or has the same number of them in each line."""
    first = lines[0]
    if "\t" in first:
        return "\t"
    if default != "\t" or file.path.suffix.lower() == ".csv":
        return ";" if ";" in first and "," not in first else ","
    if sum("\t" in line for line in lines) > len(lines) / 2:
        return "\t"
    for mark in (",", ";"):
        try:
            widths = {len(cells) for _, cells in _split(file, mark)}
        except csv.Error:
            continue
        # A space after a comma is that of a sentence.
        if len(widths) == 1 and widths != {1} and not any(mark + " " in line for line in lines if '"' not in line):
            return mark
    return default


def _all_quoted(rows: list[list[str]]) -> bool:
    """Whether quotes are part of the format: around all cells of the first row, or around one column of all other rows."""

    def quoted(cell: str) -> bool:
        return len(cell) > 1 and cell[0] == cell[-1] == '"'

    if len(rows[0]) > 1 and all(quoted(cell) for cell in rows[0]):
        return True
    body = rows[1:]
    return len(body) > 1 and any(
        all(place < len(cells) and quoted(cells[place]) for cells in body) for place in range(len(rows[0]))
    )


def _quoted(file: File, mark: str) -> Iterator[Numbered]:
    try:
        yield from _split(file, mark)
    except csv.Error as error:
        what = "not CSV" if mark != "\t" else "not tab-separated cells in quotes"
        file.fail(error.args[1] if len(error.args) > 1 else 1, f"{what}: {error.args[0]}")


def _split(file: File, mark: str) -> Iterator[tuple[int, list[str]]]:
    """Row number and cells. A csv.Error carries the line where the error was noticed."""
    reader = csv.reader(io.StringIO(file.text, newline=""), delimiter=mark, strict=True)
    number = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise csv.Error(str(error), reader.line_num) from None
        if cells is None:
            return
        first, number = number, reader.line_num + 1  # a quoted cell may contain line ends
        if any(cell.strip() for cell in cells):
            yield first, [cell.strip() for cell in cells]


def multiple_choice(file: File) -> list[Row]:
    """Read CSV with a header: `context`, two or more columns that begin with `ending`, and `label` (their index, from 0)."""
    named = _records(file)
    rows = named or _table(file, ",")
    number, first = rows[0]
    names = [(cell or "").strip() for cell in first]
    endings = [place for place, name in enumerate(names) if _ENDING.fullmatch(normal(name))]
    found = {}
    for role, kind in (("context", "context"), ("label", "choice")):
        places = [place for place in by_name(kind, names) if place not in endings]
        if len(places) == 1:
            found[role] = places[0]
        elif not file.columns:
            what = "could be several" if places else "is missing"
            file.fail(
                number, f"the column {role!r} {what}; the first line names {listed(names)}: --columns {role}=NAME says which"
            )
    places = chosen(file, ("context", "label"), names, found, True).places if file.columns else found
    if len(endings) < FEWEST_ENDINGS:
        file.fail(number, f"expected two or more columns that begin with 'ending', got {len(endings)}: {listed(names)}")
    made = [_choice(file, number, names, list(cells), places, endings) for number, cells in rows[1:]]
    if made and names[endings[0]].endswith("1") and all(row["choice"] for row in made):
        counted = f"labels count from 0; if 0 is what {clip(names[endings[0]])} has, call that column ending0"
        file.refuse(f"has no row with the label 0: {counted}")
    return made


def _choice(
    file: File, number: int, names: list[str], cells: list[str | None], places: dict[str, int], endings: list[int]
) -> Row:
    if len(cells) != len(names):
        file.fail(number, f"expected {len(names)} columns ({listed(names)}), got {len(cells)}")
    for place in (places["context"], *endings):
        if not cells[place]:
            file.fail(number, f"the column {clip(names[place])} is empty")
    label = cells[places["label"]] or ""
    if not re.fullmatch(r"[0-9]{1,4}", label) or int(label) >= len(endings):
        file.fail(number, f"label: expected a number from 0 to {len(endings) - 1}, got {clip(label)!r}")
    return {
        "row": number,
        "text": cells[places["context"]],
        "endings": [cells[place] for place in endings],
        "choice": int(label),
    }
