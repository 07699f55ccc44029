"""What bench.scaling lists is what two ranks over gloo do: buckets, their order, collectives and their bytes."""

from tests.bench.scaling.counted import count_all
from tests.ranks import on_ranks


def test_ddp_and_fsdp():
    on_ranks(2, count_all)
