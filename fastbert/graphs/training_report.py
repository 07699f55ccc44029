"""Counts which steps of a `graphed_step` were replayed and why the others ran as usual."""

import logging
from collections import Counter
from dataclasses import dataclass, field

logger = logging.getLogger("fastbert")
WARMING_UP = "warming up before a capture"
CHANGED = "something that a graph relies on has changed"
RARE = "a rare shape, and max_graphs others have graphs"
_EXPECTED = (WARMING_UP, CHANGED, RARE)


@dataclass
class StepReport:
    """What the calls of a `graphed_step` did.

    model: the name of the model's class.
    graphs: how many shapes have a graph now.
    captured: how many graphs of shapes were captured so far.
    replayed: calls that replayed a graph.
    ordinary: calls that ran as usual, by reason.
    """

    model: str
    graphs: int = 0
    captured: int = 0
    replayed: int = 0
    ordinary: Counter[str] = field(default_factory=Counter)

    def count(self, reason: str) -> None:
        """Count an ordinary call, and log its reason when it is new and not part of every run."""
        if reason not in self.ordinary and reason not in _EXPECTED:
            logger.warning("graphed_step of %s: a step runs without a graph: %s", self.model, reason)
        self.ordinary[reason] += 1

    def copy(self) -> "StepReport":
        return StepReport(self.model, self.graphs, self.captured, self.replayed, Counter(self.ordinary))

    def __str__(self) -> str:
        total = self.replayed + self.ordinary.total()
        lines = [f"graphed_step of {self.model}: {self.replayed} of {total} steps replayed, {self.graphs} graphs now"]
        lines += [f"  {number} without a graph: {reason}" for reason, number in self.ordinary.most_common()]
        return "\n".join(lines)
