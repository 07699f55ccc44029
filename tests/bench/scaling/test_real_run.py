"""What bench.scaling lists is what two ranks over gloo do: buckets, their order, collectives and their bytes."""

import pytest

from tests.bench.scaling.counted import count_all, count_hsdp
from tests.ranks import on_ranks


def test_ddp_fsdp_and_tensor_parallel():
    on_ranks(2, count_all)


@pytest.mark.long
def test_hsdp_on_four():
    on_ranks(4, count_hsdp)
