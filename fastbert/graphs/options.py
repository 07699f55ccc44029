"""How a model was asked to use graphs."""

from dataclasses import dataclass

from fastbert.graphs.buckets import Buckets


@dataclass(frozen=True)
class Options:
    """The arguments of `fastbert.graphed`."""

    buckets: Buckets = Buckets()
    max_graphs: int = 64
    reuse_outputs: bool = False
