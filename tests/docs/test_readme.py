"""README.md is one screen, and its links lead to files and headings that exist. (Building the site checks those of docs/.)"""

import re

from tests.docs.blocks import ROOT

README = (ROOT / "README.md").read_text()
LINES = 90


def anchors(path: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_it_is_one_screen():
    assert README.count("\n") <= LINES


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)#?([^)]*)\)", README)
    assert len(links) > 10
    missing = [
        (path, anchor) for path, anchor in links if not (ROOT / path).is_file() or anchor and anchor not in anchors(path)
    ]
    assert missing == []
