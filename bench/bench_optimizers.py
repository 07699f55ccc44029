"""`pytest bench`: AdamW's lanes over the parameters of BERT-base and BERT-large."""

from functools import lru_cache
from typing import Any

import pytest
import torch

from bench.conftest import GPU
from bench.core import peers, timing
from bench.ops import optimizers
from fastbert.testing.numerics import assert_close

ROUNDS, WARM_UP = 50, 5


@lru_cache(maxsize=1)
def _prepared(model: str) -> tuple[optimizers.Parameters, dict[str, Any], dict[str, Any]]:
    parameters = optimizers.Parameters.of(model, "cuda" if GPU else "cpu")
    eager = optimizers.LANES["eager"]
    return parameters, parameters.after(eager), parameters.after(eager, torch.float64)


@pytest.mark.benchmark(timer=timing.host_timer)
@pytest.mark.parametrize("model", ["BERT-base", "BERT-large"] if GPU else ["tiny"])
@pytest.mark.parametrize("lane", optimizers.LANES)
def test_adamw(benchmark: Any, model: str, lane: str) -> None:
    parameters, eager, exact = _prepared(model)
    assert_close(parameters.after(optimizers.LANES[lane]), eager, exact)
    if not GPU:
        pytest.skip(f"{peers.NO_GPU}: checked, not timed")
    _, step = parameters.stepping(optimizers.LANES[lane])
    rounds = iter(range(10**9))
    benchmark.group = f"adamw {model}"
    benchmark.pedantic(step, setup=lambda: ((next(rounds),), {}), rounds=ROUNDS, warmup_rounds=WARM_UP)
