"""A kernel that does not compile or launch: plain PyTorch computes the same result, in that call and all later ones."""

import logging
import math
import threading

import pytest
import torch
from torch import nn
from triton.runtime.errors import InterpreterError

from fastbert import dispatch
from fastbert.kernels.core import failures
from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
from fastbert.testing.linear_cross_entropy import chunks_of

from .broken import ERRORS, break_kernels
from .cases import NAMES, WITH_DROPOUT, cases

PARTS = ("forward", "backward", "both")


def kernels_of(case, part):
    return {"forward": case.forward, "backward": case.backward, "both": (*case.forward, *case.backward)}[part]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.one_in(3)
def test_is_right_all_the_same(name, part, dtype, monkeypatch):
    case = cases(dtype)[name]
    broken = break_kernels(monkeypatch, kernels_of(case, part))
    case.check(case.run())
    assert broken.keys() & failures.reasons.keys()


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", WITH_DROPOUT)
@pytest.mark.one_in(3)
def test_dropout_is_that_of_the_kernel(name, part, p, monkeypatch):
    """The mask is read off the working kernel; a forward of one and a backward of the other share it."""
    case = cases()[name]
    keep = case.keep(p, torch.tensor(1234, device=case.dy.device))
    assert p == 1.0 or 0 < keep.sum() < keep.numel()
    eager = [case.eager(p, exact) for exact in (False, True)]
    break_kernels(monkeypatch, kernels_of(case, part))
    results = case.run(p)
    monkeypatch.setattr(type(case), "eager", lambda self, p, exact=False: eager[exact])
    case.check(results, p)
    assert failures.reasons


@pytest.mark.parametrize("part", PARTS)
def test_a_loss_whose_gradients_are_formed_in_chunks(part, monkeypatch):
    case = cases()["linear_cross_entropy sum"]
    assert case.call is linear_cross_entropy
    break_kernels(monkeypatch, kernels_of(case, part))
    with chunks_of(2):
        case.check(case.run())
    assert failures.reasons


@pytest.mark.parametrize("error", ERRORS)
def test_says_so_once(error, monkeypatch, caplog, launches):
    case = cases()["bias_gelu gelu"]
    (broken,) = break_kernels(monkeypatch, case.forward, ERRORS[error]).values()
    with caplog.at_level(logging.WARNING, "fastbert"):
        for _ in range(3):
            case.check(case.run())
    (record,) = caplog.records
    assert "bias_gelu_fwd_kernel" in record.message and "fastbert env" in record.message
    assert type(ERRORS[error]()).__name__ in record.message
    assert broken.attempts == 1  # nothing is compiled again
    assert launches() == {"bias_gelu_bwd_kernel": 3}  # and what works goes on


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        InterpreterError("IndexError()"),
    ],
    ids=lambda error: str(error)[-20:],
)
def test_what_is_no_fault_of_the_kernel_is_raised(error, monkeypatch):
    """Out of memory, or a device on which nothing runs any more: plain PyTorch would fail as well."""
    case = cases()["bias_gelu gelu"]

    def raised():
        raise error

    break_kernels(monkeypatch, case.forward, raised)
    with pytest.raises(type(error)):
        case.run()
    assert not failures.reasons


