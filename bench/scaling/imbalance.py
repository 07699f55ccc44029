"""How much longer a step takes when ranks have unequal batches: all wait for the rank with the most work.

Rows are drawn at random from a distribution of lengths (bench.core.lengths). A packed batch costs the operations of its real
tokens (bench.core.flops), a padded one those of its rows at the length of its longest. Balanced: the rows of all ranks are
dealt out as bench train does it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.core.flops import forward_flops
from bench.core.lengths import Lengths
from bench.train.sharding import deal

POPULATION = 4096  # lengths that rows are drawn from
BALANCED_STEPS = 4  # they hardly differ, and dealing 131,072 rows takes a quarter of a second


@dataclass(frozen=True)
class Rows:
    """Rows per rank, and the lengths that they are drawn from."""

    rows: int
    seqlen: int = 512
    fill: float = 0.5
    lengths: Lengths = Lengths()

    def population(self) -> np.ndarray:
        return np.array(self.lengths.of_batch(POPULATION, self.seqlen, self.fill))


@dataclass(frozen=True)
class Stretch:
    """Time of a step in which ranks wait for the slowest, over its time if the same work were shared equally: the mean over
    simulated steps, for packed batches as drawn, for packed and balanced ones, and for padded ones as drawn."""

    drawn: float
    balanced: float
    padded: float


def stretch(config: Any, rows: Rows, ranks: int, steps: int, seed: int = 0) -> Stretch:
    """Draw the batches of `steps` steps. `padded` is relative to packed work, so it holds what padding costs too."""
    lengths = np.random.default_rng(seed).choice(rows.population(), size=(steps, ranks, rows.rows))
    costs = _costs(config, rows.seqlen)
    even = costs[lengths].sum(axis=2).mean(axis=1)
    longest = lengths.max(axis=2)

    def mean(work: np.ndarray) -> float:
        return float((work.max(axis=1) / even).mean())

    dealt = [_dealt(of_step.ravel(), costs, ranks) for of_step in lengths[:BALANCED_STEPS]]
    return Stretch(
        drawn=mean(costs[lengths].sum(axis=2)),
        balanced=float(np.mean(dealt)),
        padded=mean(costs[longest] * rows.rows),
    )


def _dealt(lengths: np.ndarray, costs: np.ndarray, ranks: int) -> float:
    """The work of the rank that has most after dealing, over that of an equal share."""
    work = [costs[lengths[part]].sum() for part in deal(lengths.tolist(), ranks)]
    return max(work) * ranks / sum(work)


def _costs(config: Any, seqlen: int) -> np.ndarray:
    """Operations of one row, by its length from 0 to seqlen."""
    return np.array([forward_flops(config, "pretraining", [n]) for n in range(seqlen + 1)], dtype=np.float64)
