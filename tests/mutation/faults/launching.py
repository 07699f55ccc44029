"""The cache of compiled kernels, and bound kernels."""

from functools import partial

from tests.mutation.fault import Fault

KEPT = "tests/kernels/core/test_cache.py"
BOUND = "tests/kernels/core/test_bound.py"

_cache = partial(Fault, file="kernels/core/cache.py")
_bound = partial(Fault, file="kernels/core/bound.py")

FAULTS = (
    _cache(
        "a stride of 1 finds the kernel compiled for another odd stride",
        before="return value == 1, value % 16 == 0, value in _INT32",
        after="return value % 16 == 0, value in _INT32",
        tests=(f"{KEPT}::test_one_key_is_one_kernel_of_tritons", f"{KEPT}::test_each_difference_is_another_key"),
    ),
    _cache(
        "a 64-bit size finds the kernel compiled for a small one",
        before="return [values[i] in _INT32 for i in self._sizes]",
        after="return []",
        tests=(f"{KEPT}::test_an_int_that_is_not_specialised_has_two_classes",),
    ),
    _cache(
        "a number finds the kernel compiled for an equal number of another type",
        before=", *map(type, unsized)",
        after="",
        tests=(f"{KEPT}::test_what_differs_is_another_kernel",),
    ),
    _cache(
        "an unaligned tensor finds the kernel with 16-byte accesses",
        before="return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype,)",
        after="return value.dtype",
        tests=(f"{KEPT}::test_one_key_is_one_kernel_of_tritons",),
    ),
    _cache(
        "a kernel that is loaded on one device is launched on another",
        before="return device, config.num_warps",
        after="return config.num_warps",
        tests=(f"{KEPT}::test_options_and_devices_have_kernels_of_their_own",),
    ),
    _cache(
        "a constexpr is not part of the key",
        before="self._constants(values)[1:], *self._small(values)",
        after="*self._small(values)",
        tests=(f"{KEPT}::test_each_difference_is_another_key",),
    ),
    _cache(
        "profilers do not see launches by address",
        before="        or has_hooks()\n",
        after="",
        tests=(f"{KEPT}::test_a_hook_that_is_added_is_seen",),
    ),
    _cache(
        "a kernel that wants scratch memory gets none",
        before='if scratch or type(run).__name__ != "CudaLauncher"',
        after='if type(run).__name__ != "CudaLauncher"',
        tests=(f"{KEPT}::test_a_kernel_that_wants_more_is_launched_by_tritons_launcher",),
    ),
    _bound(
        "hooks do not see launches of bound kernels",
        before="if cache.has_hooks():",
        after="if False:",
        tests=(f"{BOUND}::test_hooks_see_launches",),
    ),
    _bound(
        "a bound kernel that fails is no KernelFailed",
        before="raise_for(self._work.kernel, error, self._like.device)",
        after="raise",
        tests=(f"{BOUND}::test_a_kernel_that_fails",),
    ),
    _bound(
        "arrays of one allocation are not aligned",
        before="end += -(-torch.Size(shape).numel() * dtype.itemsize // 16) * 16",
        after="end += torch.Size(shape).numel() * dtype.itemsize",
        tests=(f"{BOUND}::test_room",),
    ),
)
