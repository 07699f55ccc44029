"""Finds the columns of a table from explicit statements first, then from the data.

In order: --columns, the names that data sets give their columns (names.py), and the order of the columns unless the rows
contradict it. Every decision that the user did not state is printed before training. If neither names nor rows settle a
question, the file is refused with a line that says how to fix it: an unrecognised header would become a row with a label
of its own. Readers raise InputError only; a test feeds all of them arbitrary text.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from bench.train.file import File, clip, listed
from bench.train.names import VALUES, by_name, counts_rows, normal, pair

Cells = Sequence[str | None]
Numbered = tuple[int, Cells]

LONGEST_NAME, MOST_WORDS = 30, 3
NO_AGREEMENT = "-"  # in SNLI and MNLI: the label of a pair whose annotators did not agree


@dataclass(frozen=True)
class Layout:
    """The column of each role, the names of all columns, and whether the first row is a header."""

    places: dict[str, int]
    names: list[str]
    header: bool


def settle(file: File, roles: tuple[str, ...], rows: list[Numbered], named: bool = False) -> Layout:
    """The layout of a table whose roles are `text` and `label`, or `text_a`, `text_b` and `label`.

    `named`: the first row is known to be a header.

    Raises:
        InputError: the columns cannot be told apart.
    """
    number, first = rows[0]
    names = [cell or "" for cell in first]
    if file.columns:
        layout = chosen(file, roles, names, _known(file, number, roles, names), named)
        if not layout.header:
            _say_if_alone(file, layout, rows)
        return layout
    found = _known(file, number, roles, names)
    if "label" in found and not named and _repeated(rows, found["label"]):
        found = {}
    missing = [role for role in roles if role not in found]
    free = [place for place in range(len(names)) if place not in found.values() and not counts_rows(names[place])]
    if found and missing and len(free) == len(missing) and (named or _short(first)):
        found |= dict(zip(missing, free, strict=True))
        missing = []
    if not missing:
        return Layout({role: found[role] for role in roles}, names, True)
    if named or (found and (_short(first) or len(names) != len(roles))):
        _unknown(file, number, names, missing or list(roles))
    if len(names) != len(roles):
        example = ",".join(f"{role}=NAME" for role in roles)
        hint = (
            f"; --columns {example} (or numbers) says which"
            if len(names) > 1
            else ", separated by tabs, or by commas in a .csv"
        )
        wanted = f"expected {len(roles)} columns ({', '.join(roles)}), got {len(names)}"
        file.fail(number, f"{wanted}: {clip(' '.join(names))!r}{hint}")
    return _by_evidence(file, roles, rows)


def chosen(file: File, roles: tuple[str, ...], names: list[str], found: dict[str, int], named: bool) -> Layout:
    """The layout by --columns, with `found` for roles that it omits. A name makes the first row a header; numbers do not."""
    places, header = {}, named or all(role in found for role in roles)
    for role, value in chosen_columns(file, roles).items():
        if value in names or normal(value) in [normal(name) for name in names]:
            same = [i for i, name in enumerate(names) if name == value] or [
                i for i, name in enumerate(names) if normal(name) == normal(value)
            ]
            places[role], header = same[0], True
        elif re.fullmatch(r"[0-9]{1,4}", value) and 0 < int(value) <= len(names):
            places[role] = int(value) - 1
        else:
            file.refuse(f"has no column {clip(value)!r} for --columns; its first row is {listed(names)}")
    taken = set(places.values())
    for role in roles:
        if role not in places and role in found and found[role] not in taken:
            places[role] = found[role]
    places = {role: places[role] for role in roles if role in places}
    missing = [role for role in roles if role not in places]
    if missing:
        file.refuse(f"has no column known to be the {missing[0]}: add {missing[0]}=NAME to --columns")
    if len(set(places.values())) < len(places):
        file.refuse("has the same column for two roles in --columns")
    return Layout(places, names, header)


def chosen_columns(file: File, roles: tuple[str, ...]) -> dict[str, str]:
    """Parse `text=review,label=3` into a dictionary."""
    found = {}
    for part in file.columns.split(","):
        role, sign, value = (piece.strip() for piece in part.partition("="))
        if role not in roles or not sign or not value or role in found:
            wanted = ",".join(f"{name}=NAME" for name in roles)
            file.refuse(f"cannot be read with --columns {file.columns!r}: expected {wanted}, each a column's name or number")
        found[role] = value
    return found


def _known(file: File, number: int, roles: tuple[str, ...], names: list[str]) -> dict[str, int]:
    """The roles that follow from the names. Ambiguous names are an error unless --columns settles them."""
    labels, twins = by_name("label", names), pair(names)
    found = {"label": labels[0]} if len(labels) == 1 else {}
    if "text_a" in roles:
        return found | (dict(zip(("text_a", "text_b"), twins, strict=True)) if twins and not set(twins) & set(labels) else {})
    texts = [place for place in by_name("text", names) if place not in labels]
    if file.columns:
        return found | ({"text": texts[0]} if len(texts) == 1 else {})
    if twins and labels and not set(twins) & set(labels):
        first, second = (clip(names[place]) for place in twins)
        file.fail(number, f"two texts, {first} and {second}: --task matching reads pairs, --columns text={first} one of them")
    for role, places in (("label", labels), ("text", texts)):
        if len(places) > 1 and labels and texts:
            several = " and ".join(clip(names[place]) for place in places[:2])
            file.fail(number, f"{several} could both be the {role}: --columns {role}=NAME says which")
    return found | ({"text": texts[0]} if len(texts) == 1 else {})


def _short(cells: Iterable[str | None]) -> bool:
    """Whether the cells are short enough to be names."""
    return all(len(cell or "") <= LONGEST_NAME and len((cell or "").split()) <= MOST_WORDS for cell in cells)


def _may_be_names(cells: Cells) -> bool:
    """Whether the cells of a first row, whose last cell may be a label, could be names."""
    return _short(cells) and not _is_number(cells[-1]) and normal(cells[-1]) not in VALUES


def _repeated(rows: list[Numbered], place: int) -> bool:
    """Whether the cell in the first row is also the label of another row that does not repeat the first row."""
    _, first = rows[0]
    return any(list(cells) != list(first) and cells[place : place + 1] == first[place : place + 1] for _, cells in rows[1:])


def _unknown(file: File, number: int, names: list[str], missing: list[str]) -> NoReturn:
    example = ",".join(f"{role}=NAME" for role in missing)
    file.fail(
        number,
        f"the columns are {listed(names)}, and none is known to be the {missing[0]}: call it {missing[0]!r} or say "
        f"--columns {example}",
    )


def _say_if_alone(file: File, layout: Layout, rows: list[Numbered]) -> None:
    """Note a first row that is read as data although its label never occurs again."""
    (number, first), place = rows[0], layout.places["label"]
    own = [first[place] for place in layout.places.values()]
    again = any(cells[place : place + 1] == first[place : place + 1] for _, cells in rows[1:])
    if len(rows) > 1 and not again and _may_be_names(own):
        shown = ", ".join(clip(cell or "") for cell in own)
        example = ",".join(f"{role}={clip(first[place] or '')}" for role, place in layout.places.items())
        file.note(f"row {number} ({shown}) is read as a row; --columns {example} makes it a header")


def _by_evidence(file: File, roles: tuple[str, ...], rows: list[Numbered]) -> Layout:
    """The layout of a table with as many columns as roles and no known names: the roles' order, unless rows contradict it."""
    number, first = rows[0]
    body = [cells for _, cells in rows[1:] if len(cells) == len(roles)] or [first]
    layout = Layout({role: place for place, role in enumerate(roles)}, [cell or "" for cell in first], False)
    numbers = ",".join(f"{role}={place + 1}" for role, place in layout.places.items())
    _refuse_label_first(file, roles, [first, *body] if len(rows) > 1 else body)
    if len(body) > 1:  # without a possible header
        _refuse_label_first(file, roles, body)
    label, others = first[-1], Counter(cells[-1] for cells in body)
    if len(rows) == 1 or label in others or not _may_be_names(first):
        return layout
    shown = ", ".join(clip(cell or "") for cell in first)
    if all(_is_number(other) for other in others):
        why = f"all labels but {clip(label or '')!r} are numbers"
    elif len(others) > 1 and min(others.values()) > 1:
        why = f"{clip(label or '')!r} occurs once as a label, and all other labels repeat"
    elif all(re.fullmatch(r"[^\W\d]\w*", cell or "") for cell in first) and _longer(body, first):
        file.fail(number, f"{shown}: a header or a row? call its columns {', '.join(roles)}, or say --columns {numbers}")
    else:
        _say_if_alone(file, layout, rows)
        return layout
    file.note(f"row {number} ({shown}) is taken for a header: {why}; --columns {numbers} makes it a row")
    return Layout(layout.places, layout.names, True)


