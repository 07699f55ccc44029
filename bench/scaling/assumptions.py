"""Everything that the simulator assumes about the machines: one frozen dataclass, each field with its unit and its source."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from bench.core.hardware import BF16_OPERATIONS_PER_SECOND

RECORDS = "nvidia-h200-2026-11-26-af8241c.json"  # in bench/results
NCCL = "NCCL's cost model, src/graph/tuning.cc, LL128"


def _of(default: float, unit: str, source: str) -> Any:
    return field(default=default, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Assumptions:
    """GPUs in nodes: each GPU has links to all GPUs of its node, and one network card to the other nodes."""

    product_rate: float = _of(BF16_OPERATIONS_PER_SECOND, "operations/s", "measured: a bf16 product on one H200, hardware.py")
    busy: float = _of(
        0.5, "share", f"assumed: forward and backward reach this share of product_rate; {RECORDS} has 0.25 and 0.55"
    )
    optimizer_rate: float = _of(3.99e12, "bytes/s", f"measured: AdamW of BERT-large on one H200, {RECORDS}")
    node: int = _of(8, "GPUs", "NVIDIA, an 8 x H200 system")
    inside_rate: float = _of(
        450e9, "bytes/s", "NVIDIA, an 8 x H200 system: 18 NVLinks of generation 4, 900 GB/s in both directions together"
    )
    between_rate: float = _of(
        50e9, "bytes/s", "NVIDIA, an 8 x H200 system: ten network cards of 400 Gbit/s; assumed: one for each GPU"
    )
    link_share: float = _of(0.8, "share", "assumed: the part of a link's rate that a large collective reaches")
    tree_share: float = _of(0.8, "share", "assumed: a tree against a ring; NCCL's cost model has 0.92 x 0.5 to 1.0, by size")
    start: float = _of(14e-6, "s", f"{NCCL}: one collective before its first hop")
    ring_inside: float = _of(1.9e-6, "s", f"{NCCL}: a hop of a ring within a node")
    ring_between: float = _of(4.0e-6, "s", f"{NCCL}: a hop of a ring between nodes")
    tree_inside: float = _of(1.25e-6, "s", f"{NCCL}: a hop of a tree within a node")
    tree_between: float = _of(8.5e-6, "s", f"{NCCL}: a hop of a tree between nodes, or of a ring with one GPU a node")

    def without_latency(self) -> "Assumptions":
        """The same links, on which a byte travels in no time before it is sent."""
        return replace(self, start=0.0, ring_inside=0.0, ring_between=0.0, tree_inside=0.0, tree_between=0.0)

    def described(self) -> Iterator[tuple[str, float, str, str]]:
        """Name, value, unit and source of each field."""
        for one in fields(self):
            yield one.name, getattr(self, one.name), one.metadata["unit"], one.metadata["source"]
