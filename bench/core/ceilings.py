"""Measures this machine's two ceilings in the same run: memory copy bandwidth and bf16 matrix product throughput."""

import torch

from bench.core.records import Ceiling
from bench.core.timing import measure

COPY, PRODUCT = "copy", "bf16 product"
COPY_BYTES = 2 << 30
SIDE = 8192


def run() -> list[Ceiling]:
    """Both ceilings, from random data: a product of zeros runs faster than one of real numbers."""
    return [copy(COPY_BYTES), product(SIDE)]


def copy(size: int) -> Ceiling:
    """Bytes read plus bytes written per second by a copy of `size` bytes."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds, _ = measure(lambda i: None, lambda _: target.copy_(source))
    return Ceiling(COPY, 2 * size / seconds.median, seconds)


def product(side: int) -> Ceiling:
    """Operations (2 side^3) per second of a product of two bf16 matrices."""
    a, b = (torch.randn(side, side, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    seconds, _ = measure(lambda i: None, lambda _: torch.mm(a, b, out=out))
    return Ceiling(PRODUCT, 2 * side**3 / seconds.median, seconds)
