"""Reads words with one label each: CoNLL's columns, or one sentence per line."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from bench.train.columns import chosen_columns
from bench.train.file import File, Row, clip
from bench.train.names import by_name
from bench.train.words import without_places, without_prefix

ROLES = ("word", "label")
COLUMN_SUFFIXES = (".conll", ".bio", ".iob", ".bioes", ".bmes", ".bilou", ".conllu", ".conll03")
EXPECTED = "expected CoNLL's columns (a word and its label per line), or words<TAB>labels"
ASK = "--columns word=NUMBER,label=NUMBER selects others"
_BLANKS = " \t\xa0\u3000"
_TAG = re.compile(r"O|[BIESLUM][-_].+")
_GOES_ON = re.compile(r"[IEML][-_].+")  # a tag inside an entity that began before
_SPAN = re.compile(r"[0-9]+[-.][0-9]+")  # CoNLL-U: several words written as one, and omitted words
_NUMBERED = re.compile(r"[0-9][0-9.,:/-]*")
CONLL_U = 10  # number of columns


@dataclass(frozen=True)
class Line:
    """The line of one word."""

    number: int
    cells: list[str]
    sentence: int  # number of its sentence in the file


def ner(file: File) -> list[Row]:
    """Read `characters-or-words<TAB>labels separated by spaces`, or CoNLL's columns with empty lines between sentences."""
    if file.json_lines() is not None or file.path.suffix.lower() in (".json", ".jsonl"):
        file.refuse(f"is JSON or JSON lines; {EXPECTED}")
    lines = [line for _, line in file.lines() if line.strip()]
    if "\t" not in file.text and (file.path.suffix.lower() == ".csv" or all("," in line for line in lines)):
        file.refuse(f"is comma-separated; {EXPECTED}")
    if all("/" in cell[1:] for line in lines for cell in line.split()):
        file.refuse(f"has words and labels with a slash between; {EXPECTED}")
    if file.path.suffix.lower() not in COLUMN_SUFFIXES and any(_holds_labels(line) for line in lines):
        return _sentences(file)
    return _columns(file)


def _holds_labels(line: str) -> bool:
    """Whether the last cell has several labels."""
    return not line.startswith("#") and "\t" in line and " " in line.rpartition("\t")[2].strip()


def _sentences(file: File) -> list[Row]:
    rows = []
    for number, line in file.lines():
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if not rows and len(cells) == len(ROLES) and by_name("word", cells[:1]) and by_name("tag", cells[1:]):
            continue
        if len(cells) != len(ROLES):
            file.fail(number, f"expected 2 columns (text, labels), got {len(cells)}: {clip(line)!r}")
        for name, cell in zip(("text", "labels"), cells, strict=True):
            if not cell:
                file.fail(number, f"the column {name} is empty")
        rows.append(_tagged(file, number, *cells))
    _refuse_labels_first(file, [word for row in rows for word in row["words"]], [tag for row in rows for tag in row["tags"]])
    return rows


def _tagged(file: File, number: int, text: str, labels: str) -> Row:
    words, tags = text.split(), labels.split()
    if len(words) != len(tags):
        if len(characters := list("".join(words))) != len(tags):
            fits = f"{len(words)} words or {len(characters)} characters"
            file.fail(number, f"{len(tags)} labels do not fit {fits}")
        words = characters
    return {"row": number, "words": words, "tags": tags}


def _columns(file: File) -> list[Row]:
    lines = _lines(file)
    if not lines:
        return []
    header = _header(file, lines)
    body = lines[1:] if header else lines
    if not body:
        return []
    word, label, body = _places(file, lines[0].cells, header, body)
    texts = [line for line in body if " " in line.cells[word].strip()]
    if len(texts) > len(body) / 2:
        shown = clip(texts[0].cells[word])
        file.fail(texts[0].number, f"{shown!r} has one label for several words; {EXPECTED}, or --task classification")
    rows: dict[int, Row] = {}
    for line in body:
        row = rows.setdefault(line.sentence, {"row": line.number, "words": [], "tags": []})
        row["words"].append(line.cells[word])
        row["tags"].append(line.cells[label])
    found = without_prefix(file, without_places(file, list(rows.values())))
    if len(lines[0].cells) == len(ROLES) and len(found) == 1 and _one_word_rows(file, **found[0]):
        file.note("no empty line separates sentences and no label continues the previous one: each line is a row of its own")
        pairs = zip(body, found[0]["words"], found[0]["tags"], strict=True)
        return [{"row": line.number, "words": [one], "tags": [tag]} for line, one, tag in pairs]
    return found


