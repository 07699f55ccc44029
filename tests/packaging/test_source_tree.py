"""pyproject.toml, the folders and the documents agree with each other."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from .environments import ROOT, run

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_kernels_is_a_folder_without_init_behind_a_relative_link() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "fastbert" / "kernels") == "../kernels"


def test_git_keeps_the_link_a_link() -> None:
    assert run(["git", "ls-files", "--stage", "fastbert/kernels"], ROOT).startswith("120000 ")


def test_every_package_folder_is_listed(sources: list[Path]) -> None:
    files = [path for path in sources if path.suffix == ".py"]
    names = {".".join(path.parent.parts) for path in files if path.parts[0] == "fastbert"}
    names |= {".".join(("fastbert", *path.parent.parts)) for path in files if path.parts[0] == "kernels"}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == names


def test_every_other_file_is_package_data(sources: list[Path]) -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["fastbert"]
    shipped = {path for pattern in patterns for path in (ROOT / "fastbert").glob(pattern)}
    others = {ROOT / path for path in sources if path.parts[0] == "fastbert" and path.suffix != ".py"}
    assert others - {ROOT / "fastbert" / "kernels"} == shipped


def test_import_is_light_where_fastbert_is_the_program(tmp_path) -> None:
    """The command line switches on Triton's interpreter after this import and before triton is imported."""
    report = "import atexit, sys; atexit.register(lambda: print(sorted({'triton', 'transformers'} & sys.modules.keys())))"
    (tmp_path / "sitecustomize.py").write_text(report)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    script = tmp_path / "fastbert"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import fastbert")
    for command in (["-m", "fastbert", "--help"], [str(script)]):
        output = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert output.stdout.splitlines()[-1] == "[]", output


def test_every_dependency_is_pinned() -> None:
    project = PYPROJECT["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    pins = re.findall(r"^([\w-]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {re.match(r"[\w-]+", name)[0] for name in wanted} <= set(pins)
    assert len(pins) == len(set(pins))


COMMANDS = {
    "README.md": ['pip install -c constraints.txt -e ".[test]"', "python -m pytest -n 2"],
    "CONTRIBUTING.md": ['pip install -c constraints.txt -e ".[docs]"', "mkdocs build --strict"],
}


def test_ci_runs_the_commands_of_the_documents() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    found = re.findall(r"^(?:pip install|python -m pytest|mkdocs).*$", ci, re.MULTILINE)
    assert sorted(found) == sorted(sum(COMMANDS.values(), []))
    for document, commands in COMMANDS.items():
        text = (ROOT / document).read_text()
        assert [command for command in commands if command not in text] == []
