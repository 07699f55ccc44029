"""Files that would run code or hurt a reader, and what a command may do with them: one line on stderr and exit code 2."""

import io
import json
import pickle
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest


class Marks:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def pickled(marker: Path) -> bytes:
    return pickle.dumps({"weight": Marks(marker)})


def code(marker: Path) -> str:
    """A module that touches a file when it is imported, and has the classes that configs of models name."""
    return (
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
        "from transformers import BertConfig as Config, BertForMaskedLM as Model, BertTokenizer as Tokens\n"
    )


def changed(path: Path, **values: Any) -> None:
    """Set values in a JSON object in a file, which may be missing."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | values))


def refused(entry: Callable[[], Any], *arguments: object) -> str:
    """The one line on stderr with which a command line refuses its arguments."""
    code, _, errors = called(entry, *arguments)
    lines = [line for line in errors.splitlines() if line.lower().startswith("error:")]
    assert code == 2 and len(lines) == 1, (code, errors)
    assert lines[0].isprintable(), lines[0]
    return lines[0]


def called(entry: Callable[[], Any], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command line in this process. Whatever it raises but SystemExit is raised here."""
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")  # what cannot be encoded fails as in a process
    errors = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            entry()
    return stop.value.code or 0, *map(_printed, (output, errors))


def _printed(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode()
