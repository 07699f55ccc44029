"""Which faults the soak injects, and in which steps: drawn once from a seed, so that a run can be repeated."""

import random
from typing import NamedTuple

from tests.soak.training import on_kernels

# What is injected, with how often: one in so many steps. Each is injected once at least.
SHARES = {
    "out of memory in a forward": 200,
    "out of memory in a backward": 200,
    "out of memory in an optimizer step": 200,
    "interrupted": 200,
    "kernel fails once": 100,
    "kernel fails from now on": 500,
    "kernel does not compile": 500,
    "optimizer's kernel fails": 500,
    "cache is full": 500,
    "cache is read-only": 500,
    "cache has vanished": 500,
    "cache is damaged": 500,
    "unpatched and patched again": 250,
    "patched without attention": 500,
    "verified": 1000,
    "reported": 100,
    "called by another thread": 250,
    "killed": 500,
    "killed while saving": 1000,
}
KILLS = ("killed", "killed while saving")
# These are about kernels of the model, so they are injected in a step that runs on them.
OF_THE_MODEL = tuple(kind for kind in SHARES if kind.startswith(("kernel", "cache")))


class Fault(NamedTuple):
    """A fault in the step after `step` done ones; `place` in [0, 1) says where in that step."""

    step: int
    kind: str
    place: float


def drawn(steps: int, seed: int) -> list[Fault]:
    """The faults of a run of so many steps, no two of them in one step, in the order of steps.

    The first step's is an optimizer step that runs out of memory, because it creates the optimizer's state. Processes are
    killed in the first third only, so that the last one is watched for leaks over the other two.
    """
    chance = random.Random(seed)
    kinds = ["out of memory in an optimizer step"]
    kinds += [kind for kind, share in SHARES.items() for _ in range(max(1, steps // share))]
    free, found = set(range(1, steps)), [Fault(0, kinds.pop(0), chance.random())]
    for kind in sorted(kinds, key=lambda kind: kind not in KILLS):
        allowed = sorted(
            step
            for step in free
            if (kind not in KILLS or step < max(steps // 3, 2)) and (kind not in OF_THE_MODEL or on_kernels(step))
        )
        step = chance.choice(allowed)
        free.remove(step)
        found.append(Fault(step, kind, chance.random()))
    return sorted(found)
