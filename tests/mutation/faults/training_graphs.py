"""Graphed training steps."""

from tests.mutation.fault import Fault

STEP, STATE = "fastbert/graphs/training.py", "fastbert/graphs/training_state.py"
BUDGETS, UPDATE = "fastbert/graphs/training_budgets.py", "fastbert/graphs/training_update.py"
TESTS, CHANGES = "tests/graphs/test_training.py", "tests/graphs/test_training_changes.py"

FAULTS = (
    Fault(
        "a step goes on after a write to the model's own types, which its embeddings looked at on the host",
        STATE,
        before="            [buffer._version for buffer in self._inspected],\n",
        after="",
        tests=("tests/graphs/test_families.py::test_a_training_step_after_a_write_to_the_models_own_types",),
    ),
    Fault(
        "a replay reads the batch of the capture",
        STEP,
        before="torch._foreach_copy_(shape.inputs, tensors)",
        after="pass",
        tests=(f"{TESTS}::test_optimizers_of_torch",),
    ),
    Fault(
        "the loss is the graph's memory, which the next replay overwrites",
        STEP,
        before="loss = shape.value.clone()",
        after="loss = shape.value",
        tests=(f"{TESTS}::test_the_loss_is_the_caller_s_own",),
    ),
    Fault(
        "a replay uses the learning rate of its capture",
        UPDATE,
        before="if numbers == self._sent:",
        after="if self._sent:",
        tests=(f"{TESTS}::test_schedules_change_the_rate_that_replays_use",),
    ),
    Fault(
        "a scheduler finds tensors in the groups",
        UPDATE,
        before="group.update(values)",
        after="pass",
        tests=(f"{TESTS}::test_schedules_change_the_rate_that_replays_use",),
    ),
    Fault(
        "frozen parameters go on being trained",
        STATE,
        before="[(trained, not hooks, not after) for",
        after="[(not hooks, not after) for",
        tests=(CHANGES, "-k", "test_a_change_is_noticed and freeze"),
    ),
    Fault(
        "state of the optimizer that was loaded is not seen",
        STATE,
        before="found += chain.from_iterable(map(dict.values, optimizer.state.values()))",
        after="pass",
        tests=(CHANGES, "-k", "test_a_change_is_noticed and load_state"),
    ),
    Fault(
        "a module that was replaced is not seen",
        STATE,
        before="self._all(self._children_of),",
        after="",
        tests=(CHANGES, "-k", "test_a_change_is_noticed and replace_module"),
    ),
    Fault(
        "a step is captured into gradients of its own after an accumulation began anew",
        STEP,
        before="if self._accumulation > 1 and self._new_buffers:",
        after="if False:",
        tests=(f"{CHANGES}::test_random_changes_between_steps_of_random_shapes",),
    ),
    Fault(
        "a batch with more tokens than the budget is packed into it",
        BUDGETS,
        before="return given[place] if place < len(given) else None",
        after="return given[min(place, len(given) - 1)]",
        tests=(f"{TESTS}::test_budgets_that_are_given",),
    ),
    Fault(
        "a padded position that is read is dropped",
        BUDGETS,
        before="if padding and packers.alone:",
        after="if False:",
        tests=(f"{TESTS}::test_batches_that_a_packing_head_cannot_pack",),
    ),
    Fault(
        "autocast runs in another type",
        STEP,
        before="return torch.autocast(self._device.type, dtype, cache_enabled=False)",
        after="return torch.autocast(self._device.type, torch.float16, cache_enabled=False)",
        tests=(f"{TESTS}::test_autocast",),
    ),
)
