"""The long description: README.md with its links into the repository as plain paths.

A package index shows the README away from the repository, where a relative link leads nowhere. Everything else about the
package is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

NOTE = "*Paths on this page are those of the source distribution and of the repository.*"


def long_description(readme: str) -> str:
    """The README for a package index: `[guide](docs/serving.md)` becomes `guide (docs/serving.md)`; pictures are left out."""
    parts = re.split(r"(^```.*?^```$)", readme, flags=re.DOTALL | re.MULTILINE)  # every second one is a block of code
    title, rest = "".join(part if part.startswith("```") else _without_links(part) for part in parts).split("\n", 1)
    return f"{title}\n\n{NOTE}\n{rest}"


def _without_links(text: str) -> str:
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    text = re.sub(r"\[([^\]]+)\]\(#[^)]*\)", r"\1", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)([^)]+)\)", lambda link: _plain(*link.groups()), text)


def _plain(label: str, path: str) -> str:
    return label if label.strip("`") == path else f"{label} ({path})"


if __name__ == "__main__":  # as a build runs it; a test imports the function alone
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    setup(long_description=long_description(readme), long_description_content_type="text/markdown")
