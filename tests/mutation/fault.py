"""Defines a fault: a piece of source text that occurs once in a file, its replacement, and the tests that should notice."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """A fault. `says` describes it in one line; `tests` are pytest arguments, the fewest and quickest that cover it.

    op: the op (fastbert/testing/specs) whose kernel or launcher contains it, "" for code outside the kernels.
    short: one of the two subtlest of its op, which `--short` plants.
    """

    says: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    op: str = ""
    short: bool = False

    @property
    def name(self) -> str:
        return f"{self.file}: {self.says}"

    def planted(self, text: str) -> str:
        """The file's text with the fault planted.

        Raises:
            ValueError: `before` does not occur exactly once in the text.
        """
        found = text.count(self.before)
        if found != 1:
            raise ValueError(f"{self.name}: its text stands {found} times in the file, not once")
        return text.replace(self.before, self.after)
