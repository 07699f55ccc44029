"""Streams run their tasks in order and wait for events."""

import pytest

from bench.scaling.schedule import Span, Task, run


def test_streams_overlap_and_wait():
    found = run(
        [
            Task("a", "compute", 2.0),
            Task("b", "network", 5.0, ("a",)),
            Task("c", "compute", 1.0),
            Task("d", "network", 1.0),  # waits for b, the task before it
            Task("e", "compute", 1.0, ("b", "c")),
        ]
    )
    assert found == {"a": Span(0, 2), "b": Span(2, 7), "c": Span(2, 3), "d": Span(7, 8), "e": Span(7, 8)}


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([Task("a", "compute", 1.0), Task("a", "network", 1.0)], "two tasks are called 'a'"),
        ([Task("a", "compute", 1.0, ("b",)), Task("b", "network", 1.0)], "'a' waits for 'b'"),
    ],
)
def test_orders_that_no_stream_has(tasks, said):
    with pytest.raises(ValueError, match=said):
        run(tasks)
