"""Compiled kernels are cached by what Triton recompiles for, and launched as Triton launches them.

Keys are compared with Triton's own binder, which needs no GPU; launches go to a kernel that only records them. On a GPU the
same is tested with compiled kernels.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastbert.kernels.bias_gelu import bias_gelu, bias_gelu_fwd_kernel
from fastbert.kernels.core import cache, failures
from fastbert.kernels.core.configs import Config
from fastbert.testing.rows import DEVICE

from ..noting import PROBE, Noting, on_a_device

no_launch = pytest.mark.no_launch
CONFIG = Config(16, 4)


BINDER = create_function_from_signature(PROBE.signature, PROBE.params, CUDABackend(GPUTarget("cuda", 90, 32)))
MEMORY = torch.zeros(64)


def tensor(dtype, aligned):
    return MEMORY.view(dtype)[0 if aligned else 1 :]


assert tensor(torch.float32, True).data_ptr() % 16 == 0
TENSORS = [tensor(dtype, aligned) for dtype in (torch.float32, torch.float16, torch.int32) for aligned in (True, False)]
INTS = [0, 1, 2, 16, 17, 48, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, 2**40 + 1, -(2**31), -(2**31) - 1]
STRIDES = [(64, 16, 1), (64, 17, 1), (65, 16, 1), (64, 16, 2), (80, 32, 1), (2**31, 16, 1)]
OTHERS = [None, True, False, 0.5, 1.0]
VALUES = [*TENSORS, *INTS, *STRIDES, *OTHERS]


def key(x=TENSORS[0], n=3, size=3, N=8, name="gelu", config=CONFIG, device=0):
    return cache.Family(PROBE).key([x, n, size, N, name], config, device)


def tritons(x=TENSORS[0], n=3, size=3, N=8, name="gelu"):
    return str(BINDER(x, n, size, N, name)[1])


@no_launch
@pytest.mark.parametrize("place", ["x", "n"])
def test_one_key_is_one_kernel_of_tritons(place):
    """For every pair of values that an argument may have."""
    for a, b in itertools.combinations(VALUES, 2):
        if key(**{place: a}) == key(**{place: b}):
            assert tritons(**{place: a}) == tritons(**{place: b}), (a, b)


@no_launch
def test_an_int_that_is_not_specialised_has_two_classes():
    """A batch of another size compiles nothing."""
    sizes = {bits: [n for n in INTS if (n in range(-(2**31), 2**31)) == (bits == 32)] for bits in (32, 64)}
    for same in sizes.values():
        assert len({key(size=n) for n in same}) == len({tritons(size=n) for n in same}) == 1
    assert key(size=1) != key(size=2**31)


@no_launch
def test_what_compiles_nothing_has_one_key():
    same = [("n", 2, 17), ("n", 16, 48), ("n", (64, 16, 1), (80, 32, 1)), ("n", 2**31, 2**31 + 16), ("x", None, None)]
    for place, a, b in same:
        assert key(**{place: a}) == key(**{place: b})
        if a != 2**31:
            assert tritons(**{place: a}) == tritons(**{place: b})


@no_launch
@pytest.mark.parametrize(
    "change",
    [
        {"x": TENSORS[1]},
        {"x": TENSORS[2]},
        {"x": None},
        {"n": 1},
        {"n": 16},
        {"n": 2**31 + 1},
        {"n": None},
        {"n": (64, 16, 1)},
        {"N": 16},
        {"name": "relu"},
    ],
    ids=str,
)
def test_each_difference_is_another_key(change):
    assert key(**change) != key() and tritons(**change) != tritons()


@no_launch
@pytest.mark.parametrize(
    "change",
    [
        {"config": Config(16, 8)},
        {"config": Config(16, 4, num_stages=3)},
        {"config": Config(16, 4, maxnreg=128)},
        {"device": 1},
    ],
    ids=str,
)
def test_options_and_devices_have_kernels_of_their_own(change):
    assert key(**change) != key()


@no_launch
def test_a_dtype_stands_for_a_tensor_that_16_divides():
    """In `compiled`, and in Triton's warm-up."""
    for x in TENSORS[::2]:
        assert key(x=x.dtype) == key(x=x)
        assert tritons(x=triton.runtime.jit.MockTensor(x.dtype)) == tritons(x=x)


