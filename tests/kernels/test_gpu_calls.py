"""What only a GPU shows, for every op: races, streams and devices, no synchronisation, CUDA graphs.

The calls come from one table, which must contain every op of the benchmarks.
"""

import pytest
import torch

from fastbert.testing.calls import CALLS, Call, Tensors
from fastbert.testing.rows import DEVICE, INTERPRETED
from fastbert.testing.specs import SPECS
from tests.gpu import captured, no_synchronisation, on_a_late_stream

BF16 = torch.bfloat16
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=str)


def assert_bitwise(results: Tensors, expected: Tensors) -> None:
    assert results and results.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(results[name], expected[name])]
    assert not different, different


def assert_repeats(call: Call, times: int, small: bool = False, dtype: torch.dtype = BF16) -> None:
    inputs, step = call.make(small, dtype)
    before = {name: x.clone() for name, x in inputs.items()}
    first = step(inputs)
    for _ in range(times):
        assert_bitwise(step(inputs), first)
    assert_bitwise(inputs, before)


@pytest.mark.no_launch
def test_every_op_has_a_call():
    assert {call.spec.name for call in CALLS} == SPECS.keys()


@EVERY_CALL
def test_calls_run_anywhere(call):
    """Checks the table without a GPU: each step runs, in every precision but bfloat16, and repeats."""
    assert_repeats(call, 1, small=True, dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.no_launch
def test_kernels_are_compiled():
    assert not INTERPRETED, "TRITON_INTERPRET is set: these tests would prove nothing about the GPU"


@pytest.mark.gpu
@EVERY_CALL
def test_repeated_250_times_the_bits_are_the_same(call):
    """A race, or a sum by atomics, shows sooner or later."""
    assert_repeats(call, 250)


@pytest.mark.gpu
@EVERY_CALL
def test_on_a_side_stream(call):
    inputs, step = call.make(False, BF16)
    expected = step(inputs)
    assert_bitwise(on_a_late_stream(step, inputs), expected)


@pytest.mark.gpu
@EVERY_CALL
def test_on_a_device_that_is_not_current(call):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs, step = call.make(False, BF16)
    expected = step(inputs)
    assert torch.cuda.current_device() == 0
    results = step({name: x.to("cuda:1") for name, x in inputs.items()})
    assert {x.device for x in results.values()} == {torch.device("cuda", 1)}
    assert_bitwise({name: x.to(DEVICE) for name, x in results.items()}, expected)


@pytest.mark.gpu
@EVERY_CALL
def test_no_synchronisation(call):
    """Not even to draw a seed."""
    inputs, step = call.make(False, BF16)
    inputs.pop("seed", None)
    step(inputs)
    with no_synchronisation():
        step(inputs)


@pytest.mark.gpu
@EVERY_CALL
def test_in_a_cuda_graph(call):
    """Captured once and replayed with other numbers, masks and indices: the graph reads nothing from the host."""
    inputs, step = call.make(False, BF16)
    replay, results = captured(lambda: step(inputs))
    for _ in range(3):
        others, _ = call.make(False, BF16)
        for name, x in inputs.items():
            x.copy_(others[name])
        replay()
        assert_bitwise(results, step(inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("call", [call for call in CALLS if "dropped" in call.form], ids=str)
def test_each_replay_of_a_cuda_graph_draws_its_own_dropout(call):
    inputs, step = call.make(False, BF16)
    del inputs["seed"]
    replay, results = captured(lambda: step(inputs))
    seen: list[Tensors] = []
    for _ in range(4):
        replay()
        seen.append({name: x.clone() for name, x in results.items()})
        for earlier in seen[:-1]:
            assert not torch.equal(seen[-1]["y"], earlier["y"])
    torch.cuda.manual_seed(3)
    replay()
    first = {name: x.clone() for name, x in results.items()}
    torch.cuda.manual_seed(3)
    replay()
    assert_bitwise(results, first)
