"""Renders a table as Markdown and as HTML. Names, labels and messages in it come from files and are shown as they are."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from bench.core.comparison import NOT_MEASURED, is_ours
from fastbert.errors import one_line

LONG = 60  # cells with more characters may wrap
_NUMBER = re.compile(r"[\d.,]+( ?(%|x|ms|us|s|[MG]iB|T[BF]\S*)( \[.*\])?)?$")


@dataclass(frozen=True)
class Table:
    """Cells under headings, and lines of text below. A table without either says "not measured"."""

    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()

    @property
    def lines(self) -> Sequence[str]:
        return self.notes if self.rows or self.notes else (NOT_MEASURED,)

    def markdown(self) -> str:
        head = [self.headings, ["---"] * len(self.headings)] if self.rows else []
        cells = [[literal(cell).replace("|", "/") for cell in row] for row in (*head, *self.rows)]
        return "\n".join([*(f"| {' | '.join(row)} |" for row in cells), *map(_paragraph, self.lines)])

    def html(self) -> str:
        """The table as HTML, with CSS classes for fastbert's lanes and for numbers."""
        notes = "".join(f"<p>{escape(line)}</p>" for line in self.lines)
        if not self.rows:
            return notes
        heads = "".join(f"<th>{escape(heading)}</th>" for heading in self.headings)
        body = "".join(map(self._row, self.rows))
        return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>{notes}'

    def _row(self, cells: Sequence[str]) -> str:
        named = dict(zip(self.headings, cells, strict=False))
        ours = ' class="ours"' if is_ours(named.get("lane", "")) else ""
        return f"<tr{ours}>{''.join(map(_cell, cells))}</tr>"


def _paragraph(line: str) -> str:
    """A line below the table; one that begins with an empty line stays a paragraph of its own."""
    return f"\n{literal(line[1:])}" if line.startswith("\n") else literal(line)


def literal(text: str) -> str:
    """Text for a page of Markdown: one line, in which no tag, comment, link or picture can begin."""
    return one_line(text).replace("<", "&lt;").replace("](", "]\\(")


def _cell(text: str) -> str:
    if len(text) > LONG:
        return f'<td><span class="long">{escape(text)}</span></td>'
    return f"<td{' class=number' if _NUMBER.match(text) else ''}>{escape(text)}</td>"
