"""Reads SQuAD's JSON. Questions whose answers are not at the stated position are left out and counted."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from bench.train.file import File, Row

EXPECTED = """SQuAD's {"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}"""
MISPLACED = "with no answer at the stated position"
UNANSWERED = "without an answer, in a file that is not version 2"
NO_CONTEXT = "about an empty context"


def qa(file: File) -> list[Row]:
    """Read SQuAD's JSON, version 1 or 2. In version 2 a question without answers is one that the text does not answer."""
    data = file.json(EXPECTED)
    found = list(_questions(file, data))
    if not found:
        file.refuse("has no questions in it")
    has_none = str(data.get("version", "")).lstrip("v").startswith("2") or any("is_impossible" in q for _, _, q in found)
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for number, (place, context, question) in enumerate(found, 1):
        row, reason = _row(file, number, place, context, question, has_none)
        if row:
            rows.append(row)
        else:
            left_out[reason] += 1
            examples.setdefault(reason, f"the first is row {number}, {place}")
    for reason, count in left_out.items():
        line = f"{count} of {len(found)} questions {reason}"
        if not rows:
            file.refuse(f"has no usable question: {line}; {examples[reason]}")
        file.note(f"{line}: left out; {examples[reason]}")
    return rows


def _row(file: File, number: int, place: str, context: str, question: dict[str, Any], has_none: bool) -> tuple[Row | None, str]:
    """A question as a row, or the reason why it is left out."""
    text, answers = question.get("question"), question.get("answers", [])
    if not isinstance(text, str) or not text.strip():
        file.fail(number, f"{place} has no field 'question'")
    if not isinstance(answers, list):
        file.fail(number, f"{place}: expected a list of answers")
    pairs = []
    for answer in answers:
        start, words = (answer.get(name) for name in ("answer_start", "text")) if isinstance(answer, dict) else (0, 0)
        if not isinstance(words, str) or type(start) is not int:
            file.fail(number, f"{place}: an answer needs the fields 'text' and 'answer_start'")
        pairs.append((start, words))
    if not context.strip():
        return None, NO_CONTEXT
    if question.get("is_impossible") is True:
        pairs = []
    elif not pairs and not has_none:
        return None, UNANSWERED
    right = [(start, words) for start, words in pairs if words.strip() and start >= 0 and context.startswith(words, start)]
    if pairs and not right:
        return None, MISPLACED
    row = {"row": number, "question": text, "context": context}
    return row | {"starts": [start for start, _ in right], "answers": [words for _, words in right]}, ""


def _questions(file: File, data: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield place, context and question; each level is checked for the fields that the next one needs."""
    number = 0

    def listed(owner: Any, name: str, place: str) -> list[Any]:
        found = owner.get(name) if isinstance(owner, dict) else None
        if not isinstance(found, list):
            file.fail(number + 1, f"{place} has no list {name!r}; expected {EXPECTED}")
        return found

    for i, article in enumerate(listed(data, "data", "the file")):
        for j, paragraph in enumerate(listed(article, "paragraphs", f"data[{i}]")):
            place = f"data[{i}].paragraphs[{j}]"
            for k, question in enumerate(listed(paragraph, "qas", place)):
                context = paragraph.get("context")
                if not isinstance(context, str):
                    file.fail(number + 1, f"{place} has no field 'context'")
                if not isinstance(question, dict):
                    file.fail(number + 1, f"{place}.qas[{k}]: expected an object")
                yield f"{place}.qas[{k}]", context, question
                number += 1