DURING_CAPTURE = (
    "Triton Error [CUDA]: operation not permitted when stream is capturing",
    "Triton Error [CUDA]: operation failed due to a previous error during capture",
    "Triton Error [CUDA]: operation would make the legacy stream depend on a capturing blocking stream",
    "CUDA error: cudaErrorStreamCaptureUnsupported",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
)
WITHOUT_CONTEXT = (
    "Triton Error [CUDA]: context is destroyed",
    "Triton Error [CUDA]: driver shutting down",
    "Triton Error [CUDA]: initialization error",
    "Triton Error [CUDA]: invalid device context",
    "Triton Error [CUDA]: invalid resource handle",
    "CUDA_ERROR_DEINITIALIZED",
)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize(
    ("text", "advice"),
    [(text, "before capturing it") for text in DURING_CAPTURE] + [(text, "in a new process") for text in WITHOUT_CONTEXT],
)
def test_what_a_capture_forbids_is_raised_and_disables_nothing(text, advice, strict, monkeypatch, launches):
    case = cases()["bias_gelu gelu"]
    error = RuntimeError(text)

    def raised():
        raise error

    monkeypatch.setattr(failures, "strict", strict)
    break_kernels(monkeypatch, case.forward, raised, bad=1)
    with pytest.raises(RuntimeError) as found:
        case.run()
    assert found.value is error
    (note,) = error.__notes__
    assert case.forward[0] in note and advice in note
    case.check(case.run())
    assert not failures.reasons and launches() == dict.fromkeys((*case.forward, *case.backward), 1)


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS)
def test_no_error_inside_a_capture_disables_a_kernel(error, part, monkeypatch, launches):
    """Whatever the error: a first compilation fails there in many ways, and a fallback would be in the graph permanently."""
    case = cases()["bias_gelu gelu"]
    made = ERRORS[error]()
    break_kernels(monkeypatch, kernels_of(case, part), lambda: made, bad=math.inf)
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for _ in range(2):
            with pytest.raises(type(made)) as found:
                case.run()
            assert found.value is made and "before capturing it" in made.__notes__[-1]
    assert not failures.reasons
    case.check(case.run())
    assert failures.reasons.keys() == set(kernels_of(case, part)), "outside the capture it is the kernel's fault"


@pytest.mark.gpu
@pytest.mark.parametrize("error", ["compilation", "driver"])
def test_the_capture_of_a_graph_is_noticed(error, monkeypatch, launches):
    case = cases()["bias_gelu gelu"]
    made = ERRORS[error]()
    break_kernels(monkeypatch, case.forward, lambda: made, bad=1)
    with pytest.raises(type(made)) as found, torch.cuda.graph(torch.cuda.CUDAGraph()):
        case.call(**case.inputs, **case.options)
    assert found.value is made and "before capturing it" in made.__notes__[0]
    case.call(**case.inputs, **case.options)
    assert not failures.reasons and launches() == dict.fromkeys(case.forward, 1)


def test_strict_raises(monkeypatch):
    """Tests and benchmarks set `failures.strict`."""
    case = cases()["bias_gelu gelu"]
    monkeypatch.setattr(failures, "strict", True)
    break_kernels(monkeypatch, case.forward)
    with pytest.raises(failures.KernelFailed, match="bias_gelu_fwd_kernel could not be compiled or launched"):
        case.run()


def test_wrong_arguments_are_raised(monkeypatch):
    """The checks run before the launch, and before the plain fallback."""
    case = cases()["linear_cross_entropy mean"]
    break_kernels(monkeypatch, case.forward)
    for labels in (torch.full_like(case.options["labels"], 7), torch.full_like(case.options["labels"], -1)):
        with pytest.raises(IndexError):
            case.call(**case.inputs, labels=labels)
    with pytest.raises(ValueError, match="labels"):
        case.call(**case.inputs, labels=case.options["labels"].int())


def test_ids_outside_of_their_table_are_raised(monkeypatch):
    case = cases()["embedding_layernorm"]
    break_kernels(monkeypatch, case.forward)
    case.check(case.run())
    for name in ("ids", "token_type_ids"):
        with pytest.raises(IndexError):
            case.call(**case.inputs, **case.options | {name: case.options[name] + 100})


def test_another_threads_failure_is_not_this_calls(monkeypatch):
    """The report counts a call as a fallback if a kernel fails in it, and not while it fails elsewhere."""
    case, module = cases()["bias_gelu gelu"], nn.Identity()
    break_kernels(monkeypatch, case.forward)

    def call() -> None:
        thread = threading.Thread(target=case.run)
        thread.start()
        thread.join()

    dispatch.falls_back(module, None)
    dispatch.run(module, call)
    assert failures.reasons and dispatch.calls(module) == dispatch.Calls(kernel=1)
    dispatch.falls_back(module, None)
    dispatch.run(module, case.run)
    assert dispatch.calls(module).kernel == 1 and dispatch.calls(module).fallbacks.total() == 1
