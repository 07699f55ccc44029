"""Checks the commands of `sh` blocks by the parsers of the programs that they name: an option that does not exist fails.

Typer's commands are parsed with their defaults and types, and not run. A program without a checker here fails.
"""

import contextlib
import importlib
import io
import re
import runpy
import shlex
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from _pytest.config import get_config
from typer.main import get_command

from tests.docs.blocks import ROOT, Block

ASSIGNMENT = re.compile(r"[A-Z_]+=")
Checker = Callable[[list[str]], None]
SEPARATORS = {"&&", ";", "|"}


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command, without comments and variables in front."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word in SEPARATORS:
                if words:
                    yield words
                words = []
            elif words or not ASSIGNMENT.match(word):
                words.append(word)


class Refused(Exception):
    """The program does not take these words."""


def check(words: list[str]) -> None:
    """Parse a command.

    Raises:
        Refused: the program does not take its words, or no checker knows the program.
    """
    for program, checker in CHECKERS.items():
        if words[: len(program)] == list(program):
            return checker(words[len(program) :])
    raise Refused(f"no checker for this program: {shlex.join(words)}")


def _in_group(group: Any, words: list[str]) -> None:
    """Parse with click, or the copy of it that typer brings along."""
    name, *rest = words or [""]
    if name not in group.commands:
        raise Refused(f"no command is called {name!r}; there are {', '.join(group.commands)}")
    try:
        group.commands[name].make_context(name, rest)
    except Exception as error:
        if any(cls.__name__ == "UsageError" for cls in type(error).__mro__):
            raise Refused(f"{shlex.join(words)}: {error.format_message()}") from None
        raise


def _typer(module: str) -> Checker:
    return lambda words: _in_group(get_command(importlib.import_module(module).app), words)


def _mkdocs(words: list[str]) -> None:
    _in_group(pytest.importorskip("mkdocs.__main__", reason="comes with the extra 'docs'").cli, words)


def _exits(parse: Callable[[], object]) -> None:
    """Call a parser that ends the process after printing what is wrong."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parse()
    except SystemExit as ended:
        if ended.code:
            raise Refused(said.getvalue()) from None


def _help_of(module: str) -> Checker:
    """For a module that runs its command line when it is imported: `--help` ends it once the other words are parsed."""

    def parse(words: list[str]) -> None:
        with mock.patch.object(sys, "argv", [module, *words, "--help"]):
            _exits(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))

    return parse


def _pip(words: list[str]) -> None:
    """Files exist, the project is this one, and extras are those of pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rest = iter(words)
    for word in rest:
        if word == "-c":
            if not (ROOT / (file := next(rest, ""))).is_file():
                raise Refused(f"pip install -c {file}: no such file")
        elif word != "-e":
            target, _, wanted = word.rstrip("]").partition("[")
            if target not in (".", "fastbert-triton") or not set(filter(None, wanted.split(","))) <= set(extras):
                raise Refused(f"pip install {word}: not this project, or an extra that it does not have")


def _pytest(words: list[str]) -> None:
    """Paths exist; options are those of pytest and of the plugins that are installed."""
    config = get_config()
    config.pluginmanager.load_setuptools_entrypoints("pytest11")
    try:
        paths = config._parser.parse(words).file_or_dir
    except pytest.UsageError as error:
        raise Refused(str(error)) from None
    missing = [path for path in paths if not (ROOT / path.partition("::")[0]).exists()]
    if missing:
        raise Refused(f"python -m pytest: no such file: {missing}")


def _torchrun(words: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    _launched(get_args_parser(), words)


def _accelerate(words: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    _launched(launch_command_parser(), words)


def _launched(parser: ArgumentParser, words: list[str]) -> None:
    """Parse the launcher's words, and those of the module that it starts; a script is the reader's own."""
    _exits(lambda: parser.parse_args(words))
    parsed = parser.parse_args(words)
    if parsed.module:
        check(["python", "-m", parsed.training_script, *parsed.training_script_args])


CHECKERS: dict[tuple[str, ...], Checker] = {
    ("pip", "install"): _pip,
    ("fastbert",): _typer("fastbert.cli.commands"),
    ("python", "-m", "fastbert"): _typer("fastbert.cli.commands"),
    ("python", "-m", "bench"): _typer("bench.__main__"),
    ("python", "-m", "tests.releases"): _help_of("tests.releases"),
    ("python", "-m", "pytest"): _pytest,
    ("torchrun",): _torchrun,
    ("accelerate", "launch"): _accelerate,
    ("mkdocs",): _mkdocs,
}
