"""Kernels that are bound once and called with addresses, and several arrays in one allocation."""

import errno
import itertools

import pytest
import torch
from triton import knobs

from fastbert.kernels.core import bound, cache, column_sums, failures
from fastbert.kernels.core import launch as module
from fastbert.kernels.core.bound import Bound, Workspace, addressing
from fastbert.kernels.core.configs import Config
from fastbert.kernels.core.launch import Work, counts, recording
from fastbert.testing.numerics import assert_close
from fastbert.testing.rows import DEVICE

from ..noting import Noting, on_a_device

no_launch = pytest.mark.no_launch
LIKE = torch.empty(0, device="meta")
NUMBERS = {"n": 3, "size": 9, "N": 8, "NAME": "gelu"}


@pytest.fixture
def noting(monkeypatch):
    on_a_device(monkeypatch, cache)
    monkeypatch.setattr(bound, "by_address", lambda: True)
    counts.pop("noting_kernel", None)
    yield Noting()
    counts.pop("noting_kernel", None)


def bind(kernel, programs=5, dtype=torch.float32, num_warps=4):
    return Bound(Work(kernel, programs, Config(16, num_warps), NUMBERS), LIKE, {"x_ptr": dtype})


def test_a_call_passes_addresses(noting):
    call = bind(noting)
    assert noting.launched == [("warmup", (torch.float32, 3, 9, 8, "gelu"), {"num_warps": 4})]
    call(9, 4096)
    call(10, None)
    launched = [
        ("address", 5, 1, 1, stream, 7, (4,), None, None, None, x, 3, 9, 8, "gelu") for stream, x in ((9, 4096), (10, None))
    ]
    assert noting.launched[1:] == launched and counts["noting_kernel"] == 2


@no_launch
def test_what_triton_compiled_once_is_shared(noting):
    bind(noting), bind(noting, programs=17), bind(noting, dtype=None), bind(noting, num_warps=8)
    assert [how for how, *_ in noting.launched] == ["warmup"] * 3


def test_one_tuple_where_tritons_launcher_wants_it(noting, monkeypatch):
    received = []
    kernel = cache.LoadedKernel(None, lambda *arguments: received.append(arguments), ("metadata",), False)
    monkeypatch.setattr(cache, "compiled", lambda *arguments: kernel)
    bind(noting)(9, 4096)
    assert received == [(5, 1, 1, 9, "metadata", (4096, 3, 9, 8, "gelu"))]


@no_launch
def test_no_programs_no_kernel(noting):
    bind(noting, programs=0)(9, 4096)
    assert noting.launched == [] and counts["noting_kernel"] == 0


@no_launch
def test_the_tensors_come_first(noting):
    with pytest.raises(AssertionError, match="size"):
        Bound(Work(noting, 5, Config(16, 4), NUMBERS), LIKE, {"size": torch.float32})


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_launches(hook, noting):
    call = bind(noting)
    hooks = getattr(knobs.runtime, hook)
    hooks.add(print)
    try:
        call(9, 4096)
    finally:
        hooks.remove(print)
    call(9, 4096)
    metadata = ("metadata", (5, 1, 1), 9, (4096, 3, 9, 8, "gelu"))
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    assert noting.launched[1] == ("address", 5, 1, 1, 9, 7, (4,), metadata, *hooks, 4096, 3, 9, 8, "gelu")
    assert noting.launched[2][7:10] == (None,) * 3


@no_launch
@pytest.mark.parametrize("when", ["compiled", "launched"])
def test_a_kernel_that_fails(when, noting):
    call = None if when == "compiled" else bind(noting)
    noting.fails = RuntimeError("Triton Error [CUDA]: invalid argument")
    with pytest.raises(failures.KernelFailed, match="noting_kernel could not be compiled or launched") as found:
        bind(noting) if call is None else call(9, 4096)
    assert found.value.__cause__ is noting.fails and counts["noting_kernel"] == 0
    noting.fails = None
    bind(noting)(9, 4096)


@no_launch
@pytest.mark.parametrize("when", ["compiled", "launched"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing"),
    ],
    ids=lambda error: str(error)[-20:],
)
def test_what_is_no_fault_of_the_kernel_is_raised(error, when, noting):
    call = None if when == "compiled" else bind(noting)
    noting.fails = error
    with pytest.raises(type(error)) as found:
        bind(noting) if call is None else call(9, 4096)
    assert found.value is error
    assert "capturing" not in str(error) or "before capturing it" in error.__notes__[-1]


@no_launch
def test_nothing_fails_for_good_inside_a_capture(noting, monkeypatch):
    noting.fails = RuntimeError("whatever comes of a first compile there")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError) as found:
        bind(noting)
    assert found.value is noting.fails


