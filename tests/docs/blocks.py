"""The fenced blocks of README.md and of every page in docs/.

A block's language says what a test does with it: `python` runs (play.py), `sh` holds commands (commands.py), `output` is what
the Python block before it prints, and `text` is anything that differs from machine to machine. No other language is allowed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
LANGUAGES = ("python", "sh", "output", "text")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its opening fence, counted from 1."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def run(self, names: dict[str, Any], replaced: dict[str, str] | None = None) -> None:
        """Execute the block in `names`, with these texts replaced. A traceback shows the page's own lines."""
        text = self.text
        for old, new in (replaced or {}).items():
            assert old in text, f"{self}: there is no {old!r} to replace"
            text = text.replace(old, new)
        exec(compile("\n" * self.line + text, str(ROOT / self.page), "exec"), names)


def pages() -> list[str]:
    """All pages by their paths from the root."""
    return ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


def blocks(page: str, text: str | None = None) -> list[Block]:
    """The page's fenced blocks in order; of `text` in place of the file's, if given."""
    tokens = MarkdownIt().parse((ROOT / page).read_text() if text is None else text)
    return [Block(page, t.map[0] + 1, t.info.strip(), t.content) for t in tokens if t.type in ("fence", "code_block") and t.map]
