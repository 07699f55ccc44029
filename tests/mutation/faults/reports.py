"""What report and verify say, and the rule they and the tests judge by."""

from functools import partial

from tests.mutation.fault import Fault

REPORT = "tests/models/test_report.py"
NUMERICS = "tests/test_numerics.py"

_report = partial(Fault, file="fastbert/report.py")
_dispatch = partial(Fault, file="fastbert/dispatch.py")
_numerics = partial(Fault, file="fastbert/numerics.py")

FAULTS = (
    _report(
        'one fallback makes an active module "fell back"',
        before="fell_back = bool(tally.fallbacks) and not tally.kernel",
        after="fell_back = bool(tally.fallbacks)",
        tests=(f"{REPORT}::test_each_fallback_is_counted_with_its_reason", f"{REPORT}::test_fell_back_is_a_state_of_its_own"),
    ),
    _report(
        "a subclass, which stays stock, is not shown",
        before="elif isinstance(module, tuple(BY_STOCK)):",
        after="elif False:",
        tests=("tests/models/test_patch.py::test_a_users_subclass_is_left_alone",),
    ),
    _report(
        "a switch that is off is not given as the reason",
        before='return f"{entry.disabled_switch(switches)}=False"',
        after='return entry.stock_reason(module) or "not patched"',
        tests=("tests/models/test_patch_arguments.py::test_a_switch_leaves_its_kernel_out",),
    ),
    _report(
        "calls of layers that share a line are those of the first",
        before="str(sum(row.kernel_calls for row in rows)),",
        after="str(first.kernel_calls),",
        tests=(f"{REPORT}::test_layers_that_agree_share_a_line",),
    ),
    _dispatch(
        "a model in float64 goes to the kernels on a GPU",
        before='device.type == "cuda" and dtype == torch.float64',
        after='device.type == "cpu" and dtype == torch.float64',
        tests=("tests/kernels/test_float64_on_a_gpu.py::test_a_model_is_told_why",),
    ),
    _dispatch(
        "reasons are lost",
        before="                tally.fallbacks[reason] += 1\n",
        after='                tally.fallbacks["stock"] += 1\n',
        tests=(f"{REPORT}::test_each_fallback_is_counted_with_its_reason",),
    ),
    _dispatch(
        "calls are not counted beyond the first",
        before="tally.kernel += 1",
        after="tally.kernel = 1",
        tests=(f"{REPORT}::test_each_call_is_counted",),
    ),
    _numerics(
        "an error of twenty times eager's passes",
        before="bound = 2.0 * eager_error",
        after="bound = 20.0 * eager_error",
        tests=(f"{NUMERICS}::test_twice_eagers_error_passes_and_more_fails",),
    ),
    _numerics(
        "NaN out of place passes",
        before="if misplaced.any():",
        after="if False:",
        tests=(f"{NUMERICS}::test_a_non_finite_element_of_the_kernels_own_fails",),
    ),
    Fault(
        "verify passes a model without kernel calls",
        file="fastbert/verify.py",
        before="return self.kernel_calls > 0 and all(",
        after="return all(",
        tests=("tests/test_verify.py::test_nothing_through_a_kernel_is_not_a_pass",),
    ),
    Fault(
        "verify cannot widen tensors that a user's module makes",
        file="fastbert/verify.py",
        before="if not writes and any(self._is_wide(x) for x in tree_leaves((args, kwargs))):",
        after="if False:",
        tests=("tests/test_verify.py::test_a_module_of_ones_own_that_makes_float32_tensors",),
    ),
    Fault(
        "verify takes the model's own attention away",
        file="fastbert/verify.py",
        before="    own = _own_attention(model)\n",
        after="    own = None\n",
        tests=("tests/models/test_others_attention.py::test_verify_compares_with_the_models_own_attention",),
    ),
)
