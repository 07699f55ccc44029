"""Reads a user's file: its text, its errors and notes about it, each as one line."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from fastbert.errors import InputError

Row = dict[str, Any]
Say = Callable[[str], None]

UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
FEW_ZEROS = 0.2  # share of the bytes; mostly-ASCII text in UTF-16 without a byte order mark has more
SHOWN = 40  # characters of a line or cell that a message shows
SHOWN_NAMES = 6


class File:
    """A text file, the option that named it (for errors), and the reader's notes, printed once the file is read."""

    def __init__(self, path: Path, option: str = "--data", columns: str = "") -> None:
        self.path, self.option, self.columns = path, option, columns
        self.notes: list[str] = []
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{option}: cannot read {path}: {error.strerror}") from None
        if data.startswith(UTF_16_MARKS):
            self.refuse(f"is UTF-16, expected UTF-8: {_recoded('UTF-16', path)}")
        zero = data.find(b"\0")
        if zero >= 0 and data.count(b"\0") > FEW_ZEROS * len(data):
            self.refuse(f"holds NUL bytes: not text, or UTF-16, which {_recoded('UTF-16LE', path)} converts to UTF-8")
        if zero >= 0:
            self.fail(_line_at(data, zero), "a NUL byte; expected text")
        try:
            self.text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.fail(_line_at(data, error.start), f"not UTF-8; {_recoded('ITS-ENCODING', path)} converts it")
        if "\n" not in self.text:
            self.text = self.text.replace("\r", "\n")  # line ends of classic Mac OS
        if not self.text.strip():
            self.refuse("is empty")

    def refuse(self, what: str) -> NoReturn:
        raise InputError(f"{self.option}: {self.path} {what}")

    def fail(self, row: int, what: str) -> NoReturn:
        raise InputError(f"{self.option}: {self.path}, row {row}: {what}")

    def note(self, what: str) -> None:
        self.notes.append(f"{self.option}: {what}")

    def lines(self) -> Iterator[tuple[int, str]]:
        """Row number and text of every line, including empty ones. Only line feeds end a line, as in an editor."""
        for number, line in enumerate(self.text.split("\n"), 1):
            yield number, line.rstrip("\r")

    def json(self, expected: str) -> Any:
        """The whole file as JSON. `expected` describes the format for the error message."""
        try:
            return self._object(self.text, 1)
        except ValueError as error:
            if len(self.json_lines() or ()) > 1:
                self.refuse(f"is JSON lines; expected {expected}")
            self.fail(getattr(error, "lineno", 1), f"not JSON: {error}")

    def json_lines(self) -> list[tuple[int, dict[str, Any]]] | None:
        """Row number and object of every line, or of every item of a single list; None for a file that is not JSON."""
        start = self.text.lstrip()
        if start[0] == "[" or (start[0] == "{" and self.path.suffix.lower() == ".json"):
            try:
                whole = self._object(start, 1)
            except ValueError:
                whole = None
            if isinstance(whole, list) and whole and all(isinstance(item, dict) for item in whole):
                return list(enumerate(whole, 1))
        if start[0] != "{":
            return None
        found: list[tuple[int, dict[str, Any]]] = []
        for number, line in self.lines():
            if not line.strip():
                continue
            try:
                item = self._object(line, number)
            except ValueError as error:
                if not found:  # a text may begin with a brace
                    return None
                self.fail(number, f"not JSON, unlike the rows before it: {error}")
            if not isinstance(item, dict):
                self.fail(number, f"expected a JSON object as in the rows before it, got {clip(line)!r}")
            found.append((number, item))
        return found

    def _object(self, text: str, number: int) -> Any:
        try:
            found = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if re.search(r"\\u[dD][89a-fA-F]", text):
            try:
                json.dumps(found, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                self.fail(number, r"half of a character: \ud800 to \udfff must come in pairs")
        return found


def clip(text: str) -> str:
    """The beginning of a text, for a message of one line."""
    text = " ".join(text.splitlines())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def listed(names: list[str]) -> str:
    """The first few names, as text."""
    return ", ".join(clip(name) for name in names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")


def _recoded(encoding: str, path: Path) -> str:
    return f"iconv -f {encoding} -t UTF-8 {path}"


def _line_at(data: bytes, place: int) -> int:
    return data.count(b"\n", 0, place) + 1
