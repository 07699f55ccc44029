"""How long a collective takes: latency of its hops plus bytes at the rate of the slowest link, as NCCL's cost model has it.

ring      hops: n-1 for each pass over the tensor, of which one per node and pass goes between nodes
tree      of an all-reduce only: up and down a chain within the node and a binary tree of nodes
A ring over several nodes uses all network cards of a node together, because NCCL makes one ring per card.
"""

import math

from bench.scaling.assumptions import Assumptions
from bench.scaling.volumes import ALL_REDUCE, BETWEEN, PASSES, Collective


def seconds(collective: Collective, machine: Assumptions) -> float:
    """Time of one collective; an all-reduce takes the faster of ring and tree."""
    if collective.ranks == 1:
        return 0.0
    times = [ring(collective, machine)]
    if collective.kind == ALL_REDUCE:
        times.append(tree(collective, machine))
    return min(times)


def ring(collective: Collective, machine: Assumptions) -> float:
    """Time over a ring."""
    nodes, in_node = _shape(collective, machine)
    passes = PASSES[collective.kind]
    between = passes * (nodes - 1)
    inside = passes * (collective.ranks - 1) - between
    hop = machine.ring_between if in_node > 1 else machine.tree_between
    latency = machine.start + inside * machine.ring_inside + between * hop
    return latency + collective.sent / (machine.link_share * _rate(nodes, in_node, machine))


def tree(collective: Collective, machine: Assumptions) -> float:
    """Time of an all-reduce over a tree, in which a rank sends the whole tensor up and down."""
    nodes, in_node = _shape(collective, machine)
    hops = (in_node - 1) * machine.tree_inside + int(math.log2(nodes)) * machine.tree_between
    rate = machine.link_share * machine.tree_share * _rate(nodes, in_node, machine)
    return machine.start + 2 * hops + 2 * collective.size / rate


def _shape(collective: Collective, machine: Assumptions) -> tuple[int, int]:
    """Number of nodes, and ranks of the collective in each."""
    if collective.where == BETWEEN:
        return collective.ranks, 1
    in_node = min(collective.ranks, machine.node)
    return -(-collective.ranks // in_node), in_node


def _rate(nodes: int, in_node: int, machine: Assumptions) -> float:
    if nodes == 1:
        return machine.inside_rate
    if in_node == 1:
        return machine.between_rate
    return min(machine.inside_rate, in_node * machine.between_rate)
