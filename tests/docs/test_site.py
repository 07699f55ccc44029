"""The site of the documentation: it builds, asks no other server for anything, and its reference has every public name."""

import re

import pytest

import fastbert
from tests.docs.blocks import ROOT

pytest.importorskip("mkdocs", reason="comes with the extra 'docs'")
pytest.importorskip("mkdocs_autorefs", reason="comes with the extra 'docs'")

LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*>")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the reference is read from the sources, found from here
        build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_every_page_is_there(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}
    start = (site / "index.html").read_text()
    unreached = {str(page) for page in pages if f'href="{page}"' not in start} - {"index.html"}
    assert not unreached, "not in the navigation"


def test_nothing_is_loaded_from_elsewhere(site):
    found = {str(path): LOADED.findall(path.read_text()) for path in site.rglob("*.html")}
    assert {path: tags for path, tags in found.items() if tags} == {}
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", styles)
    assert LOADED.search('<link rel="stylesheet" href="https://example.org/a.css">'), "the pattern finds them"


def test_the_reference_has_every_public_name(site):
    reference = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    documented = {name.rpartition(".")[2] for name in re.findall(r'<h2 id="(fastbert\.[\w.]+)"', reference)}
    assert set(fastbert.__all__) - documented == set()
