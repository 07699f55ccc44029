"""Command lines at random: every option and argument of an app, with values that suit it and values that do not."""

import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from hypothesis import strategies as st

NUMBERS = ("0", "1", "-1", "2", "0.5", "nan", "inf", "1e999", "-0.0", "0x10", "²", "9" * 18, "9" * 30, "9" * 5000)
WORDS = ("", " ", "-", "--", "-x", "--no-such-option", "--help", "=", "[red]x[/]", "a\nb", "\x1b[2J", "\u202e", "é", "\udcff")
PATHS = ("folder", "file.txt", "binary.bin", "results.json", "unreadable", "missing/x", "file.txt/x", "x" * 300, "loop")
# Nothing has a slash in front or dots in it: whatever a command writes stays below the folder it runs in.
TEXT = st.text(st.characters(exclude_characters="/.\0"), max_size=8)
ANY = st.sampled_from(NUMBERS) | st.sampled_from(WORDS) | st.sampled_from(PATHS) | TEXT
# How the interpreter's audit events tell that a file is changed.
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree")
watched: list[str] | None = None


def make_files(folder: Path, results: Path) -> None:
    """The files that PATHS names."""
    (folder / "folder").mkdir()
    (folder / "file.txt").write_text("One two three.\nFour five six.\n")
    (folder / "binary.bin").write_bytes(bytes(range(256)))
    (folder / "results.json").write_bytes(results.read_bytes())
    (folder / "unreadable").touch(0o000)
    (folder / "loop").symlink_to("loop")


def commands(app: typer.Typer) -> dict[str, list[tuple[Any, type]]]:
    """The parameters of an app's commands, each with the type of its values."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        types = typing.get_type_hints(inspect.unwrap(command.callback))
        found[name] = [(each, _of_one(types[each.name])) for each in command.params]
    return found


def _of_one(kind: Any) -> type:
    """The type of one value of a parameter that may be None or a list."""
    inner = [each for each in typing.get_args(kind) if each is not type(None)]
    return _of_one(inner[0]) if inner else kind


@st.composite
def arguments(draw: Callable[..., Any], parameters: list[tuple[Any, type]]) -> list[str]:
    """Arguments of one command: most of what it needs, some of the rest, sometimes twice, and sometimes something else."""
    found: list[str] = []
    for parameter, kind in parameters:
        often = 9 if parameter.required else 2
        for _ in range(2):
            if draw(st.integers(0, 9)) < often:
                found += draw(occurrence(parameter, kind))
    for _ in range(draw(st.sampled_from((0, 0, 0, 1)))):
        found.insert(draw(st.integers(0, len(found))), draw(ANY))
    return found


@st.composite
def occurrence(draw: Callable[..., Any], parameter: Any, kind: type) -> list[str]:
    """A parameter with a value. An option may be without one, or have one that it does not take."""
    value = draw(suiting(kind, parameter.default) if draw(st.integers(0, 3)) else ANY)
    if parameter.param_type_name == "argument":
        return [value]
    name = draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts]))
    if (kind is bool) == bool(draw(st.integers(0, 19))):
        return [name]
    return [name, value] if draw(st.booleans()) else [f"{name}={value}"]


def suiting(kind: type, default: Any) -> st.SearchStrategy[str]:
    """Values of the type that a parameter takes, some of them out of its range."""
    if issubclass(kind, Enum):
        return st.sampled_from([each.value for each in kind])
    if kind is int:
        return st.sampled_from(("0", "1", "2", "8", "64")) | st.integers().map(str)
    if kind is float:
        return st.sampled_from(("0.5", "1")) | st.floats().map(str)
    own = default if isinstance(default, list | tuple) else [default]
    return st.sampled_from([*(each for each in own if isinstance(each, str) and each), *PATHS])


def _note(event: str, values: tuple[Any, ...]) -> None:
    if watched is None or not (event in CHANGES or event == "open" and values[2] & WRITES):
        return
    if isinstance(values[0], str | bytes | Path) and (path := os.path.abspath(os.fsdecode(values[0]))) != os.devnull:
        watched.append(path)


sys.addaudithook(_note)  # for the life of the process; it notes nothing outside `writes`


@contextmanager
def writes() -> Iterator[list[str]]:
    """The paths that this process changes within the block."""
    global watched
    watched = found = []
    try:
        yield found
    finally:
        watched = None
