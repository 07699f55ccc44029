"""Shared by the tests of graphs on the CPU."""

import pytest

from fastbert.testing.graphs import recording_graphs


@pytest.fixture
def recorders():
    """Graphs are recorded on the CPU; the list of the recorders that a test makes."""
    with recording_graphs() as made:
        yield made
