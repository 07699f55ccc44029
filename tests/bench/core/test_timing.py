"""What a time holds and what it leaves out, on a GPU whose clock is ours."""

from types import SimpleNamespace

import pytest
import torch

from bench.core import ceilings, timing
from bench.core.records import Spread
from bench.models import breakdown

PREPARING, FLUSHING, CALLING = 10.0, 100.0, 2.0


@pytest.fixture
def clock(monkeypatch):
    """torch.cuda's events on a clock that work moves on; everything that was done, in order."""
    state = SimpleNamespace(now=0.0, done=[], peak=0)

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            self.at = state.now

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    class Flush:
        def __call__(self):
            state.done.append("flush")
            state.now += FLUSHING

    for name, value in {"Event": Event, "synchronize": lambda: None, "_sleep": lambda cycles: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "Flush", Flush)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: state.now)
    return state


def prepare(clock):
    def prepared(i):
        clock.done.append(f"prepare {i}")
        clock.now += PREPARING
        return i

    return prepared


def test_the_call_alone_is_timed_behind_a_flush(clock):
    def call(i):
        clock.done.append(f"call {i}")
        clock.now += CALLING

    spread, runs = timing.measure(prepare(clock), call, seconds=1e-3)
    assert spread == Spread(CALLING, CALLING, CALLING, timing.BLOCKS * timing.FEWEST)
    assert runs == [CALLING] * timing.BLOCKS
    last = clock.done[-3 * timing.FEWEST :]
    assert last[:6] == ["prepare 0", "flush", "call 0", "prepare 1", "flush", "call 1"], "inputs rotate, caches are cold"


def test_quartiles_and_repeated_runs():
    spread, runs = timing.summary([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [3.0, 4.0, 50.0]])
    assert runs == [2.0, 3.0, 4.0]
    assert (spread.low, spread.median, spread.high, spread.rounds) == (2.0, 3.0, 4.0, 9)


def test_a_clock_that_stands_still_gives_no_time(clock):
    with pytest.raises(timing.NoTime, match="a call took 0.0 s"):
        timing.measure(prepare(clock), lambda i: None, seconds=1e-3)


def test_throughput_is_from_end_to_end(clock):
    def step(i):
        clock.now += CALLING

    spread, runs = timing.measure_throughput(step, seconds=1.0)
    assert spread.median == CALLING and len(runs) == timing.BLOCKS
    assert timing.measure_latency(step, seconds=1.0)[0].median == CALLING


def test_a_short_call_is_repeated_more_often_than_a_long_one(clock):
    def calling(seconds):
        def step(i):
            clock.now += seconds

        return step

    assert timing.measure_latency(calling(2**-7), seconds=3.0)[0].rounds == timing.BLOCKS * 128
    assert timing.measure_latency(calling(1e-6), seconds=3.0)[0].rounds == timing.BLOCKS * timing.MOST
    assert timing.measure_latency(calling(0.1), seconds=0.3)[0].rounds == timing.BLOCKS * timing.FEWEST
    assert timing.measure_latency(calling(9.0), seconds=3.0)[0].rounds == timing.BLOCKS * timing.FEWEST_LONG


def test_phases_are_what_lies_between_the_marks(clock):
    phases = breakdown.Phases()
    for name, seconds in (("forward", 1.0), ("backward", 2.0), ("optimizer", 0.5)):
        clock.now += seconds
        phases.mark(name)
    assert phases.read() == {"forward": 1.0, "backward": 2.0, "optimizer": 0.5}


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("attention_bwd_kv_kernel", "attention"),
        ("flash_fwd_kernel", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_TNN", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
        ("dropout_add_layernorm_fwd_kernel", "layer norm"),
        ("void at::native::vectorized_layer_norm_kernel<float>", "layer norm"),
        ("bias_gelu_bwd_kernel", "activation"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("triton_poi_fused_add_0", "compiled"),
        ("Memcpy DtoD", "copies"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_distinguished_by_name(kernel, part):
    assert breakdown.part_of(kernel) == part


def test_ceilings_are_bytes_and_operations_over_time(monkeypatch):
    def measured(*_):
        return Spread(0.5, 0.5, 0.5, 9), [0.5]

    monkeypatch.setattr(ceilings, "measure", measured)
    for name in ("randint", "randn"):
        original = getattr(torch, name)
        on_cpu = lambda *args, original=original, device, **rest: original(*args, **rest)  # noqa: E731
        monkeypatch.setattr(torch, name, on_cpu)
    assert ceilings.copy(1024).per_second == 2 * 1024 / 0.5
    assert ceilings.product(8).per_second == 2 * 8**3 / 0.5