@no_launch
def test_the_launcher_in_c_gets_the_arguments_of_tritons(monkeypatch):
    """Triton's launcher in Python runs beside it: both pass the same arguments to the launcher in C."""
    received = []
    run = CudaLauncher.__new__(CudaLauncher)
    run.launch = lambda *arguments: received.append(arguments)
    run.launch_cooperative_grid, run.launch_pdl, run.num_ctas = False, True, 1
    run.global_scratch_size = run.profile_scratch_size = 0
    run.global_scratch_align = run.profile_scratch_align = 1
    if hasattr(triton.backends.nvidia.driver, "make_kernel_signature"):
        run.arg_annotations, run.kernel_signature, run.gsan_enabled = ("annotations",), b"signature", False
    binary = SimpleNamespace(run=run, function=77, packed_metadata=(4, 1, 0))
    arguments = (1024, None, 3)
    nothing = SimpleNamespace(allocate_default_profile_scratch=lambda *arguments: None)
    monkeypatch.setattr(type(triton.runtime.driver), "active", nothing, raising=False)
    run(5, 1, 1, 9, binary.function, binary.packed_metadata, None, None, None, *arguments)
    found = cache._loaded(binary)
    found.launch(5, 1, 1, 9, *found.prefix, *(arguments if found.spread else (arguments,)))
    assert received[0] == received[1] and len(received[0]) > 10


@no_launch
@pytest.mark.parametrize(
    "change", [{"global_scratch_size": 64}, {"profile_scratch_size": 64}, {"gsan_enabled": True}, {}], ids=str
)
def test_a_kernel_that_wants_more_is_launched_by_tritons_launcher(change):
    """Triton's launcher allocates scratch memory. It also makes launches where the launcher in C is not known."""
    run = CudaLauncher.__new__(CudaLauncher) if change else (lambda *arguments: None)
    for name, value in ({"global_scratch_size": 0, "profile_scratch_size": 0, "gsan_enabled": False} | change).items():
        setattr(run, name, value)
    found = cache._loaded(SimpleNamespace(run=run, function=7, packed_metadata=(4,)))
    assert found.launch is run and found.prefix == (7, (4,), None, None, None) and found.spread


@pytest.fixture
def noting(monkeypatch):
    on_a_device(monkeypatch, cache)
    return Noting()


def start(kernel, device=0, config=CONFIG, programs=5, **change):
    arguments = {"x_ptr": TENSORS[0], "n": 3, "size": 9, "N": 8, "NAME": "gelu"} | change
    cache.start(kernel, programs, config, torch.device("cuda", device), arguments)
    return kernel.launched[-1]


@no_launch
def test_the_first_launch_is_tritons_and_later_ones_pass_addresses(noting):
    how, grid, arguments = start(noting)
    assert (how, grid) == ("triton", (5,))
    assert arguments == {"x_ptr": TENSORS[0], "n": 3, "size": 9, "N": 8, "NAME": "gelu", "num_warps": 4}
    other = tensor(torch.float32, True)[4:]
    found = start(noting, programs=6, x_ptr=other, n=5, size=70)
    assert found == ("address", 6, 1, 1, 100, 7, (4,), None, None, None, other.data_ptr(), 5, 70, 8, "gelu")
    assert start(noting, device=1)[0] == "triton" and start(noting, device=1)[4] == 101
    assert start(noting, x_ptr=None)[0] == "triton" and start(noting, x_ptr=None)[-5] is None
    assert start(noting, n=1)[0] == "triton" and start(noting, n=1)[0] == "address"
    assert start(noting)[0] == "address"


@no_launch
def test_another_kernel_at_the_same_place_is_another(noting):
    """Python reuses the id of an object that is gone."""
    start(noting)
    members = cache.family(noting)
    cache._families[id(noting)] = cache.Family(Noting())
    assert cache.family(noting) is not members and start(noting)[0] == "triton"


def _watched(name, holder, value):
    def change(patch, kernel):
        patch.setattr(kernel if holder is None else holder, name, value)

    return change


