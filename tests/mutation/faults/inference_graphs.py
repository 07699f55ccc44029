"""Inference from graphs."""

from tests.mutation.fault import Fault

STATE, CALLS = "fastbert/graphs/state.py", "fastbert/graphs/inference.py"
INPUTS, OUTPUTS = "fastbert/graphs/inputs.py", "fastbert/graphs/outputs.py"
REQUEST, BUCKETS, CLASSES = "fastbert/graphs/request.py", "fastbert/graphs/buckets.py", "fastbert/graphs/classes.py"
TESTS, STALE, API = "tests/graphs/test_inference.py", "tests/graphs/test_staleness.py", "tests/graphs/test_api.py"


def _fault(says: str, file: str, before: str, after: str, *tests: str, short: bool = False) -> Fault:
    return Fault(says, file, before=before, after=after, tests=tests, short=short)


FAULTS = (
    _fault(
        "a batch is padded to a bucket beside a module that reads padding",
        STATE,
        "return all(map(_keeps_positions_apart, self._modules[1:])) and not any(",
        "return not any(",
        f"{STALE}::TestWhatReadsPadding::test_of_the_user",
        short=True,
    ),
    _fault(
        "weights that a list holds are not seen",
        STATE,
        "                waiting += new\n",
        "                del found[hidden]\n",
        f"{STALE}::TestWhatIsNotRegistered::test_a_change",
    ),
    _fault(
        "attributes of classes are not seen",
        STATE,
        "and self._all_members() == self._members",
        "",
        f"{STALE}::TestWhatIsNotRegistered::test_a_change",
    ),
    _fault(
        "a second forward on a module is not seen",
        STATE,
        "return (*_RELEVANT[cls], *(own.keys() - _PRISTINE[cls])) if cls in _RELEVANT else _names(own)",
        "return _RELEVANT.get(cls) or _names(own)",
        f"{STALE}::TestWhatIsNotRegistered::test_a_forward_on_a_module_is_replaced_by_another",
    ),
    _fault(
        "new memory of a parameter is not seen",
        STATE,
        "list(map(Tensor.data_ptr, self._tensors)) == self._addresses",
        "True",
        f"{STALE}::TestStaleness::test_another_dtype",
        f"{STALE}::TestStaleness::test_a_change_in_a_layer",
    ),
    _fault(
        "a model that another thread changed during a capture counts as captured",
        CALLS,
        "if not state.is_current() or (left_something",
        "if (left_something",
        f"{STALE}::TestChangesDuringACapture::test_by_the_forward_itself",
        short=True,
    ),
    _fault(
        "older graphs outlive a change during a capture",
        CALLS,
        "            self._captured.clear()\n        self._state = state",
        "        self._state = state",
        f"{STALE}::TestChangesDuringACapture::test_older_graphs_are_dropped",
    ),
    _fault(
        "a call from within another overwrites its batch",
        CALLS,
        "        self._busy = True\n",
        "",
        f"{TESTS}::TestOrdinaryCalls::test_inside_another_call",
    ),
    _fault(
        "a row of padding averages over the bucket",
        CALLS,
        "return 0 if min(tokens) else",
        "return 0 if True else",
        f"{TESTS}::TestOrdinaryCalls::test_a_row_that_is_all_padding",
    ),
    _fault(
        "a larger batch shows through a smaller one",
        INPUTS,
        "            self.mask.zero_()\n",
        "",
        f"{TESTS}::TestEquality::test_smaller_batches_after_larger_ones",
    ),
    _fault(
        "outputs are the graph's own",
        OUTPUTS,
        "        if keep:\n",
        "        if False:\n",
        f"{TESTS}::TestOutputs::test_belong_to_the_caller",
    ),
    _fault(
        "an output per token is not cut to the batch's length",
        OUTPUTS,
        "return part[:, : shape[-1]] if name in self._per_token else part",
        "return part",
        f"{TESTS}::TestEquality::test_smaller_batches_after_larger_ones",
    ),
    _fault(
        "graphs of other settings of torch are replayed",
        REQUEST,
        "*[setting() for setting in _SETTINGS], ",
        "",
        f"{TESTS}::TestOrdinaryCalls::test_settings_of_torch",
    ),
    _fault(
        "a bucket exceeds the model's positions",
        BUCKETS,
        "length <= one.length <= longest",
        "length <= one.length",
        f"{TESTS}::TestBuckets::test_no_bucket_exceeds_the_positions",
    ),
    _fault(
        "a graphed model inside another keeps its graphs",
        CLASSES,
        "for inside in graphed_modules(root):",
        "for inside in [root]:",
        f"{API}::TestApi::test_a_graphed_model_that_became_a_part_of_another",
    ),
)
