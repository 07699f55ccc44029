"""Copies of the tree to plant faults in."""

import shutil
from pathlib import Path

from tests.mutation.fault import ROOT, Fault

# What no test reads, some of it large. A test's own .git would be another repository.
LEFT_OUT = (".git", ".venv*", ".ruff_cache", ".pytest_cache", ".hypothesis", "*.egg-info", "build", "dist", "bench-out")


def copy(source: Path, target: Path) -> Path:
    """`target`, a copy of `source` with its links and times: what Python compiled of the one serves the other too."""
    return Path(shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT)))


def plant(fault: Fault, tree: Path) -> None:
    path = tree / fault.file
    path.write_text(fault.planted(path.read_text()))
    # Its time and size may be those of what was compiled.
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def keep_compiled(tree: Path, base: Path) -> None:
    """Give `base` what Python compiled in `tree`, for the copies to come."""
    for compiled in tree.rglob("__pycache__/*.pyc"):
        kept = base / compiled.relative_to(tree)
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            shutil.copy2(compiled, kept)


def problems(faults: list[Fault]) -> list[str]:
    """A line for each fault that cannot be planted in today's tree."""
    found = []
    for fault in faults:
        try:
            fault.planted((ROOT / fault.file).read_text())
        except (OSError, ValueError) as error:
            found.append(str(error))
    return found
