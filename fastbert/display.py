"""How results are laid out: as a table in as many columns as there are, as text of 80, and as HTML for a notebook."""

import html
import textwrap
from collections.abc import Collection, Iterable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

WIDTH = 80  # columns of text that is not printed to a terminal: what fits a log, a page and a notebook
_ANY = 10_000  # columns; more than any table has
_GAP = 2  # columns between two cells


def as_text(result: "RenderableType") -> str:
    """What `result` prints in WIDTH columns without colours, and without blanks at the end of a line."""
    from rich.console import Console

    out = StringIO()
    Console(file=out, width=WIDTH, color_system=None).print(result)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> "Table":
    """A table of plain text. `right`: the headings of columns of numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for heading in headings:
        made.add_column(heading, overflow="fold", justify="right" if heading in right else "left", vertical="top")
    for cells in rows:
        made.add_row(*map(Text, cells))
    return made


def fits(made: "Table", console: "Console", options: "ConsoleOptions") -> bool:
    """Whether no cell of the table has to wrap."""
    return console.measure(made, options=options.update_width(_ANY)).maximum <= options.max_width


def fold_name(name: str, width: int) -> str:
    """A dotted name in lines of at most `width` columns, broken before a dot where it can be."""
    lines = [""]
    for part in name.replace(".", "\0.").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append(" ")
        lines[-1] += part
    return "\n".join(lines)


def fold_words(text: str, width: int, indent: str = "") -> str:
    """Text in lines of at most `width` columns, broken between words."""
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


class Notes:
    """Numbers the reasons in a table, each once, so that the table shows `[1]` and the text stands below it."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, text: str | None) -> str:
        """The mark that stands for `text`; nothing for no text."""
        return f"[{self._numbers.setdefault(text, len(self._numbers) + 1)}]" if text else ""

    def lines(self, width: int) -> "list[Text]":
        """The texts behind their marks."""
        from rich.text import Text

        return [Text(textwrap.fill(f"[{n}] {text}", width, subsequent_indent=" " * 4)) for text, n in self._numbers.items()]


def html_table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in which everything is escaped: names of classes and modules are the user's."""

    def cells(tag: str, texts: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"

    body = "".join(cells("td", row) for row in rows)
    return f"<table><caption>{html.escape(caption)}</caption>{cells('th', headings)}{body}</table>"
