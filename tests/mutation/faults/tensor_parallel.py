"""Models whose Linears are sharded over ranks, and collectives that are under way when a kernel reads their result."""

from functools import partial

from tests.mutation.fault import Fault

RANKS = "tests/distributed/test_tensor_parallel.py::test_on_two_ranks"

_op = partial(Fault, file="kernels/core/op.py", tests=(RANKS,))
_optimizer = partial(Fault, file="fastbert/optim.py", tests=(RANKS,))

FAULTS = (
    _op("an op reads the result of a collective under way", before="ready = waited(values)", after="ready = values"),
    _op(
        "an op's backward reads a gradient that is still being reduced",
        before="waited(upstream)[0])",
        after="upstream[0])",
    ),
    Fault(
        "the layer op's backward reads a gradient that is still being reduced",
        file="kernels/encoder_layer/__init__.py",
        before="    [dy] = waited((dy,))\n",
        after="",
        tests=(RANKS,),
    ),
    Fault(
        "a DTensor that a Linear returned goes to a kernel",
        file="fastbert/dispatch.py",
        before="    found = next((x for x in results if not is_plain_tensor(x) and",
        after="    found = next((x for x in results if x is None and",
        tests=(RANKS,),
    ),
    Fault(
        "attention gives DTensors to its kernel",
        file="fastbert/layers/attention.py",
        before="        if falls_back_after(self, q, k, v):  # stock's forward calls the Linears once more\n",
        after="        if False:\n",
        tests=(RANKS,),
    ),
    _optimizer(
        "the optimizer's kernel reads a gradient that is still being reduced",
        before="                    grad = param.grad = waited((grad,))[0]\n",
        after="                    pass\n",
    ),
    _optimizer(
        "without the kernel, torch's functions get DTensors and other tensors in one list",
        before="    if not _is_distributed(type(param)):\n        return param, grad, *state\n",
        after="    if not _is_distributed(type(param)) or param.dtype == torch.bfloat16:\n        return param, grad, *state\n",
    ),
)
