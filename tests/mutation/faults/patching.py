"""patch, unpatch, and the config that names fastbert's attention."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/models/test_patch.py"
ARGUMENTS = "tests/models/test_patch_arguments.py"
ATOMIC = "tests/models/test_patch_atomic.py"
ATTENTION = "tests/models/test_attention.py"

_patch = partial(Fault, file="fastbert/patch.py")
_registry = partial(Fault, file="fastbert/registry.py")
_configs = partial(Fault, file="fastbert/integrations/configs.py")

FAULTS = (
    _patch(
        "a user's subclass is taken for the stock class",
        before="entry = BY_STOCK.get(type(module)) or BY_FAST.get(type(module))",
        after="entry = BY_FAST.get(type(module)) or next((e for cls, e in BY_STOCK.items() if isinstance(module, cls)), None)",
        tests=(f"{TESTS}::test_a_users_subclass_is_left_alone",),
    ),
    _patch(
        "unpatch leaves the config that names fastbert's attention",
        before="stock_config(config) if is_patched(config) else config",
        after="config",
        tests=(f"{TESTS}::test_unpatched_is_bitwise_as_before",),
    ),
    _patch(
        "half of a failed swap stays",
        before="        for module, cls in before.items():\n            module.__class__ = cls\n",
        after="",
        tests=(f"{ATOMIC}::test_patch_that_is_interrupted",),
    ),
    _patch(
        "configs of a failed swap stay",
        before="        for module, config in configs_before.items():\n            module.config = config\n",
        after="",
        tests=(f"{ATOMIC}::test_configs_that_are_interrupted",),
    ),
    _patch(
        "calls are counted on after a second patch",
        before="if before[module] is not cls:",
        after="if before[module] is cls:",
        tests=("tests/models/test_report.py::test_calls_are_counted_since_the_last_patch",),
    ),
    _patch(
        "strict is ignored",
        before="if strict and left_stock:",
        after="if strict and not classes:",
        tests=(f"{ARGUMENTS}::test_strict_raises_and_leaves_the_model_as_it_was",),
    ),
    _patch(
        "leaving the block of patched() leaves a model stock that was patched before",
        before="        _swap(before, configs_before)\n",
        after="",
        tests=(f"{ATOMIC}::test_patched_restores_what_was_patched_before",),
    ),
    _patch(
        "FASTBERT_DISABLE=0 switches patching off",
        before='not in ("", "0")',
        after='not in ("",)',
        tests=(f"{ARGUMENTS}::test_the_environment_can_leave_it_on",),
    ),
    _patch(
        "a switch of the call before stays off",
        before="classes[module] = entry.fast if wanted and reason is None else entry.stock",
        after="classes[module] = entry.fast if wanted and reason is None else type(module)",
        tests=(f"{ARGUMENTS}::test_patching_again_replaces_the_switches",),
    ),
    _patch(
        "unpatch does not forget the switches",
        before="    _swap(classes, _plan_configs(model, classes))\n    _switches.pop(model, None)\n",
        after="    _swap(classes, _plan_configs(model, classes))\n",
        tests=("tests/models/test_report.py::test_before_and_after_patching_nothing_is_active",),
    ),
    _registry(
        "a forward that was replaced on the module is lost",
        before='if "forward" in vars(module):',
        after="if False:",
        tests=("tests/models/test_other_modules.py::test_a_forward_replaced_before_patching_is_kept",),
    ),
    _configs(
        "models that share a config share the patched one",
        before="patched = copy.deepcopy(config)",
        after="patched = config",
        tests=(f"{TESTS}::test_a_second_model_on_the_same_config_is_untouched",),
    ),
    _configs(
        "a copy that is unpatched keeps fastbert's attention",
        before="stock._attn_implementation = former",
        after="pass",
        tests=(f"{ATTENTION}::test_a_copy_of_a_patched_model_is_patched_and_can_be_unpatched",),
    ),
    _configs(
        "what was changed while patched is lost",
        before="if not chosen_by_patch and (name not in then or value != then[name]):",
        after="if False:",
        tests=(f"{ATTENTION}::test_what_is_changed_on_the_patched_config_stays_after_unpatch",),
    ),
)
