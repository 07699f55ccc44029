"""Around a launch: the choice of a configuration, counting, recording for the audit, whether a backward can follow."""

import pytest
import torch
import triton.language as tl

from fastbert.kernels.core import launch as module
from fastbert.kernels.core.autograd import needs_backward
from fastbert.kernels.core.configs import ARCHITECTURES, TABLES, Config
from fastbert.kernels.core.launch import (
    accumulator,
    accumulator_torch,
    architecture,
    as_rows,
    choose,
    counts,
    draw_seed,
    recording,
    resident_programs,
)
from fastbert.testing.rows import DEVICE, OPS, make_inputs, run, seed_tensor

from ..layouts import contiguous, expanded, offset, sliced, transposed

no_launch = pytest.mark.no_launch


@pytest.fixture
def capability(monkeypatch):
    """Pretend that every CUDA device has this compute capability; no cache outlives the test."""

    def pretend(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        architecture.cache_clear()
        return architecture(torch.device("cuda", 0))

    yield pretend
    architecture.cache_clear()


@no_launch
@pytest.mark.parametrize(
    "major, minor, name",
    [
        (8, 0, "sm_80"),
        (8, 6, "sm_80"),
        (8, 9, "sm_80"),
        (9, 0, "sm_90"),
        (10, 0, "sm_100"),
        (10, 3, "sm_100"),
        (12, 0, "sm_100"),
        (7, 5, "sm_80"),
    ],
)
def test_an_unknown_architecture_takes_the_nearest_older_table(capability, major, minor, name):
    assert capability(major, minor) == name
    assert name in ARCHITECTURES


@no_launch
def test_a_missing_table_is_said_once(capability, caplog):
    with caplog.at_level("INFO", logger="fastbert"):
        capability(8, 6)
        architecture(torch.device("cuda", 0))
    assert [record.getMessage() for record in caplog.records] == ["no table for sm_86: using the one for sm_80"]


@no_launch
def test_the_cpu_is_the_interpreter():
    assert architecture(torch.device("cpu")) == "interpreter"


@no_launch
@pytest.mark.parametrize("kernel", TABLES)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_width_takes_the_first_row_that_holds_it(kernel, name, dtype, monkeypatch):
    monkeypatch.setattr(module, "architecture", lambda device: name)
    like = torch.empty(0, dtype=dtype)
    table = TABLES[kernel][name].get(like.element_size())
    if table is None:
        return  # a kernel for other types
    limits = sorted(table)
    step = 16 // like.element_size() if f"{kernel}_uneven" in TABLES else 1
    for below, limit in zip([0, *limits], limits, strict=False):
        assert choose(kernel, like, below + step) is choose(kernel, like, limit) is table[limit]
    assert choose(kernel, like, limits[-1] + step) is table[limits[-1]]


@no_launch
@pytest.mark.parametrize("dtype, even", [(torch.float32, 4), (torch.float16, 8)], ids=str)
def test_rows_that_16_bytes_do_not_divide_have_a_table_of_their_own(dtype, even, monkeypatch):
    monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    like = torch.empty(0, dtype=dtype)
    for kernel in ("layernorm_forward", "layernorm_backward", "gelu_layernorm_backward"):
        plain, uneven = (TABLES[name]["sm_90"][like.element_size()][1024] for name in (kernel, f"{kernel}_uneven"))
        assert plain != uneven
        for width in range(1024 - 2 * even, 1025):
            assert choose(kernel, like, width) is (uneven if width % even else plain)


@no_launch
@pytest.mark.parametrize(
    "blocks, each, programs", [(0, 4, 1), (1, 4, 1), (7, 4, 7), (8, 4, 8), (9, 4, 8), (1000, 4, 8), (1000, 1, 2)]
)
def test_programs_are_as_many_as_fit_and_no_more_than_blocks(blocks, each, programs, monkeypatch):
    monkeypatch.setattr(module, "_multiprocessors", lambda device: 2)
    assert resident_programs(Config(1, 1, None, each), torch.empty(0), blocks) == programs


@no_launch
@pytest.mark.parametrize("layout", [contiguous, transposed, sliced, expanded, offset], ids=lambda f: f.__name__)
def test_rows_are_seen_without_a_copy(layout):
    x = layout(torch.randn(6, 4))
    assert as_rows(x).data_ptr() == x.data_ptr() and torch.equal(as_rows(x), x)
    assert as_rows(x[:, None, :]).data_ptr() == x.data_ptr()


@no_launch
def test_rows_are_copied_only_where_no_strides_can_say_them():
    x = torch.randn(2, 3, 4)
    assert as_rows(x.transpose(0, 1)).data_ptr() != x.data_ptr()
    assert torch.equal(as_rows(x.transpose(0, 1)), x.transpose(0, 1).reshape(6, 4))


@no_launch
@pytest.mark.parametrize("shape, rows", [((0, 4), 0), ((3, 0), 3), ((2, 0, 4), 0), ((2, 5, 0), 10), ((4,), 1)])
def test_rows_of_empty_tensors(shape, rows):
    assert as_rows(torch.empty(shape)).shape == (rows, shape[-1])


@pytest.mark.parametrize("op", OPS, ids=str)
def test_launches_are_counted(op, launches):
    inputs = make_inputs(op, (3, 40))
    for calls in (1, 2, 3):
        run(op.call, inputs, torch.ones(3, 40, device=DEVICE))
        assert launches() == dict.fromkeys((op.forward_kernel, *op.backward_kernels), calls)


@no_launch
@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_recorded_launch_runs_nothing(op):
    recorded = []

    def record(kernel, programs, config, arguments):
        recorded.append((kernel.__name__, programs, config, arguments))

    before = counts.copy()
    with recording("sm_90", record):
        run(op.call, make_inputs(op, (3, 40)), torch.ones(3, 40, device=DEVICE))
    assert counts == before
    assert [name for name, *_ in recorded] == [op.forward_kernel, *op.backward_kernels]
    for _, programs, config, arguments in recorded:
        assert programs >= 1 and arguments["BLOCK_M"] == config.BLOCK_M
        assert any(config in table.values() for tables in TABLES.values() for table in tables["sm_90"].values())


def test_recording_ends_with_its_block_also_on_an_error(launches):
    op = OPS[0]
    with pytest.raises(KeyError), recording("sm_90", lambda *_: None):
        raise KeyError
    run(op.call, make_inputs(op, (3, 40)), None)
    assert launches() == {op.forward_kernel: 1}


@no_launch
def test_who_needs_a_backward():
    plain, leaf = torch.ones(1), torch.ones(1, requires_grad=True)
    assert needs_backward(plain, leaf) and needs_backward(None, leaf) and needs_backward(leaf * 2)
    assert not needs_backward(plain, None)
    with torch.no_grad():
        assert not needs_backward(leaf)
    with torch.inference_mode():
        assert not needs_backward(leaf)


@no_launch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_only_float64_is_summed_in_float64(dtype):
    double = dtype == torch.float64
    assert accumulator(dtype) == (tl.float64 if double else tl.float32)
    assert accumulator_torch(dtype) == (torch.float64 if double else torch.float32)


@no_launch
def test_a_drawn_seed_is_a_tensor_on_the_device():
    """A Python number would be read back from the GPU, and a CUDA graph would contain it."""
    seed = draw_seed(DEVICE)
    assert (seed.dtype, seed.shape, seed.device.type) == (torch.int64, (), DEVICE.type)
    torch.manual_seed(1)
    one = draw_seed(DEVICE)
    torch.manual_seed(1)
    assert torch.equal(draw_seed(DEVICE), one) and not torch.equal(draw_seed(DEVICE), one)
    assert len({int(draw_seed(DEVICE)) for _ in range(100)}) == 100


def test_the_kernels_are_the_interpreters_exactly_where_there_is_no_gpu():
    assert torch.cuda.is_available() or module.INTERPRETED
    inputs = make_inputs(OPS[0], (3, 40))
    run(OPS[0].call, inputs, None, p=0.5, seed=seed_tensor(1))


@no_launch
def test_a_table_of_a_length_serves_sequences_of_up_to_that(monkeypatch):
    short, shorter, like = Config(16, 4, 16), Config(32, 4, 16), torch.empty(0, dtype=torch.float16)
    every = choose("attention_forward", like, 64)
    for length, config in ((128, short), (32, shorter)):
        monkeypatch.setitem(TABLES, f"attention_forward_{length}", {"interpreter": {2: {64: config}}})
    for length, config in ((1, shorter), (32, shorter), (33, short), (128, short), (129, every), (None, every)):
        assert choose("attention_forward", like, 64, length) is config
