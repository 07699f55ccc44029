"""The buckets that DistributedDataParallel makes of a model's gradients, by torch's own function.

In the first step DDP has one bucket of all gradients. Then it makes buckets anew, in the order in which gradients arrived: a
bucket is closed by the gradient that fills it, the first one at 1 MiB and the others at bucket_cap_mb. Where bucket_cap_mb is
given, it also holds for the first one.
"""

from dataclasses import dataclass

import torch.distributed as dist

from bench.scaling.parts import Model

DEFAULT_CAP_MB = 25
MIB = 1 << 20


@dataclass(frozen=True)
class Bucket:
    """Names of the parameters, their number of elements, and the part whose backward fills the bucket."""

    names: tuple[str, ...]
    numel: int
    last: str


def buckets(model: Model, bucket_cap_mb: float | None = None) -> list[Bucket]:
    """Buckets of float32 gradients from the second step on, in the order in which they are reduced."""
    arrivals = [(part.name, name, p) for part in model.parts for name, p in part.parameters.items()]
    cap = int((bucket_cap_mb or DEFAULT_CAP_MB) * MIB)
    first = dist._DEFAULT_FIRST_BUCKET_BYTES if bucket_cap_mb is None else cap
    found, _ = dist._compute_bucket_assignment_by_size([p for _, _, p in arrivals], [first, cap])
    return [
        Bucket(tuple(arrivals[i][1] for i in of), sum(arrivals[i][2].numel() for i in of), arrivals[max(of)][0]) for of in found
    ]
