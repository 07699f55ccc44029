"""The documents of a release agree: version, date, citation, and the page that a package index shows."""

import re
import runpy
from datetime import date
from pathlib import Path

import pytest
import yaml

import fastbert

from .environments import ROOT

CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
RELEASES = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", CHANGELOG, re.MULTILINE)
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
LINK = re.compile(r"\]\((?!https?:)([^)]*)\)|(?:src|href|srcset)=\"(?!https?:)([^\"]*)\"")


def test_the_newest_release_of_the_changelog_is_the_version() -> None:
    assert RELEASES[0][0] == fastbert.__version__


def test_releases_are_listed_newest_first() -> None:
    versions = [tuple(map(int, version.split("."))) for version, _ in RELEASES]
    dates = [date.fromisoformat(day) for _, day in RELEASES]
    assert versions == sorted(set(versions), reverse=True) and dates == sorted(dates, reverse=True)


def test_every_section_of_the_changelog_has_a_known_name() -> None:
    headings = set(re.findall(r"^##+ (.*)$", CHANGELOG, re.MULTILINE))
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Not measured"}
    assert headings - kinds == {"[Unreleased]", *(f"[{version}] - {day}" for version, day in RELEASES)}


def test_the_citation_is_of_the_newest_release() -> None:
    # What the Citation File Format 1.2.0 requires, then what is said twice.
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()
    assert CITATION["cff-version"] == "1.2.0" and all(set(author) == {"name"} for author in CITATION["authors"])
    assert (CITATION["version"], CITATION["date-released"].isoformat()) == RELEASES[0]
    assert CITATION["license"] == "Apache-2.0" and CITATION["type"] == "software"


def test_the_security_policy_supports_the_newest_release() -> None:
    supported = re.findall(r"^\| (\d+\.\d+)\.x \| yes \|$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert supported == [fastbert.__version__.rpartition(".")[0]]


@pytest.fixture(scope="module")
def long_description():
    """The function of setup.py that makes the page of a package index."""
    return runpy.run_path(str(ROOT / "setup.py"))["long_description"]


def test_the_page_of_a_package_index_leads_nowhere_that_does_not_exist(long_description) -> None:
    readme = (ROOT / "README.md").read_text()
    assert LINK.search(readme)  # otherwise this test proves nothing
    page = long_description(readme)
    assert not LINK.search(page), LINK.search(page)
    # Code stays as it is, and every path that was linked is still named.
    blocks = re.findall(r"^```.*?^```$", readme, re.MULTILINE | re.DOTALL)
    assert blocks and all(block in page for block in blocks)
    documents = {path for path, _ in LINK.findall(readme) if path.endswith(".md")}
    assert [path for path in documents if path not in page] == []


def test_links_become_plain_paths(long_description) -> None:
    readme = "# x\nSee [a guide](docs/a.md), [docs/b.md](docs/b.md), [below](#c), [out](https://example.org).\n![p](p.svg)\n\n"
    readme += "```\nnames[0](x)\n```\n"
    page = long_description(readme).split("\n", 3)[3]
    assert page == "See a guide (docs/a.md), docs/b.md, below, [out](https://example.org).\n```\nnames[0](x)\n```\n"


@pytest.mark.parametrize("page", ["CHANGELOG.md", "SECURITY.md", "docs/deprecations.md"])
def test_links_of_release_documents_lead_to_files(page: str) -> None:
    targets = [target for target, _ in LINK.findall((ROOT / page).read_text())]
    assert [target for target in targets if not (ROOT / page).parent.joinpath(Path(target)).exists()] == []
