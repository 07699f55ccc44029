"""Lists the collectives of one optimizer step of each engine, and the bytes that one rank sends in them.

Factors are those of a ring, the least that point-to-point links allow (nccl-tests, doc/PERFORMANCE.md): of a tensor of S bytes
a rank sends (n-1)/n S in an all-gather or a reduce-scatter over n ranks, 2 (n-1)/n S in an all-reduce.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bench.scaling.buckets import buckets
from bench.scaling.parts import Model, Part

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
PASSES = {ALL_REDUCE: 2, ALL_GATHER: 1, REDUCE_SCATTER: 1}
FLAT, INSIDE, BETWEEN = "all ranks", "within a node", "between nodes"


@dataclass(frozen=True)
class Collective:
    """One call over `ranks` ranks. size: bytes of the whole tensor, not of a shard. part: the part that it belongs to."""

    kind: str
    size: int
    ranks: int
    part: str
    where: str = FLAT

    @property
    def sent(self) -> float:
        """Bytes that one rank sends."""
        return PASSES[self.kind] * (self.ranks - 1) / self.ranks * self.size


def sent(collectives: Iterable[Collective], where: str | None = None) -> float:
    """Bytes that one rank sends in all of them, or in those of one kind of group."""
    return sum(one.sent for one in collectives if where in (None, one.where))


def ddp(model: Model, ranks: int, itemsize: int = 4, bucket_cap_mb: float | None = None) -> list[Collective]:
    """DistributedDataParallel: one all-reduce per bucket. itemsize 2: with `bf16_compress_hook`.

    Not listed: unless told otherwise, DDP also broadcasts BERT's constant position and type ids before each forward, 8 KB.
    """
    return [Collective(ALL_REDUCE, b.numel * itemsize, ranks, b.last) for b in buckets(model, bucket_cap_mb)]


@dataclass(frozen=True)
class Sharding:
    """FSDP2's settings: bytes per element of MixedPrecisionPolicy's param_dtype and reduce_dtype, and whether a layer's weights
    are dropped after its forward and gathered again in the backward."""

    parameter_itemsize: int = 2
    reduce_itemsize: int = 4
    reshard_after_forward: bool = True


def padded(parameter: Tensor, ranks: int) -> int:
    """Elements of a parameter whose first dimension is padded so that each rank has an equal share, as FSDP2 sends it."""
    rows = parameter.shape[0]
    return -(-rows // ranks) * ranks * (parameter.numel() // rows)


def groups(model: Model) -> list[Part]:
    """What `fully_shard` of each layer and then of the model makes: the root (head and embeddings), then each layer from the
    first."""
    head, embeddings = model.parts[0], model.parts[-1]
    return [Part("root", head.parameters | embeddings.parameters), *reversed(model.layers)]


@dataclass(frozen=True)
class Group:
    """The collectives of one FSDP2 group in one step. again: the backward's all-gather, if the weights were dropped."""

    name: str
    gather: Collective
    again: Collective | None
    scatter: Collective
    reduce: Collective | None


def fsdp_groups(model: Model, ranks: int, sharding: Sharding = Sharding(), node: int | None = None) -> list[Group]:
    """The collectives of `fully_shard` by group. node: HSDP, which shards over the ranks of a node and replicates over nodes.

    The root keeps its weights after the forward, which is FSDP2's default for it.
    """
    shards = node or ranks
    where = INSIDE if node else FLAT
    found = []
    for part in groups(model):
        numel = sum(padded(p, shards) for p in part.parameters.values())
        gather = Collective(ALL_GATHER, numel * sharding.parameter_itemsize, shards, part.name, where)
        again = gather if sharding.reshard_after_forward and part.name != "root" else None
        scatter = Collective(REDUCE_SCATTER, numel * sharding.reduce_itemsize, shards, part.name, where)
        shard = numel // shards * sharding.reduce_itemsize
        reduce = Collective(ALL_REDUCE, shard, ranks // node, part.name, BETWEEN) if node and ranks > node else None
        found.append(Group(part.name, gather, again, scatter, reduce))
    return found


def fsdp(model: Model, ranks: int, sharding: Sharding = Sharding(), node: int | None = None) -> list[Collective]:
    """All collectives of `fsdp_groups` in one list."""
    found = fsdp_groups(model, ranks, sharding, node)
    return [one for group in found for one in (group.gather, group.again, group.scatter, group.reduce) if one]


def zero1(model: Model, ranks: int, itemsize: int = 2) -> list[Collective]:
    """ZeRO stage 1 in bfloat16: gradients are reduce-scattered, and updated weights all-gathered after the step (arXiv
    1910.02054, section 7.1)."""
    size = model.numel * itemsize
    return [Collective(kind, size, ranks, "model") for kind in (REDUCE_SCATTER, ALL_GATHER)]


def tensor_parallel(config: Any, tokens: int, ranks: int, itemsize: int = 2) -> list[Collective]:
    """Tensor parallelism of the layers by a plan of their Linears: in the forward the outputs of attention and feed-forward are
    all-reduced, in the backward the gradients of the inputs of query, key, value and intermediate, each by itself. (With query,
    key and value as one product there are four in a layer instead of six: Megatron-LM, arXiv 1909.08053, section 3.)
    """
    size = tokens * config.hidden_size * itemsize
    layers = range(config.num_hidden_layers)
    return [Collective(ALL_REDUCE, size, ranks, f"layer {layer}") for layer in layers for _ in range(2 + 4)]