def _refuse_label_first(file: File, roles: tuple[str, ...], rows: list[Cells]) -> None:
    firsts, lasts = [cells[0] for cells in rows], [cells[-1] for cells in rows]
    numbers = all(_is_number(cell) for cell in firsts) and not all(_is_number(cell) for cell in lasts)
    repeats = len(rows) > 3 and len(set(firsts)) <= len(rows) / 2 and len(set(lasts)) > 0.8 * len(rows)
    words = not any(_blank(cell) for cell in firsts) and all(_blank(cell) for cell in lasts)
    if numbers or repeats or (words and len(set(lasts)) == len(rows) > 1):
        others = [f"{role}={place + 2}" for place, role in enumerate(roles[:-1])]
        file.refuse(
            f"seems to have its labels in column 1 ({clip(firsts[-1] or '')!r}) and texts in the last: say --columns "
            f"{','.join([*others, f'{roles[-1]}=1'])}, or name the columns in a first row"
        )


def _longer(body: list[Cells], first: Cells) -> bool:
    """Whether most texts are longer than the first row's cell in their column."""
    longer = [len(cells[0] or "") > len(first[0] or "") + 1 for cells in body]
    return sum(longer) > len(longer) / 2


def _blank(cell: str | None) -> bool:
    return len((cell or "").split()) > 1


def _is_number(cell: str | None) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+([.,][0-9]+)?", cell or "") is not None