@no_launch
def test_a_cache_that_cannot_be_written_is_moved_once(noting, monkeypatch):
    noting.fails = OSError(errno.EROFS, "Read-only file system")
    moved = []

    def move(error):
        moved.append(error)
        noting.fails = None
        return True

    monkeypatch.setattr(module, "move_cache", move)
    bind(noting)
    assert len(moved) == 1 and [how for how, *_ in noting.launched] == ["warmup"]


def sums(rows=(3, 40, 1), widths=(7, 1100, 2), dtype=torch.float32):
    parts = [torch.randn(n, width, dtype=dtype, device=DEVICE) for n, width in zip(rows, widths, strict=True)]
    return parts, column_sums.work(rows, widths, parts[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_column_sums(dtype):
    """Of three tensors, with more columns than a program takes and more rows than a tile; concatenated, and cast at the end."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parts, work = sums(dtype=wide)
    out = torch.full((sum(part.shape[1] for part in parts) + 3,), torch.nan, dtype=dtype, device=DEVICE)
    call = Bound(work, parts[0], {"out_ptr": dtype} | dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), wide))
    at = addressing()
    call(bound.streams(out.device)(), at(out), *map(at, parts))
    eager, exact = (torch.cat([part.to(kind).sum(0) for part in parts]) for kind in (wide, torch.float64))
    assert_close({"sums": out[:-3]}, {"sums": eager.to(dtype)}, {"sums": exact})
    assert out[-3:].isnan().all()


@pytest.mark.parametrize("rows", itertools.product((0, 1, 33), repeat=3), ids=str)
@pytest.mark.one_in(3)
def test_column_sums_of_any_rows(rows):
    """Zeros for no rows, whatever was in memory."""
    parts, work = sums(rows, (2, 3, 5))
    out = torch.full((10,), torch.nan, device=DEVICE)
    work.launch(parts[0], a_ptr=parts[0], b_ptr=parts[1], c_ptr=parts[2], out_ptr=out)
    torch.testing.assert_close(out, torch.cat([part.sum(0) for part in parts]))


@no_launch
def test_a_recorded_call_hands_its_tensors_over():
    recorded = []
    with recording("sm_90", lambda kernel, programs, config, arguments: recorded.append(arguments)):
        parts, work = sums()
        call = Bound(work, parts[0], dict.fromkeys(("out_ptr", "a_ptr", "b_ptr", "c_ptr"), torch.float32))
        out = torch.empty(1109, device=DEVICE)
        call(None, *map(addressing(), (out, *parts)))
    (arguments,) = recorded
    assert arguments["b_ptr"] is parts[1] and arguments["out_ptr"] is out and arguments["B"] == 1100


@no_launch
@pytest.mark.parametrize("like", [torch.float64, torch.float32, torch.float16, torch.uint8], ids=str)
def test_room(like):
    """Arrays that do not touch, each aligned to 16 bytes, in memory of any dtype."""
    shapes = [
        ((3, 5), torch.float32),
        ((7,), torch.float16),
        ((0, 4), torch.float32),
        ((2, 2), torch.int32),
        ((1,), torch.float64),
    ]
    workspace = Workspace(*shapes)
    memory = workspace.allocate(torch.empty(0, dtype=like, device=DEVICE))
    assert memory.dtype == like and memory.numel() * like.itemsize == workspace.bytes == 64 + 16 + 16 + 16
    views = [workspace.view(memory, i) for i in range(len(shapes))]
    first = memory.data_ptr()
    for i, (view, (shape, dtype)) in enumerate(zip(views, shapes, strict=True)):
        assert (tuple(view.shape), view.dtype) == (shape, dtype) and view.is_contiguous()
        assert (view.data_ptr() - first) % 16 == 0 or not view.numel()
        view.fill_(i + 1)
    assert [float(view.double().sum()) for view in views] == [15.0, 14.0, 0.0, 16.0, 5.0]


@no_launch
def test_places_are_the_views_addresses(monkeypatch):
    workspace = Workspace(((3, 5), torch.float32), ((7,), torch.float16))
    memory = workspace.allocate(torch.empty(0))
    monkeypatch.setattr(bound, "by_address", lambda: False)
    views = workspace.places(memory)
    assert [tuple(view.shape) for view in views] == [(3, 5), (7,)] and addressing()(memory) is memory
    monkeypatch.setattr(bound, "by_address", lambda: True)
    assert workspace.places(memory) == [view.data_ptr() for view in views] and addressing()(memory) == memory.data_ptr()


@pytest.mark.gpu
def test_a_bound_kernel_runs_and_its_hooks_are_told():
    parts, work = sums()
    out = torch.empty(1109, device=DEVICE)
    call = Bound(work, parts[0], dict.fromkeys(("out_ptr", "a_ptr", "b_ptr", "c_ptr"), torch.float32))
    places = [x.data_ptr() for x in (*parts, out)]
    seen = []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        call(bound.streams(out.device)(), *places)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    call(bound.streams(out.device)(), *places)
    torch.cuda.synchronize()
    assert seen == ["column_sums_kernel"]