def _lines(file: File) -> list[Line]:
    """The lines with words, without comments, document marks and empty lines."""
    found: list[Line] = []
    doubtful: list[tuple[Line, str]] = []
    sentence = 0
    for number, line in file.lines():
        cells = _cells(line)
        if not cells or cells[0].startswith("-DOCSTART-"):
            sentence += 1
            continue
        word = Line(number, cells, sentence)
        if line.startswith("#") or len(cells) == 1:
            doubtful.append((word, line[0]))
        else:
            found.append(word)
    widths = Counter(len(line.cells) for line in found)
    width = widths.most_common(1)[0][0] if widths else 0
    labels = {line.cells[-1] for line in found}
    for line, begin in doubtful:
        if len(line.cells) == 1 and begin != "#":
            if width != len(ROLES) or begin not in _BLANKS or line.cells[0] not in labels:
                file.fail(line.number, f"expected a word and a label, got {clip(line.cells[0])!r}")
            found.append(Line(line.number, [begin, line.cells[0]], line.sentence))
        elif len(line.cells) == width and (line.cells[-1] in labels or _TAG.fullmatch(line.cells[-1])):
            found.append(line)  # a word that is or begins with a hash
    for line in found:
        if len(line.cells) != width:
            shown = f"{len(line.cells)} columns, but most rows have {width}: {clip(' '.join(line.cells))!r}"
            file.fail(line.number, f"{shown}; tabs between columns keep spaces inside words")
    return sorted(found, key=lambda line: line.number)


def _cells(line: str) -> list[str]:
    """The cells of a line, split at tabs, otherwise at spaces. A word may itself be a space, as in one row of MSRA's corpus."""
    if not line.strip():
        return []
    if "\t" not in line:
        return [cell for cell in line.split(" ") if cell]
    cells = [cell.strip() for cell in line.rstrip().split("\t")]
    return [cells[0] or " ", *(cell for cell in cells[1:] if cell)]


def _header(file: File, lines: list[Line]) -> bool:
    """Whether the first line names the columns: by known names, or by a last cell that alone is not a tag."""
    first, others = lines[0].cells, {line.cells[-1] for line in lines[1:]}
    names = bool(by_name("tag", first) and by_name("word", first))
    if first[-1] in others:
        return False
    if not names and not (not _TAG.fullmatch(first[-1]) and "O" in others and _all_tags(others)):
        return False
    file.note(f"row {lines[0].number} ({', '.join(map(clip, first))}) names the columns")
    return True


def _places(file: File, first: list[str], header: bool, body: list[Line]) -> tuple[int, int, list[Line]]:
    """The columns of word and label, and the lines with words. Default: the first column after a counter, and the last."""
    width = len(first)
    counted = [line for line in body if not _SPAN.fullmatch(line.cells[0])]
    if width <= len(ROLES) or not _counts(counted):
        counted = body
    word = 1 if width > len(ROLES) and _counts(counted) else 0
    label = width - 1
    if header and not file.columns:
        words, tags = by_name("word", first), by_name("tag", first)
        word, label = (words[0] if words else word), (tags[0] if tags else label)
    for role, value in (chosen_columns(file, ROLES) if file.columns else {}).items():
        if header and value in first:
            place = first.index(value)
        elif re.fullmatch(r"[0-9]{1,3}", value) and 0 < int(value) <= width:
            place = int(value) - 1
        else:
            file.refuse(f"has no column {clip(value)!r} for --columns; its rows have {width}")
        word, label = (place, label) if role == "word" else (word, place)
    if word == label:
        file.refuse(f"has word and label in one column; {ASK}")
    if not file.columns:
        _refuse_labels_first(file, [line.cells[word] for line in counted], [line.cells[label] for line in counted])
        if word == 0 and width > len(ROLES) and all(_NUMBERED.fullmatch(line.cells[0]) for line in counted):
            file.refuse(f"has numbers in column 1, no words: {ASK}")
        same = len(counted) > 1 and len({line.cells[word] for line in counted}) == 1
        if same and width > len(ROLES):
            shown = clip(counted[0].cells[word])
            file.refuse(f"has {shown!r} in column {word + 1} of each row: {ASK}")
        if word and width == CONLL_U and not _all_tags(line.cells[label] for line in counted):
            file.refuse("is CoNLL-U, whose last column has no label: --columns word=2,label=4 selects the part of speech")
        tagged = [place for place in range(width) if place != word and _all_tags(line.cells[place] for line in counted)]
        if label not in tagged and len(tagged) == 1:
            file.refuse(f"seems to have its labels in column {tagged[0] + 1}: --columns word={word + 1},label={tagged[0] + 1}")
        if word or width > len(ROLES):
            taken = f"of {width} columns, {word + 1} is the word and {label + 1} the label"
            file.note(f"{taken}; {ASK}")
    return word, label, counted


def _refuse_labels_first(file: File, words: list[str], tags: list[str]) -> None:
    if _all_tags(words) and not _all_tags(tags):
        file.refuse(f"has labels before the words; {EXPECTED}, or, for columns, --columns word=2,label=1")


def _all_tags(cells: Iterable[str]) -> bool:
    return all(_TAG.fullmatch(cell) for cell in cells)


def _counts(lines: list[Line]) -> bool:
    """Whether the first column counts up by one within each sentence."""
    before: Line | None = None
    for line in lines:
        if not re.fullmatch(r"[0-9]{1,9}", line.cells[0]):
            return False
        number = int(line.cells[0])
        if before and before.sentence == line.sentence and number != int(before.cells[0]) + 1:
            return False
        before = line
    return bool(lines)


def _one_word_rows(file: File, row: int, words: list[str], tags: list[str]) -> bool:
    """Whether lines without empty lines between them are one-word sentences rather than words of one sentence."""
    if file.path.suffix.lower() in COLUMN_SUFFIXES or "\t" not in file.text:
        return False
    return not any(map(_GOES_ON.fullmatch, tags)) and any(len(word) > 1 for word in words)
