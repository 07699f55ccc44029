"""In which direction the folders of bench/ import each other, and that neither folders nor modules go round in a circle.

The sources are parsed, not imported, so an import inside a function counts as any other.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What each folder may import beside itself.
FOLDERS = {
    "core": (),
    "audit": ("core",),
    "models": ("core",),
    "encode": ("core", "models"),
    "host": ("core", "models", "encode"),
    "ops": ("core", "audit", "models"),
    "tune": ("core", "audit", "ops"),
    "report": ("core", "host", "tune"),
    "stream": ("core",),
    "train": ("core", "report", "stream"),
    "scaling": ("core", "models", "report", "train"),
    "runner": ("core", "audit", "models", "encode", "host", "ops", "tune", "report"),
}
# The command line stands above all folders: the command.py of each is a part of it, and nothing but __main__ imports those.
ARROWS = FOLDERS | {
    "command": tuple(FOLDERS),
    "__main__": ("core", "command"),
    "pytest": ("core", "ops"),
}
PYTEST = ("bench.conftest", "bench.bench_ops", "bench.bench_optimizers")
Imports = dict[str, set[str]]  # by module: the modules of bench and tests that it imports


def sources(root: Path) -> dict[str, str]:
    """The text of each module of bench/, by its name."""
    files = {path: path.relative_to(root).with_suffix("").parts for path in sorted(root.glob("bench/**/*.py"))}
    return {".".join(parts).removesuffix(".__init__"): path.read_text() for path, parts in files.items()}


def imports(texts: dict[str, str]) -> Imports:
    return {module: set(_imported(text, texts)) for module, text in texts.items()}


def _imported(text: str, known: dict[str, str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "absolute imports only"
            # `from bench.core import schema` names a module, `from bench.core.schema import read` what is in one.
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in inside]
        yield from (name for name in names if name.split(".")[0] in ("bench", "tests"))


def room(module: str) -> str:
    """The folder of a module, or what stands above the folders."""
    if module in PYTEST:
        return "pytest"
    parts = module.split(".")
    return "command" if parts[2:] == ["command"] else "tests" if parts[0] == "tests" else parts[min(1, len(parts) - 1)]


def complaints(found: Imports) -> list[str]:
    """What imports what it must not, and the first circle of modules."""
    wrong = [
        f"{module} imports {name}"
        for module, names in sorted(found.items())
        for name in sorted(names)
        if room(name) != room(module) and room(name) not in ARROWS[room(module)]
    ]
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        wrong.append(f"a circle of {', '.join(sorted(set(error.args[1])))}")
    return wrong


def test_folders_import_in_one_direction():
    assert complaints(imports(sources(ROOT))) == []


def test_the_arrows_make_no_circle():
    TopologicalSorter(ARROWS).prepare()
    folders = {path.parent.name for path in ROOT.glob("bench/*/__init__.py")}
    assert folders == FOLDERS.keys(), "each folder has its place"


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("bench.core.timing", "from bench.models import batches", "bench.core.timing imports bench.models.batches"),
        ("bench.audit.run", "def f():\n    import bench.tune.run", "bench.audit.run imports bench.tune.run"),
        ("bench.host.run", "from bench.host.command import host", "bench.host.run imports bench.host.command"),
        ("bench.runner.plan", "from bench.__main__ import app", "bench.runner.plan imports bench.__main__"),
        ("bench.ops.run", "from tests.bench import data", "bench.ops.run imports tests.bench"),
        (
            "bench.core.records",
            "def f():\n    from bench.core import schema",
            "a circle of bench.core.records, bench.core.schema",
        ),
    ],
)
def test_each_fault_is_found(module, line, said):
    texts = sources(ROOT)
    assert said in complaints(imports(texts | {module: f"{texts[module]}\n{line}\n"}))
