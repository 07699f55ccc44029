"""docs/adding-a-kernel.md: each excerpt is in the file that it names, and the op runs."""

from pathlib import Path

from tests.docs.blocks import ROOT, blocks
from tests.docs.play import Play


def play(folder: Path) -> Play:
    excerpts = [block for block in blocks("docs/adding-a-kernel.md") if block.language == "text"]
    assert excerpts
    for block in excerpts:
        name, _, text = block.text.partition("\n")
        assert text in (ROOT / name.removeprefix("# ")).read_text(), f"{block}: not an excerpt of {name}"
    yield {}
