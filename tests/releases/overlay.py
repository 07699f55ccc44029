"""Installs other releases of a package into folders that go in front of the installed one, so torch is installed once."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastbert-releases"
# Optional for transformers, which imports it if it is installed.
_BESIDE = ("kernels",)
# Before 3.7 triton's interpreter fails under NumPy 2.4 on loops that end at a tensor.
_NUMPY_BEFORE = Version("3.7"), "numpy<2.4"


class Unavailable(Exception):
    """pip does not find a release."""


def of_transformers(release: str, cache: Path) -> list[Path]:
    """The folders for a transformers release: its own, and one per installed package whose version it does not accept."""
    own = folder(f"transformers=={release}", cache)
    found = [own]
    for name, requirement in unmet_requirements(own).items():
        if name not in _BESIDE:
            found.append(folder(requirement, cache))
            continue
        with suppress(Unavailable):  # then transformers, which checks the version, does without it
            beside = folder(requirement, cache)
            found += [beside] * imports(name, beside)
    return found


def imports(name: str, overlay: Path) -> bool:
    """Whether the package can be imported from there; one with a missing dependency cannot."""
    command = [sys.executable, "-c", f"import {name}"]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(overlay)}, capture_output=True).returncode == 0


def of_triton(release: str, cache: Path) -> list[Path]:
    before, numpy = _NUMPY_BEFORE
    old = Version(release) < before and Version(metadata.version("numpy")) >= Version("2.4")
    return [folder(f"triton=={release}", cache), *([folder(numpy, cache)] if old else [])]


def unmet_requirements(overlay: Path) -> dict[str, str]:
    """The requirements of the distribution in `overlay` that the installed packages do not meet, by name."""
    (distribution,) = metadata.distributions(path=[str(overlay)])
    wrong: dict[str, str] = {}
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.name in _BESIDE:
            with suppress(metadata.PackageNotFoundError):  # a package that is not installed is not imported
                if not requirement.specifier.contains(metadata.version(requirement.name), prereleases=True):
                    wrong[requirement.name] = f"{requirement.name}{requirement.specifier}"
    return wrong


def folder(requirement: str, cache: Path) -> Path:
    """The folder in which `requirement` is installed without its dependencies; pip runs the first time only.

    Raises:
        Unavailable: pip does not find the release.
    """
    path = cache / re.sub(r"[^\w.=-]+", "_", requirement)
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Installed elsewhere first, so that an interrupted install is not reused.
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            options = ["--quiet", "--no-deps", "--disable-pip-version-check", "--target", f"{unfinished}/of"]
            command = [sys.executable, "-m", "pip", "install", *options, requirement]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise Unavailable(f"{requirement}: {done.stderr.strip().splitlines()[-1]}")
            shutil.move(f"{unfinished}/of", path)
    return path


def environment(folders: list[Path], root: Path) -> dict[str, str]:
    """The environment variables of a process with these folders first on its path."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(filter(None, [*map(str, folders), str(root), *inherited]))
    return os.environ | {
        "PYTHONPATH": path,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }


def pairs(transformers: list[str], triton: list[str]) -> Iterator[tuple[str, str]]:
    """Every transformers release with every triton release, oldest first."""
    for one in sorted(set(transformers), key=Version):
        for other in sorted(set(triton), key=Version):
            yield one, other
