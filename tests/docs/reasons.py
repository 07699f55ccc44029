"""Finds the texts that `fastbert.report` and the report of a graphed step can give as reasons, from the sources alone.

A reason is a plain string that passes through several functions before it is counted. So the search starts where reasons end
up and follows each expression back, by name: a variable to what is assigned to it, a parameter to the arguments of all calls,
a call to what the functions of that name return, an attribute to all that is stored under its name. A name stands for
everything that shares it, so the result may hold too much, which a reader of the list notices, but not too little. An
expression of a form that the search does not know raises an error.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Reasons end up in the field of a class, and as keys of counters.
SINK, COUNTERS = ("Row", "reason"), ("fallbacks", "ordinary")
_ELSEWHERE = (
    "testing",
    "cli",
    "verify.py",
    "numerics.py",
    "kernels",
)  # parts of fastbert/ that give no reasons; the last is a link
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
# Functions from elsewhere whose result may be one of their arguments, or come from what they are methods of.
_PASS_ON = {"next", "filter", "map", "str", "join", "format", "get", "pop"}
_TEXT = re.compile(r"\b(str|Any)\b")  # a function that is annotated with neither returns no reason
_TEXT_GIVEN = re.compile(r"\b(str|Callable)\b")  # and a parameter that is annotated with neither is given none
_WORDS = re.compile(r"[\w}][:;]? \S|=")  # one word is a name or a part of a reason
_NO_TEXT = (ast.Compare, ast.UnaryOp, ast.Slice, ast.Set, ast.SetComp, ast.DictComp, ast.Yield)


class Place(NamedTuple):
    """An expression, and the module, classes and functions around it, the innermost last."""

    node: ast.AST
    scope: tuple[ast.AST, ...]

    @property
    def function(self) -> ast.AST | None:
        return next((node for node in reversed(self.scope) if isinstance(node, _FUNCTIONS)), None)


_NOTHING = Place(ast.Constant(None), ())


def reasons() -> dict[str, str]:
    """Each reason, with {} for what is filled in, and the file and line that makes it."""
    files = [path for path in (ROOT / "fastbert").glob("*") if path.name not in _ELSEWHERE]
    files = [found for path in (*files, ROOT / "kernels") for found in ([path] if path.is_file() else path.glob("**/*.py"))]
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(files) if path.suffix == ".py"}
    return find({str(path.relative_to(ROOT)): text for path, text in texts.items()})


def find(texts: dict[str, str]) -> dict[str, str]:
    """As `reasons`, in sources given by file name."""
    search = _Search({name: ast.parse(text) for name, text in texts.items()})
    return search.run()


class _Search:
    def __init__(self, trees: dict[str, ast.Module]) -> None:
        self.found: dict[str, str] = {}
        self._seen: set[int] = set()
        self._files = {tree: name for name, tree in trees.items()}
        self._functions: dict[str, list[Place]] = defaultdict(list)
        self._calls: dict[str, list[Place]] = defaultdict(list)
        self._classes: dict[str, Place] = {}
        self._stored: dict[str, list[Place]] = defaultdict(list)  # under an attribute, a global or a key of it
        self._keys: list[Place] = []
        places = [place for tree in trees.values() for place in _walk(tree, (tree,))]
        for place in places:
            self._index(place)
        for place in places:
            if isinstance(place.node, ast.Call):
                self._index_fields(place)

    def run(self) -> dict[str, str]:
        cls, field = SINK
        for call in self._calls[cls]:
            self._follow_all(self._fields(call)[field])
        self._follow_all(self._keys)
        return self.found

    # What is where.

    def _index(self, place: Place) -> None:
        node, scope = place
        if isinstance(node, ast.FunctionDef):
            self._functions[node.name].append(place)
        elif isinstance(node, ast.ClassDef):
            self._classes[node.name] = place
        elif isinstance(node, ast.Call):
            self._calls[_name(node.func)].append(place)
        for target, value in _assignments(node):
            container = target.value if isinstance(target, ast.Subscript) else target
            if isinstance(target, ast.Subscript) and _name(container) in COUNTERS:
                self._keys.append(Place(target.slice, scope))
            elif not isinstance(target, ast.Name) or place.function is None:
                self._stored[_name(container)].append(Place(value, scope))

    def _index_fields(self, place: Place) -> None:
        for name, values in self._fields(place).items():
            self._stored[name] += values

    def _fields(self, call: Place) -> dict[str, list[Place]]:
        """The arguments of a call that makes an instance, by field."""
        name = _name(call.node.func)
        inside = next((node for node in reversed(call.scope) if isinstance(node, ast.ClassDef)), None)
        cls = inside if name == "cls" else self._classes[name].node if name in self._classes else None
        if cls is None:
            return {}
        fields = [node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)]
        given = [*zip(fields, call.node.args, strict=False), *((kw.arg, kw.value) for kw in call.node.keywords)]
        found = defaultdict(list)
        for field, value in given:
            found[field].append(Place(value, call.scope))
        return found

    # Where an expression comes from.

    def _follow_all(self, places: list[Place]) -> None:
        for place in places:
            self._follow(place)

    def _follow(self, place: Place) -> None:
        node, scope = place
        if id(node) in self._seen or isinstance(node, _NO_TEXT):
            return
        self._seen.add(id(node))
        parts = {
            ast.IfExp: ("body", "orelse"),
            ast.BoolOp: ("values",),
            ast.NamedExpr: ("value",),
            ast.Tuple: ("elts",),
            ast.List: ("elts",),
            ast.Dict: ("values",),
            ast.Starred: ("value",),
            ast.Subscript: ("value",),
            ast.BinOp: ("left", "right"),
            ast.GeneratorExp: ("elt",),
            ast.ListComp: ("elt",),
        }.get(type(node))
        if parts is not None:
            inner = (*scope, node) if isinstance(node, (ast.GeneratorExp, ast.ListComp)) else scope
            for name in parts:
                values = getattr(node, name)
                self._follow_all([Place(x, inner) for x in (values if isinstance(values, list) else [values])])
        elif isinstance(node, ast.Constant):
            self._add(place, node.value)
        elif isinstance(node, ast.JoinedStr):
            self._follow_text(place)
        elif isinstance(node, ast.Name):
            self._follow_name(place)
        elif isinstance(node, ast.Attribute):
            self._follow_all([*self._stored[node.attr], *self._returned(node.attr)])
        elif isinstance(node, ast.Lambda):
            self._follow(Place(node.body, (*scope, node)))
        elif isinstance(node, ast.Call):
            self._follow_call(place)
        else:
            raise NotImplementedError(f"{self._where(place)}: a reason made by {ast.unparse(node)}")

    def _follow_text(self, place: Place) -> None:
        """An f-string; where it only puts texts together (`f"{name}: {why}"`) those are reasons too."""
        parts = place.node.values
        text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
        self._add(place, text)
        if not any(character.isalpha() for character in text):
            self._follow_all([Place(part.value, place.scope) for part in parts if isinstance(part, ast.FormattedValue)])

    def _follow_name(self, place: Place) -> None:
        name, scope = place.node.id, place.scope
        for depth in range(len(scope), 0, -1):
            around = scope[depth - 1]
            if isinstance(around, ast.ClassDef):
                continue
            if isinstance(around, ast.Module):
                break
            here = scope[:depth]
            bound = [Place(value, here) for value in _bound(around, name)]
            if isinstance(around, _FUNCTIONS):
                bound += self._arguments(around, name, here)
            if bound:
                self._follow_all(bound)
                return
        self._follow_all([*self._stored[name], *self._returned(name)])

    def _arguments(self, function: ast.AST, name: str, around: tuple[ast.AST, ...]) -> list[Place]:
        """What the calls of a function pass for its parameter `name`."""
        by_order = [*function.args.posonlyargs, *function.args.args]
        own = next((arg for arg in (*by_order, *function.args.kwonlyargs) if arg.arg == name), None)
        if own is None:
            return []
        if own.annotation is not None and not _TEXT_GIVEN.search(ast.unparse(own.annotation)):
            return [_NOTHING]
        names = [arg.arg for arg in by_order]
        at = names.index(name) - (names[:1] in (["self"], ["cls"])) if name in names else None
        found = []
        for call, scope in self._calls[_called(function, around)]:
            by_name = [keyword.value for keyword in call.keywords if keyword.arg == name]
            by_place = call.args[at : at + 1] if at is not None else []
            found += [Place(value, scope) for value in (*by_name, *by_place)]
        return found or [_NOTHING]

    def _follow_call(self, place: Place) -> None:
        node, scope = place
        name = _name(node.func)
        if self._functions[name] or self._stored[name] or not isinstance(node.func, (ast.Name, ast.Attribute)):
            self._follow(Place(node.func, scope))
            if isinstance(node.func, ast.Name):  # a function that is a parameter or a variable
                return
        if isinstance(node.func, ast.Name) and name in self._classes:
            return
        if not self._functions[name] and name in _PASS_ON:
            of = [node.func.value] if isinstance(node.func, ast.Attribute) else []
            self._follow_all([Place(value, scope) for value in (*of, *node.args)])

    def _returned(self, name: str) -> list[Place]:
        found = []
        for function, scope in self._functions[name]:
            if function.returns is None or not _TEXT.search(ast.unparse(function.returns)):
                continue
            inner = (*scope, function)
            found += [Place(x.node.value, x.scope) for x in _walk(function, inner) if _returns(x, function)]
        return found

    def _add(self, place: Place, text: object) -> None:
        if isinstance(text, str) and _WORDS.search(text):
            self.found.setdefault(text, self._where(place))

    def _where(self, place: Place) -> str:
        return f"{self._files[place.scope[0]]}:{place.node.lineno}"


def _walk(node: ast.AST, scope: tuple[ast.AST, ...]) -> Iterator[Place]:
    for child in ast.iter_child_nodes(node):
        yield Place(child, scope)
        encloses = isinstance(child, (*_FUNCTIONS, ast.ClassDef, ast.GeneratorExp, ast.ListComp))
        yield from _walk(child, (*scope, child) if encloses else scope)


def _returns(place: Place, function: ast.AST) -> bool:
    return isinstance(place.node, ast.Return) and place.node.value is not None and place.function is function


def _assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The targets of an assignment, a loop or a `with`, each with the expression that it gets a value from."""
    if isinstance(node, ast.Assign):
        pairs = [(target, node.value) for target in node.targets]
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) and node.value is not None:
        pairs = [(node.target, node.value)]
    elif isinstance(node, (ast.For, ast.comprehension)):
        pairs = [(node.target, node.iter)]
    else:
        pairs = []
    for target, value in pairs:
        if not isinstance(target, ast.Tuple):
            yield target, value
        elif isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
            yield from zip(target.elts, value.elts, strict=True)
        else:
            yield from ((element, value) for element in target.elts)


def _bound(around: ast.AST, name: str) -> list[ast.expr]:
    """What is assigned to the variable `name` in a function or comprehension."""
    return [value for target, value in _assigned(around) if isinstance(target, ast.Name) and target.id == name]


@cache
def _assigned(around: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    return [pair for place in _walk(around, (around,)) for pair in _assignments(place.node)]


def _called(function: ast.AST, scope: tuple[ast.AST, ...]) -> str:
    """The name by which a function is called; a class's for its `__init__`."""
    name = getattr(function, "name", "")
    return scope[-2].name if name == "__init__" else name


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
