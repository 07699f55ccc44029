"""Decides whether a forward of transformers is one that fastbert was tested against, by its code, not by release number.

A fast class computes what one stock forward computes. `data/forwards.json` holds a digest of every stock function that
fastbert was tested against. Documentation and annotations are left out of the digest, so most releases add no row.

- The check runs at each call, by the identity of the functions, because anyone may replace one at any time.
- `untested=True` accepts functions, for the rest of the process; it does not accept releases.
- To support a new release: `python -m tests.releases digests --transformers X` prints what changed, and each line is a
  forward to read. Then run `python -m tests.releases run --transformers X`, add X to `TRANSFORMERS` in
  tests/releases/matrix.py, and run `python -m tests.releases table` for the docs. Other releases are put in front of the
  installed one with `pip install --target`, so torch is installed once. tests/models/future.py simulates future releases.
- sentence-transformers' functions are recognised the same way, from a table of their own.

Owners are passed in: this module does not import transformers, which imports triton (see fastbert/startup.py).
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

Pair = tuple[type | ModuleType, str]  # the owner of a function, and its name there

_MISSING = object()
# The packages whose functions are recognised, and the file with the digests of each.
_TABLES = {"transformers": "forwards.json", "sentence_transformers": "forwards_sentence_transformers.json"}

# The function judged last, and its reason.
_judged: dict[Pair, tuple[object, str | None]] = {}
# The functions passed to `accept`.
_accepted: dict[Pair, list[object]] = {}


def digest(function: object) -> str | None:
    """A digest of 16 hexadecimal digits of the code of a library's function, without its decorators.

    None if a function in the chain of `__wrapped__` does not come from the libraries' own files, since it may do anything,
    or if there is no source to read.
    """
    inner = innermost(function)
    if inner is None:
        return None
    try:
        source = inspect.getsource(inner.__code__)  # given the function, getsource would unwrap it
        # A method is parsed as the body of an if: dedenting could change multi-line strings.
        tree = ast.parse("if True:\n" + source if source[0].isspace() else source)
    except (OSError, SyntaxError):
        return None
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    definition = next(functions, None)  # None for a lambda
    return None if definition is None else hashlib.sha256(_text(definition).encode()).hexdigest()[:16]


def reason(owner: type | ModuleType, name: str, *, strict: bool = False) -> str | None:
    """Why no fast class may stand in for the current `owner.name`, or None.

    Args:
        owner: a class, or the module of a function.
        name: the attribute of `owner` that holds the function.
        strict: ignore functions passed to `accept`.
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
    """The transformers functions that a fast class replaces or depends on."""

    def __init__(self, *pairs: Pair) -> None:
        self.pairs = pairs
        self._owners, self._names = zip(*pairs, strict=True)
        self._functions: list[object] | None = None  # the functions judged last, and the reason found for them
        self._reason: str | None = None

    def untested(self, *, strict: bool = False) -> str | None:
        """The first `reason` among the functions, or None. Cheap as long as nothing was replaced.

        torch.compile must not trace this; callers wrap it in `torch.compiler.assume_constant_result`.
        """
        try:
            functions = list(map(getattr, self._owners, self._names))
        except AttributeError:  # this release does not have one of them
            functions = None
        if functions is None or functions != self._functions:
            self._functions, self._reason = functions, self._first_reason(strict=True)
        return self._reason if strict or self._reason is None else self._first_reason(strict=False)

    def _first_reason(self, strict: bool) -> str | None:
        return next((why for pair in self.pairs if (why := reason(*pair, strict=strict)) is not None), None)


def accept(code: Code) -> None:
    """Treat the current functions of `code` as tested for the rest of this process."""
    for pair in code.pairs:
        _accepted.setdefault(pair, []).append(getattr(*pair, _MISSING))


def clear_accepted() -> None:
    """Undo all calls of `accept`."""
    _accepted.clear()


@cache
def table(package: str = "transformers") -> dict[str, dict[str, str]]:
    """Digests by qualified name, each mapped to the first release of `package` that has it."""
    return json.loads(resources.files("fastbert").joinpath("data", _TABLES[package]).read_text(encoding="utf-8"))


def package_of(owner: type | ModuleType) -> str:
    """The package that `owner` belongs to; transformers for one that is in none of those that are recognised."""
    found = (owner.__name__ if isinstance(owner, ModuleType) else owner.__module__).partition(".")[0]
    return found if found in _TABLES else "transformers"


def label(owner: type | ModuleType, name: str) -> str:
    """The key of `owner.name` in the table."""
    return name if isinstance(owner, ModuleType) else f"{owner.__name__}.{name}"


def _judge(owner: type | ModuleType, name: str, function: object) -> str | None:
    what, package = label(owner, name), package_of(owner)
    if function is _MISSING:
        return f"{what} does not exist ({_release(package)})"
    inner = innermost(function)
    if inner is None:
        return f"{what} was replaced by {_own_name(function)}"
    found = digest(function)
    if found is None:
        return f"{what} has no source to compare with the forwards that fastbert was tested against"
    if found not in table(package).get(what, ()):
        return f"{what} is not one that fastbert was tested against ({_release(package)})"
    return None


def innermost(function: object) -> FunctionType | None:
    """The library's function inside the library's own decorators.

    None if any wrapper on the way is not the library's own, such as a user's functools.wraps around one of its functions.
    """
    return _innermost(function) if isinstance(function, FunctionType) else None


@cache
def _innermost(function: object) -> FunctionType | None:
    modules = (_transformers(), sys.modules.get("sentence_transformers"))
    folders = tuple(os.path.dirname(module.__file__) + os.sep for module in modules if module and module.__file__)
    while isinstance(function, FunctionType) and function.__code__.co_filename.startswith(folders):
        if not hasattr(function, "__wrapped__"):
            return function
        function = vars(function)["__wrapped__"]
    return None


def _own_name(function: object) -> str:
    """The function's name in its source; functools.wraps overwrites `__name__` with that of the wrapped function."""
    code = getattr(function, "__code__", None)
    return code.co_qualname.rpartition("<locals>.")[2] if code is not None else f"a {type(function).__name__}"


def _transformers() -> ModuleType:
    return sys.modules.get("transformers") or importlib.import_module("transformers")


def _release(package: str) -> str:
    module = _transformers() if package == "transformers" else sys.modules[package]
    return f"{package.replace('_', '-')} {module.__version__}"


_LEFT_OUT = {"ctx", "kind", "type_comment", "type_params", "annotation", "returns"}
_DOCUMENTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _text(node: object) -> str:
    """Serialises a node identically under every Python; the output of ast.dump and ast.unparse changes between releases.

    Fields that are None or empty are left out, so a field that a new Python adds changes nothing.
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


def _has_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    return ast.get_docstring(node, clean=False) is not None


def _decorator(node: ast.expr) -> ast.expr:
    """The decorator, without its arguments if those are documentation."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "auto_docstring":
        return node.func
    return node
