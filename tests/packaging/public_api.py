"""Lists what is public: the names of `fastbert.__all__` with their signatures, and the command line with its options.

`python -m tests.packaging.public_api` writes the list to public_api.txt; the difference belongs into CHANGELOG.md.
"""

import importlib
import inspect
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import typer

import fastbert

LISTING = Path(__file__).with_name("public_api.txt")
# Public beyond __all__: importing it imports transformers, so `import fastbert` cannot.
ELSEWHERE = {"fastbert.integrations.trainer": ["ReportCallback"]}


def listing() -> str:
    """The whole public API, one line per name, sorted."""
    from fastbert.cli.commands import app

    named = {f"fastbert.{name}": getattr(fastbert, name) for name in fastbert.__all__}
    for module, names in ELSEWHERE.items():
        named |= {f"{module}.{name}": getattr(importlib.import_module(module), name) for name in names}
    named |= {f"{cls.__module__}.{cls.__qualname__}": cls for cls in referred(named.values())}
    lines = sorted(line for name, value in named.items() for line in _lines(name, value))
    return "\n".join([*lines, "", *_command_lines("fastbert", typer.main.get_command(app))]) + "\n"


def _lines(name: str, value: Any) -> Iterator[str]:
    if not inspect.isclass(value):
        yield f"function  {name}{_signature(value)}"
        return
    bases = "".join(f", a {base.__module__}.{base.__name__}" for base in value.__bases__ if base is not object)
    yield f"class     {name}{'' if issubclass(value, Exception) else _signature(value)}{bases}"
    if is_dataclass(value):
        yield from (f"field     {name}.{field}: {_type(kind)}" for field, kind in inspect.get_annotations(value).items())
    for member, found in _members(value):
        if isinstance(found, property):
            yield f"property  {name}.{member}: {_type(inspect.signature(found.fget).return_annotation)}"
        elif callable(function := inspect.unwrap(getattr(value, member))):
            yield f"method    {name}.{member}{_signature(function)}"


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public members that fastbert defines, and those with which an instance is called."""
    for name in dir(cls):
        owner = next(base for base in cls.__mro__ if name in vars(base))
        if owner.__module__.split(".")[0] == "fastbert" and (not name.startswith("_") or name == "__call__"):
            found = vars(owner)[name]
            if isinstance(found, property) or inspect.isroutine(found):
                yield name, found


def referred(values: Any) -> set[type]:
    """The classes of fastbert, not in `values`, that these return or hold, and so on."""
    known, waiting = set(), list(values)
    while waiting:
        value = waiting.pop()
        annotations: list[Any] = []
        if inspect.isclass(value):
            annotations += inspect.get_annotations(value).values() if is_dataclass(value) else []
            annotations += [_returned(member) for _, member in _members(value)]
        else:
            annotations.append(_returned(value))
        for found in (cls for annotation in annotations for cls in _classes(annotation)):
            if found.__module__.split(".")[0] == "fastbert" and found not in known and found not in values:
                known.add(found)
                waiting.append(found)
    return known


def _returned(member: Any) -> Any:
    function = member.fget if isinstance(member, property) else inspect.unwrap(getattr(member, "__func__", member))
    annotation = inspect.signature(function).return_annotation
    # A name in quotes is one of the function's module, or one that type checkers alone import.
    return function.__globals__.get(annotation, annotation) if isinstance(annotation, str) else annotation


def _classes(annotation: Any) -> Iterator[type]:
    if inspect.isclass(annotation):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _classes(part)


def _signature(value: Any) -> str:
    return str(inspect.signature(value))


def _type(annotation: Any) -> str:
    return inspect.formatannotation(annotation)


def _command_lines(name: str, command: Any) -> Iterator[str]:
    yield f"command   {name}"
    hints = {} if command.callback is None else typing.get_type_hints(inspect.unwrap(command.callback))
    for parameter in sorted(command.params, key=lambda parameter: parameter.name):
        if parameter.name not in hints:  # one that typer adds to every program
            continue
        values = "flag" if getattr(parameter, "is_flag", False) else _values(hints[parameter.name])
        values += ", repeatable" if parameter.multiple else ""
        default = "required" if parameter.required else f"default {parameter.default}"
        spelled = "/".join([*parameter.opts, *parameter.secondary_opts])
        yield f"{parameter.param_type_name:<9} {name} {spelled}: {values}, {default}"
    for subcommand, found in sorted(getattr(command, "commands", {}).items()):
        yield from _command_lines(f"{name} {subcommand}", found)


def _values(hint: Any) -> str:
    """What an option takes: the values of an enumeration, otherwise the type."""
    enums = [cls for cls in _classes(hint) if issubclass(cls, Enum)]
    return "|".join(member.value for member in enums[0]) if enums else _type(hint)


if __name__ == "__main__":
    LISTING.write_text(listing(), encoding="utf-8")
