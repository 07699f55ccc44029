"""Results of collectives that may still be under way.

torch's functional collectives, which DTensor and tensor parallelism use, return an AsyncCollectiveTensor: a tensor without
memory of its own, whose first use in a torch op waits for the collective. A kernel reads an address, so an op waits itself.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any


def waited(values: Sequence[Any]) -> Sequence[Any]:
    """The values, each result of a collective replaced by the plain tensor that it stands for, which is complete."""
    if not any(map(is_pending, map(type, values))):
        return values
    return [value.trigger_wait() if is_pending(type(value)) else value for value in values]


@cache
def is_pending(cls: type) -> bool:
    """Whether `cls` is AsyncCollectiveTensor, which is not imported because a torch build may lack it."""
    return hasattr(cls, "trigger_wait")
