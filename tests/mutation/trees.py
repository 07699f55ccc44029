"""Makes copies of the tree in which faults are planted."""

import shutil
from pathlib import Path

from tests.mutation.fault import ROOT, Fault

# Files that no test reads, some of them large. A copied .git would be another repository.
LEFT_OUT = (".git", ".venv*", ".ruff_cache", ".pytest_cache", ".hypothesis", "*.egg-info", "build", "dist", "bench-out")


def copy(source: Path, target: Path) -> Path:
    """Copy `source` to `target` with links and times, so that Python's compiled files are valid in both."""
    return Path(shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT)))


def plant(fault: Fault, tree: Path) -> None:
    path = tree / fault.file
    path.write_text(fault.planted(path.read_text()))
    # Its time and size may match those of the compiled file.
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def keep_compiled(tree: Path, base: Path) -> None:
    """Copy the files that Python compiled in `tree` to `base`, for later copies."""
    for compiled in tree.rglob("__pycache__/*.pyc"):
        kept = base / compiled.relative_to(tree)
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            shutil.copy2(compiled, kept)


def problems(faults: list[Fault]) -> list[str]:
    """One line per fault that cannot be planted in the current tree."""
    found = []
    for fault in faults:
        try:
            fault.planted((ROOT / fault.file).read_text())
        except (OSError, ValueError) as error:
            found.append(str(error))
    return found
