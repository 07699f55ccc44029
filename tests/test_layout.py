"""Checks that each op has its four places (CONTRIBUTING: how to add a kernel), and that no file contains what it
should not.

The sources are parsed, not imported, so the checks also run on altered copies, which shows that they can fail.
"""

import ast
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.environments import ROOT, source_files


def complaints(root: Path) -> list[str]:
    """One line per missing part of an op under `root`: kernel, reference, test, spec."""
    found = []
    described = specs(root)
    for op, path, reference in ops(root / "kernels"):
        name, name_of_reference = path.relative_to(root), reference.relative_to(root)
        public = functions(path).get(op)
        if public is None or exports(path) != [op]:
            found.append(f"{name}: its only export must be the function {op}")
        definition = functions(reference).get(op) if reference.is_file() else None
        if definition is None:
            found.append(f"{name_of_reference}: no function {op}")
        elif public is not None and signature(public) != signature(definition):
            found.append(f"{name_of_reference}: {op} does not take what the kernel takes")
        if not (test := place_of_test(root, op, path)).is_file():
            found.append(f"{test.relative_to(root)}: missing")
        if op not in described:
            found.append(f"fastbert/testing/specs/{op}.py: no SPEC")
    return found


def ops(kernels: Path) -> list[tuple[str, Path, Path]]:
    """Each op with the file of its public function and that of its reference.

    Everything in kernels/ is an op, either a file or a folder
    with an __init__, except core/ and reference.py, which has the references of the other ops.
    """
    shared = kernels / "reference.py"
    files = [path for path in sorted(kernels.glob("*.py")) if path != shared]
    folders = sorted(path.parent for path in kernels.glob("*/__init__.py") if path.parent.name != "core")
    own = {folder: folder / "reference.py" for folder in folders}
    return [
        *((path.stem, path, shared) for path in files),
        *((folder.name, folder / "__init__.py", own[folder] if own[folder].is_file() else shared) for folder in folders),
    ]


def place_of_test(root: Path, op: str, path: Path) -> Path:
    """The path of an op's first test: beside the others, or in a folder that mirrors its sources."""
    tests = root / "tests" / "kernels"
    return (tests / op if path.name == "__init__.py" else tests) / f"test_{op}.py"


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def assigned(path: Path, name: str) -> ast.expr | None:
    """The value that the module at `path` assigns to `name`."""
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value
    return None


def exports(path: Path) -> list[str]:
    value = assigned(path, "__all__")
    return [] if value is None else ast.literal_eval(value)


def specs(root: Path) -> set[str]:
    """The ops that have a spec for tests, the audit and the benchmarks."""
    files = (root / "fastbert" / "testing" / "specs").glob("*.py")
    return {path.stem for path in files if assigned(path, "SPEC") is not None}


def signature(function: ast.FunctionDef) -> tuple[list[str], dict[str, str]]:
    """Positional parameters in order, and keywords with their defaults.

    The kernel's `seed` of dropout corresponds to the reference's mask `keep`.
    """
    arguments = function.args
    keywords = {
        "keep" if argument.arg == "seed" else argument.arg: ast.unparse(default) if default else "required"
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    }
    positional = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args]]
    return [*positional, *map(ast.unparse, arguments.defaults)], keywords


def test_every_kernel_has_its_four_places() -> None:
    assert complaints(ROOT) == []


def edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new))

    return change


def add_a_kernel_alone(root: Path) -> None:
    (root / "kernels" / "twice.py").write_text('__all__ = ["twice"]\n\n\ndef twice(x):\n    return 2 * x\n')


def add_a_folder_alone(root: Path) -> None:
    (root / "kernels" / "thrice").mkdir()
    (root / "kernels" / "thrice" / "__init__.py").write_text('__all__ = ["thrice"]\n\n\ndef thrice(x):\n    return 3 * x\n')


def remove_a_test(root: Path) -> None:
    (root / "tests" / "kernels" / "test_bias_gelu.py").unlink()


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        (add_a_kernel_alone, "kernels/reference.py: no function twice"),
        (add_a_kernel_alone, "tests/kernels/test_twice.py: missing"),
        (add_a_kernel_alone, "fastbert/testing/specs/twice.py: no SPEC"),
        (add_a_folder_alone, "kernels/reference.py: no function thrice"),
        (add_a_folder_alone, "tests/kernels/thrice/test_thrice.py: missing"),
        (add_a_folder_alone, "fastbert/testing/specs/thrice.py: no SPEC"),
        (
            edit("kernels/encoder_layer/__init__.py", '__all__ = ["encoder_layer"]', ""),
            "kernels/encoder_layer/__init__.py: its only export",
        ),
        (
            edit("kernels/encoder_layer/reference.py", "    max_seqlen_q: int | None = None,\n", ""),
            "kernels/encoder_layer/reference.py: encoder_layer does not",
        ),
        (remove_a_test, "tests/kernels/test_bias_gelu.py: missing"),
        (edit("kernels/bias_gelu.py", '__all__ = ["bias_gelu"]', ""), "kernels/bias_gelu.py: its only export"),
        (
            edit("kernels/reference.py", "def bias_gelu(", "def bias_relu("),
            "kernels/reference.py: no function bias_gelu",
        ),
        (
            edit("kernels/reference.py", "def bias_gelu(x", "def bias_gelu(y"),
            "kernels/reference.py: bias_gelu does not",
        ),
        (edit("kernels/reference.py", "1e-12", "1e-5"), "kernels/reference.py: gelu_layernorm does not"),
        (edit("fastbert/testing/specs/bias_gelu.py", "SPEC =", "OTHER ="), "fastbert/testing/specs/bias_gelu.py: no SPEC"),
    ],
)
def test_a_missing_place_is_noticed(change: Callable[[Path], object], noticed: str, tmp_path: Path) -> None:
    for folder in ("kernels", "fastbert/testing", "tests/kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    change(tmp_path)
    assert [line for line in complaints(tmp_path) if line.startswith(noticed)]


def texts() -> dict[Path, str]:
    """Every source file that is text, including the licence and sample data."""
    found = {}
    for path in source_files():
        content = (ROOT / path).read_bytes() if (ROOT / path).is_file() else b""
        if b"\0" not in content:
            found[path] = content.decode()
    return found


def test_no_file_is_too_long_to_read() -> None:
    lengths = {str(path): text.count("\n") for path, text in texts().items() if path.suffix == ".py"}
    assert {path: length for path, length in lengths.items() if length > 500} == {}


def test_no_file_names_a_folder_of_someones_machine() -> None:
    absolute = re.compile(r"(?<![\w.:/])/(?:home|root|Users|tmp|work|workspace|mnt|opt)/\w\S*")
    found = {str(path): absolute.findall(text) for path, text in texts().items()}
    assert {path: names for path, names in found.items() if names} == {}
