"""Streams that run their tasks in order and wait for events of others, as CUDA streams do."""

from collections.abc import Iterable
from dataclasses import dataclass

COMPUTE, NETWORK, BETWEEN_NODES = "compute", "network", "network between nodes"


@dataclass(frozen=True)
class Task:
    """Work of one stream. It starts when the stream's task before it and all tasks in `after` have ended."""

    name: str
    stream: str
    seconds: float
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Span:
    start: float
    end: float


def run(tasks: Iterable[Task]) -> dict[str, Span]:
    """When each task runs, by name. Tasks come in the order in which they are issued.

    Raises:
        ValueError: a task waits for one that is issued after it, or two have one name.
    """
    spans: dict[str, Span] = {}
    free: dict[str, float] = {}
    for task in tasks:
        if task.name in spans:
            raise ValueError(f"two tasks are called {task.name!r}")
        if missing := [name for name in task.after if name not in spans]:
            raise ValueError(f"{task.name!r} waits for {missing[0]!r}, which is not issued before it")
        start = max(free.get(task.stream, 0.0), *(spans[name].end for name in task.after), 0.0)
        spans[task.name] = Span(start, start + task.seconds)
        free[task.stream] = start + task.seconds
    return spans
