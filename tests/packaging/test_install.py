"""The library works in all four forms: editable install, wheel, sdist, and run from the root without an install."""

import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from .environments import Environment, make_environment, run

# Imports the given modules and prints their locations.
PROBE = """
import importlib, json, sys
from importlib import metadata
from pathlib import Path
import fastbert

assert callable(fastbert.patch)
for name in sys.argv[1:]:
    importlib.import_module(name)
try:
    distribution = metadata.distribution("fastbert-triton")
    about = {
        "version": distribution.version,
        "license": distribution.metadata["License-Expression"],
        "scripts": [point.value for point in distribution.entry_points],
        "license_files": [str(Path(distribution.locate_file(path)).resolve()) for path in distribution.files
                          if path.name == "LICENSE"],
    }
except metadata.PackageNotFoundError:
    about = None
# A model may select the attention by name without being patched; with its masks, or padding would be seen.
from transformers import masking_utils, modeling_utils
registered = (masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, modeling_utils.ALL_ATTENTION_FUNCTIONS)
assert all("fastbert" in names for names in registered)
folder = str(Path(fastbert.__file__).parent.resolve())
print(json.dumps({"folder": folder, "version": fastbert.__version__, "about": about}))
"""


def package_files(tree: Path) -> set[str]:
    """Every file of the package, as a path below fastbert/; the link is followed."""
    linked = {str(path.relative_to(tree)) for path in (tree / "kernels").rglob("*.py")}
    own = {str(path.relative_to(tree / "fastbert")) for path in (tree / "fastbert").rglob("*") if path.is_file()}
    return linked | {path for path in own if "__pycache__" not in path}


def modules(tree: Path) -> list[str]:
    """The import names of the kernels and of the command line."""
    return [
        "fastbert.__main__",
        *(f"fastbert.kernels.{path.stem}" for path in sorted((tree / "kernels").glob("*.py"))),
        *(f"fastbert.kernels.{path.parent.name}" for path in sorted((tree / "kernels").glob("*/__init__.py"))),
    ]


def probe(environment: Environment, tree: Path, cwd: Path) -> dict:
    found = json.loads(environment.run("-c", PROBE, *modules(tree), cwd=cwd))
    for name in ("kernels/core/launch.py", "layers/__init__.py", "py.typed"):
        assert (Path(found["folder"]) / name).is_file(), name
    return found


def check_installed(environment: Environment, tree: Path, cwd: Path, package: Path) -> None:
    """Check that the package at `package` is installed, with its metadata and its command."""
    found = probe(environment, tree, cwd)
    assert Path(found["folder"]) == package.resolve()
    assert found["about"]["version"] == found["version"]
    assert found["about"]["license"] == "Apache-2.0"
    assert found["about"]["scripts"] == ["fastbert.__main__:main"]
    (licence,) = found["about"]["license_files"]
    assert Path(licence).is_relative_to(environment.folder.resolve())
    assert Path(licence).read_bytes() == (tree / "LICENSE").read_bytes()
    assert (environment.folder / "bin" / "fastbert").is_file()


def site_packages(environment: Environment) -> Path:
    (folder,) = environment.folder.glob("lib/python*/site-packages")
    return folder


@pytest.mark.long  # .ci/run installs it this way
def test_editable(environment: Environment, tree: Path, elsewhere: Path) -> None:
    environment.install("--editable", tree)
    check_installed(environment, tree, elsewhere, tree / "fastbert")
    # Other folders in the root are not importable from elsewhere.
    environment.run("-c", "import kernels; assert 'tree' not in str(kernels.__path__)", cwd=elsewhere)


def check_wheel(wheel: Path, environment: Environment, tree: Path, elsewhere: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    assert names == {f"fastbert/{path}" for path in package_files(tree)}
    assert "\nDescription-Content-Type: text/markdown\n" in metadata and "\n# fastbert\n" in metadata
    environment.install(wheel)
    check_installed(environment, tree, elsewhere, site_packages(environment) / "fastbert")
    assert "verify" in run([environment.folder / "bin" / "fastbert", "--help"], elsewhere)


def test_sdist_and_the_wheel_of_it(environment: Environment, tree: Path, elsewhere: Path) -> None:
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", elsewhere, tree], elsewhere)
    (sdist,), (wheel,) = elsewhere.glob("*.tar.gz"), elsewhere.glob("*.whl")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    # The link has become a folder, because an archive with links would not unpack everywhere.
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.split("/", 1)[-1] for member in members if member.isfile()}
    packaged = {name.removeprefix("fastbert/") for name in names if name.startswith("fastbert/")}
    assert packaged == package_files(tree)
    assert not {name for name in names if name.startswith(("tests/", "bench/", "kernels/", "."))}
    documents = {f"docs/{path.relative_to(tree / 'docs')}" for path in (tree / "docs").rglob("*.md")}
    documents |= {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"}
    assert documents | {"pyproject.toml", "setup.py"} <= names
    check_wheel(wheel, environment, tree, elsewhere)


@pytest.mark.long  # needs what the extra "release" installs
def test_twine_accepts_what_is_built(tree: Path, elsewhere: Path) -> None:
    pytest.importorskip("twine", reason='needs the extra "release"')
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", elsewhere, tree], elsewhere)
    built = [*elsewhere.glob("*.tar.gz"), *elsewhere.glob("*.whl")]
    assert run([sys.executable, "-m", "twine", "check", "--strict", *built], elsewhere).count("PASSED") == len(built) == 2


@pytest.mark.long  # downloads torch
@pytest.mark.timeout(1800)
def test_wheel_in_an_empty_environment(tree: Path, elsewhere: Path) -> None:
    """As a user installs it: whatever pip resolves now, no constraints, no checkout in sight."""
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", elsewhere, tree], elsewhere)
    (wheel,) = elsewhere.glob("*.whl")
    empty = make_environment(elsewhere / "empty", [])
    pip = [sys.executable, "-m", "pip", "--python", empty.python, "install", "--quiet", f"{wheel}[demo]"]
    run(pip, elsewhere, seconds=1500)
    empty.run("-c", "import fastbert", cwd=elsewhere)
    fastbert = empty.folder / "bin" / "fastbert"
    assert "verify" in run([fastbert, "--help"], elsewhere)
    assert "EQUAL: 9 of 9 models" in run([fastbert, "verify"], elsewhere, seconds=900)


@pytest.mark.long
def test_wheel_of_the_tree(environment: Environment, tree: Path, elsewhere: Path) -> None:
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", elsewhere, tree], elsewhere)
    (wheel,) = elsewhere.glob("*.whl")
    check_wheel(wheel, environment, tree, elsewhere)


def test_from_the_root_without_an_install(environment: Environment, tree: Path) -> None:
    found = probe(environment, tree, tree)
    assert Path(found["folder"]) == (tree / "fastbert").resolve()
    assert "verify" in environment.run("-m", "fastbert", "--help", cwd=tree)