WATCHED = {
    "knobs.runtime.debug": _watched("debug", knobs.runtime, True),
    "instrumentation": _watched("instrumentation_mode", knobs.compilation, "consan"),
    "a kernel's own debug": _watched("debug", None, True),
    "hooks of a kernel": _watched("pre_run_hooks", None, [print]),
    "another enter hook": _watched("launch_enter_hook", knobs.runtime, lambda metadata: None),
    "another exit hook": _watched("launch_exit_hook", knobs.runtime, lambda metadata: None),
    "something in its place": lambda patch, kernel: patch.setattr(cache.triton, "JITFunction", JITFunction),
}


@no_launch
@pytest.mark.parametrize("change", WATCHED.values(), ids=WATCHED)
def test_a_watched_launch_is_tritons(change, noting, monkeypatch):
    start(noting)
    assert start(noting)[0] == "address"
    with monkeypatch.context() as patch:
        change(patch, noting)
        assert start(noting)[0] == "triton"
    assert start(noting)[0] == "address"


@no_launch
@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_that_is_added_is_seen(hook, noting):
    start(noting)
    hooks = getattr(knobs.runtime, hook)
    hooks.add(print)
    try:
        assert cache.has_hooks() and start(noting)[0] == "triton"
    finally:
        hooks.remove(print)
    assert not cache.has_hooks() and start(noting)[0] == "address"


@no_launch
def test_a_kernel_is_compiled_ahead_once_and_shared(noting):
    values = (torch.float32, 3, 9, 8, "gelu")
    first = cache.compiled(noting, CONFIG, torch.device("cuda", 0), values)
    assert noting.launched == [("warmup", values, {"num_warps": 4})]
    assert cache.compiled(noting, CONFIG, torch.device("cuda", 0), (torch.float32, 5, 70, 8, "gelu")) is first
    assert start(noting)[0] == "address"


@no_launch
@pytest.mark.parametrize("numbers", [(3.0, 9), (3, 2**40)], ids=["of another type", "past 32 bits"])
def test_what_differs_is_another_kernel(numbers, noting):
    device = torch.device("cuda", 0)
    first, other = (cache.compiled(noting, CONFIG, device, (torch.float32, *n, 8, "gelu")) for n in ((3, 9), numbers))
    assert first is not other and len(noting.launched) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_of_compiled_kernels(dtype):
    """For any argument, the cached kernel is the one that Triton would have launched."""
    members = cache.family(bias_gelu_fwd_kernel)
    memory = torch.randn(40 * 80 + 9, device=DEVICE).to(dtype)
    for offset, rows, stride, width in itertools.product((0, 1), (1, 16, 17), (48, 49), (16, 33)):
        x = memory[offset : offset + rows * stride].view(rows, stride)[:, :width]
        for y in (bias_gelu(x), bias_gelu(x)):
            assert y.shape == (rows, width)
    of_triton = {id(binary) for binary in bias_gelu_fwd_kernel.device_caches[0][0].values()}
    assert {id(found.binary) for found in members.loaded.values()} <= of_triton
    assert all(found.prefix[0] == found.binary.function for found in members.loaded.values())


@pytest.mark.gpu
def test_hooks_see_compiled_kernels(launches):
    x = torch.randn(4, 64, device=DEVICE)
    bias_gelu(x)
    seen = []

    def hook(metadata):
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        bias_gelu(x)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    bias_gelu(x)
    assert seen == ["bias_gelu_fwd_kernel"] and launches() == {"bias_gelu_fwd_kernel": 3}


@pytest.mark.gpu
def test_a_launch_that_fails_is_the_kernels(monkeypatch):
    """The same error by address as through Triton."""
    x = torch.randn(4, 80, device=DEVICE)
    bias_gelu(x)
    members = cache.family(bias_gelu_fwd_kernel)

    def fails(*arguments):
        raise RuntimeError("Triton Error [CUDA]: invalid argument")

    for key, found in list(members.loaded.items()):
        monkeypatch.setitem(members.loaded, key, found._replace(launch=fails))
    with pytest.raises(failures.KernelFailed, match="bias_gelu_fwd_kernel"):
        bias_gelu(x)
