"""patch and unpatch, and what was replaced by hand."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/models/test_patch.py"
ARGUMENTS = "tests/models/test_patch_arguments.py"
ATOMIC = "tests/models/test_patch_atomic.py"

_patch = partial(Fault, file="fastbert/patch.py")
_registry = partial(Fault, file="fastbert/registry.py")

FAULTS = (
    _patch(
        "a user's subclass is taken for the stock class",
        before="entry = BY_STOCK.get(kind_of(module)) or BY_FAST.get(kind_of(module))",
        after="entry = BY_FAST.get(type(module)) or next((e for cls, e in BY_STOCK.items() if isinstance(module, cls)), None)",
        tests=(f"{TESTS}::test_a_users_subclass_is_left_alone",),
    ),
    _patch(
        "a failed swap is half undone",
        before="        for module, cls in before.items():\n            module.__class__ = cls\n",
        after="",
        tests=(f"{ATOMIC}::test_patch_that_is_interrupted",),
    ),
    _patch(
        "counts of calls survive a second patch",
        before="    if changed:\n",
        after="    if not changed:\n",
        tests=("tests/models/test_report.py::test_calls_are_counted_since_the_last_patch",),
    ),
    _patch(
        "strict is ignored",
        before="if strict and left_stock:",
        after="if strict and not classes:",
        tests=(f"{ARGUMENTS}::test_strict_raises_and_leaves_the_model_as_it_was",),
    ),
    _patch(
        "after the block of patched(), a model that was patched before is stock",
        before="        unpatch(model)\n        _swap_classes(before)\n",
        after="        unpatch(model)\n",
        tests=(f"{ATOMIC}::test_patched_restores_what_was_patched_before",),
    ),
    _patch(
        "FASTBERT_DISABLE=0 switches patching off",
        before='not in ("", "0")',
        after='not in ("",)',
        tests=(f"{ARGUMENTS}::test_the_environment_can_leave_it_on",),
    ),
    _patch(
        "a switch of the previous call stays off",
        before="classes[module] = entry.fast if wanted and reason is None else entry.stock",
        after="classes[module] = entry.fast if wanted and reason is None else type(module)",
        tests=(f"{ARGUMENTS}::test_patching_again_replaces_the_switches",),
    ),
    _patch(
        "unpatch does not clear the switches",
        before="if (kind := kind_of(module)) in BY_FAST})\n    _switches.pop(model, None)\n",
        after="if (kind := kind_of(module)) in BY_FAST})\n",
        tests=("tests/models/test_report.py::test_before_and_after_patching_nothing_is_active",),
    ),
    _registry(
        "a forward that was replaced on the module is lost",
        before="if forward_replaced(module):",
        after="if False:",
        tests=("tests/models/test_other_modules.py::test_a_forward_replaced_before_patching_is_kept",),
    ),
    _registry(
        "a forward that was replaced on its class is lost",
        before="reason = None if untested else self.code.untested(strict=True)",
        after="reason = None",
        tests=("tests/models/test_replaced_code.py::test_strict_raises_and_untested_takes_the_kernel",),
    ),
    _patch(
        "untested=True changes nothing",
        before="    if untested:\n        _accept(classes)\n",
        after="",
        tests=("tests/models/test_replaced_code.py::test_strict_raises_and_untested_takes_the_kernel",),
    ),
    Fault(
        "a forward that was replaced after patching is bypassed",
        file="fastbert/layers/stock.py",
        before="return CODE[name].untested()",
        after="return None",
        tests=("tests/models/test_replaced_code.py", "-k", "test_a_forward_replaced_on_its_class and after and intermediate"),
    ),
    Fault(
        "the report calls a module active whose forward was replaced",
        file="fastbert/report.py",
        before='if forward_replaced(module) and not hasattr(module, "_old_forward"):',
        after="if False:",
        tests=("tests/models/test_replaced_code.py", "-k", "test_a_forward_replaced_on_a_module and after and intermediate"),
    ),
)
