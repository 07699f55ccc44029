"""What a fault is: a piece of source text that stands once in a file, what replaces it, and the tests that should notice."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """`says` is the line that describes it. `tests` are pytest's arguments, the fewest and quickest that are about it.

    op: the op (fastbert/testing/specs) whose kernel or launcher it is in, "" for what stands around the kernels.
    short: one of the two nastiest of its op, which `--short` plants.
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
        """The file's text with the fault in it.

        Raises:
            ValueError: `before` does not stand in the text exactly once.
        """
        found = text.count(self.before)
        if found != 1:
            raise ValueError(f"{self.name}: its text stands {found} times in the file, not once")
        return text.replace(self.before, self.after)
