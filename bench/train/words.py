"""Removes marks that corpora attach to words."""

import re

from bench.train.file import File, Row

_PLACED = re.compile(r"(.+?)([0-9]{1,3})", re.DOTALL)
FEWEST_PLACED = 0.999  # share of the words; Weibo NER has one error


def without_places(file: File, rows: list[Row]) -> list[Row]:
    """Remove the position in its word that Weibo NER appends to each character: 0, or one more than the one before."""
    total = fit = 0
    beyond_ascii = False
    for row in rows:
        before = -1
        for word in row["words"]:
            found = _PLACED.fullmatch(word)
            if found is None:
                return rows
            place = int(found[2])
            total, fit = total + 1, fit + (place in (0, before + 1))
            before, beyond_ascii = place, beyond_ascii or not found[1].isascii()
    if not beyond_ascii or fit < FEWEST_PLACED * total:
        return rows
    file.note("each character is followed by its position in its word: left out")
    return [row | {"words": [_PLACED.fullmatch(word)[1] for word in row["words"]]} for row in rows]


def without_prefix(file: File, rows: list[Row]) -> list[Row]:
    """Remove the language that WikiANN writes before each word."""
    found = re.match(r"[a-z]{2,3}(-[a-z]+)*:", rows[0]["words"][0])
    if found is None or not all(word.startswith(found[0]) for row in rows for word in row["words"]):
        return rows
    file.note(f"each word begins with {found[0]!r}: left out")
    return [row | {"words": [word.removeprefix(found[0]) for word in row["words"]]} for row in rows]
