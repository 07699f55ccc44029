"""Which of transformers' forwards fastbert was tested against, told by their code and not by the release's number.

A fast class computes what one stock forward computes. Whether the forward that is there now is such a one is settled
from a digest of its source, in which documentation and annotations do not count, so that most releases add no row to
the table (data/forwards.json, made by `python -m tests.releases digests`). Owners are handed in: nothing here imports
transformers, which brings in triton (fastbert/startup.py says why that matters).
"""

import ast
import hashlib
import importlib
import inspect
import json
import os
import sys
from functools import cache
from importlib import resources
from types import FunctionType, ModuleType

Pair = tuple[type | ModuleType, str]  # whoever holds the function, and its name there

_MISSING = object()

# The function that was judged last, and its reason.
_judged: dict[Pair, tuple[object, str | None]] = {}
# The functions that `accept` was given.
_accepted: dict[Pair, list[object]] = {}


def digest(function: object) -> str | None:
    """16 hexadecimal digits that stand for the code of a function of transformers, below its decorators.

    None where a function in the chain of `__wrapped__` does not come from transformers' own files, since it may do
    anything, and where there is no source to read.
    """
    inner = innermost(function)
    if inner is None:
        return None
    try:
        source = inspect.getsource(inner.__code__)  # of the function itself would be of what it wraps
        # A method is read as the body of an if: dedenting could change strings of several lines.
        tree = ast.parse("if True:\n" + source if source[0].isspace() else source)
    except (OSError, SyntaxError):
        return None
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    definition = next(functions, None)  # none: a lambda
    return None if definition is None else hashlib.sha256(_text(definition).encode()).hexdigest()[:16]


def reason(owner: type | ModuleType, name: str, *, strict: bool = False) -> str | None:
    """Why `owner.name`, as it is now, may not be replaced by a fast one, or None.

    Args:
        owner: a class, or the module of a function.
        strict: leave out of account what `accept` was given.
    """
    function = getattr(owner, name, _MISSING)
    pair = owner, name
    if not strict and any(function is accepted for accepted in _accepted.get(pair, ())):
        return None
    judged = _judged.get(pair)
    if judged is None or judged[0] is not function:
        judged = _judged[pair] = function, _judge(owner, name, function)
    return judged[1]


class Code:
    """The functions of transformers that a fast class stands in for or rests on."""

    def __init__(self, *pairs: Pair) -> None:
        self.pairs = pairs
        self._owners, self._names = zip(*pairs, strict=True)
        self._functions: list[object] | None = None  # when last looked at, and what was found
        self._reason: str | None = None

    def untested(self, *, strict: bool = False) -> str | None:
        """The first reason of them, see `reason`. Cheap as long as nothing was replaced.

        Not for torch.compile to trace: whoever calls it there makes its answer a constant.
        """
        try:
            functions = list(map(getattr, self._owners, self._names))
        except AttributeError:  # one is gone
            functions = None
        if functions is None or functions != self._functions:
            self._functions, self._reason = functions, self._first_reason(strict=True)
        return self._reason if strict or self._reason is None else self._first_reason(strict=False)

    def _first_reason(self, strict: bool) -> str | None:
        return next((why for pair in self.pairs if (why := reason(*pair, strict=strict)) is not None), None)


def accept(code: Code) -> None:
    """Count the functions of `code`, as they are now, as tested for the rest of this process."""
    for pair in code.pairs:
        _accepted.setdefault(pair, []).append(getattr(*pair, _MISSING))


def clear_accepted() -> None:
    """Take back what `accept` was given."""
    _accepted.clear()


@cache
def table() -> dict[str, dict[str, str]]:
    """The digests by qualified name, each with the first release of transformers that it was seen in."""
    return json.loads(resources.files("fastbert").joinpath("data/forwards.json").read_text(encoding="utf-8"))


def label(owner: type | ModuleType, name: str) -> str:
    """The name that the table knows `owner.name` by."""
    return name if isinstance(owner, ModuleType) else f"{owner.__name__}.{name}"


def _judge(owner: type | ModuleType, name: str, function: object) -> str | None:
    what = label(owner, name)
    if function is _MISSING:
        return f"{what} is gone (transformers {_release()})"
    inner = innermost(function)
    if inner is None:
        return f"{what} was replaced by {_own_name(function)}"
    found = digest(function)
    if found is None:
        return f"{what} has no source that can be compared with what fastbert was tested against"
    if found not in table().get(what, ()):
        return f"{what} is not one that fastbert was tested against (transformers {_release()})"
    return None


def innermost(function: object) -> FunctionType | None:
    """The function of transformers that its own decorators are around; None if anything on the way is not transformers',
    such as a user's functools.wraps around one of its functions."""
    return _innermost(function) if isinstance(function, FunctionType) else None


@cache
def _innermost(function: object) -> FunctionType | None:
    folder = os.path.dirname(_transformers().__file__) + os.sep
    while isinstance(function, FunctionType) and function.__code__.co_filename.startswith(folder):
        if not hasattr(function, "__wrapped__"):
            return function
        function = function.__wrapped__
    return None


def _own_name(function: object) -> str:
    """The name in the source: functools.wraps gives a function the name of the one that it wraps."""
    code = getattr(function, "__code__", None)
    return code.co_qualname.rpartition("<locals>.")[2] if code is not None else f"a {type(function).__name__}"


def _transformers() -> ModuleType:
    return sys.modules.get("transformers") or importlib.import_module("transformers")


def _release() -> str:
    return _transformers().__version__


_LEFT_OUT = {"ctx", "kind", "type_comment", "type_params", "annotation", "returns"}
_DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _text(node: object) -> str:
    """A node written out, the same under every Python: ast.dump and ast.unparse change from release to release.

    Fields that are None or empty are left out, so that a Python that adds one changes nothing.
    """
    if isinstance(node, list):
        return "[" + ",".join(_text(item) for item in node if not _is_declaration(item)) + "]"
    if not isinstance(node, ast.AST):
        return f"{type(node).__name__}:{node!r}"
    kind, fields = type(node).__name__, dict(ast.iter_fields(node))
    if isinstance(node, ast.AnnAssign):
        kind, fields = "Assign", {"targets": [node.target], "value": node.value}
    if isinstance(node, _DOCUMENTED):
        fields["body"] = node.body[_has_docstring(node) :]
        fields["decorator_list"] = [_decorator(item) for item in node.decorator_list]
    shown = (f"{name}={_text(value)}" for name, value in sorted(fields.items()) if _counts(name, value))
    return f"{kind}({' '.join(shown)})"


def _counts(field: str, value: object) -> bool:
    return field not in _LEFT_OUT and value is not None and value != []


def _is_declaration(node: object) -> bool:
    return isinstance(node, ast.AnnAssign) and node.value is None


def _has_docstring(node: ast.AST) -> bool:
    return ast.get_docstring(node, clean=False) is not None


def _decorator(node: ast.expr) -> ast.expr:
    """Without arguments where they are documentation."""
    is_documentation = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "auto_docstring"
    return node.func if is_documentation else node
