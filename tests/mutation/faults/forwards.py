"""Which stock forwards pass for those that fastbert was tested against."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/test_forwards.py"

_forwards = partial(Fault, file="fastbert/forwards.py")

FAULTS = (
    _forwards(
        "a user's wrapper around a stock function is accepted",
        before="    while isinstance(function, FunctionType) and function.__code__.co_filename.startswith(folders):\n",
        after="    while isinstance(function, FunctionType):\n",
        tests=(f"{TESTS}::test_what_is_not_transformers_code_is_replaced",),
    ),
    _forwards(
        "only the outermost decorator is judged, not the wrapped function",
        before='        if not hasattr(function, "__wrapped__"):\n            return function\n',
        after="        return function\n",
        tests=(f"{TESTS}::test_what_is_not_transformers_code_is_replaced",),
    ),
    _forwards(
        "names of arguments do not count",
        before='_LEFT_OUT = {"ctx",',
        after='_LEFT_OUT = {"arg", "ctx",',
        tests=(f"{TESTS}::test_code_changes_the_digest",),
    ),
    _forwards(
        "annotations of assignments count",
        before="    if isinstance(node, ast.AnnAssign):\n",
        after="    if isinstance(node, ast.AugAssign):\n",
        tests=(f"{TESTS}::test_documentation_changes_no_digest",),
    ),
    _forwards(
        "a function that replaced a method later is not judged",
        before="    if judged is None or judged[0] is not function:\n",
        after="    if judged is None:\n",
        tests=(f"{TESTS}::test_replaced_and_put_back",),
    ),
    _forwards(
        "a function accepted by one patch is accepted for all names",
        before="    if not strict and any(function is accepted for accepted in _accepted.get(pair, ())):\n",
        after="    if any(function is accepted for accepted in _accepted.get(pair, ())):\n",
        tests=(f"{TESTS}::test_accepted_for_this_process",),
    ),
    _forwards(
        "accepting one function accepts all later ones",
        before="    if not strict and any(function is accepted for accepted in _accepted.get(pair, ())):\n",
        after="    if not strict and pair in _accepted:\n",
        tests=(f"{TESTS}::test_accepted_for_this_process",),
    ),
)
