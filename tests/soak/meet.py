"""Each kind of fault: injected into the next step of a training, met as a user's loop would, and its consequences checked.

A function here leaves the training where it was, with the step still to be taken, or where that step ends. It raises
AssertionError if something was lost. Where plain PyTorch stands in for a kernel, the step is judged by the rule and then taken
back, so that the run stays comparable bit by bit with an undisturbed one.
"""

import copy
import errno
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import triton
from torch import nn

import fastbert
from fastbert.kernels.core import failures
from tests.faults.broken import ERRORS
from tests.soak.compared import forget_failures, judge, results, stepped
from tests.soak.inject import Countdown, Failing, at_launches
from tests.soak.training import OPTIONS, Training, batch_of, head_of, on_kernels

LASTING = 6  # steps that a branch of the run takes with a kernel that always fails; even, to end at a step on kernels


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def _interrupt() -> None:
    raise KeyboardInterrupt


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _operations(training: Training) -> tuple[int, int]:
    """How many operations and launches the next step's forward and backward have."""
    random_state = torch.get_rng_state()
    with Countdown() as forward:
        loss = training.forward()
    with Countdown() as backward:
        loss.backward()
    training.again(random_state)
    return forward.seen, backward.seen


def out_of_memory(training: Training, place: float, in_forward: bool) -> None:
    random_state, (forward, backward) = torch.get_rng_state(), _operations(training)
    raised = False
    try:
        if in_forward:
            with Countdown(int(place * forward), _out_of_memory):
                training.forward()
        else:
            loss = training.forward()
            with Countdown(int(place * backward), _out_of_memory):
                loss.backward()
    except torch.OutOfMemoryError:
        raised = True
    assert raised, "running out of memory was not raised"
    assert not failures.reasons, failures.reasons
    training.again(random_state)


def out_of_memory_in_the_optimizer(training: Training, place: float) -> float:
    """The step runs out of memory at one place after the other until it succeeds; in between nothing may have changed."""
    chance = random.Random(place)
    loss = training.forward()
    loss.backward()
    before, n = training.digest(), 0
    while True:
        try:
            with Countdown(n, _out_of_memory):
                training.optimizer.step()
            break
        except torch.OutOfMemoryError:
            n += chance.randint(1, 8)
        assert training.digest() == before, f"a step that ran out of memory at operation {n} changed something"
    training.optimizer.zero_grad()
    training.done += 1
    return loss.item()


def interrupted(training: Training, place: float, checkpoint: Path) -> None:
    """Somewhere in the step, after which the user goes on from the last checkpoint."""
    with suppress(KeyboardInterrupt), Countdown(int(place * sum(_operations(training))), _interrupt):
        training.step()
    training.load(checkpoint)


def killed(training: Training, place: float) -> None:
    with Countdown(int(place * sum(_operations(training))), _kill):
        training.step()


class _Dying:
    """A file whose process is killed after `left` bytes."""

    def __init__(self, file: Any, left: int) -> None:
        self._file, self._left = file, left

    def write(self, data: Any) -> int:
        data = bytes(data)
        written = self._file.write(data[: self._left])
        self._left -= written
        if self._left <= 0:
            self._file.flush()
            _kill()
        return written

    def flush(self) -> None:
        self._file.flush()


def killed_while_saving(training: Training, place: float, checkpoint: Path) -> None:
    size = checkpoint.stat().st_size
    training.save(checkpoint, lambda file: _Dying(file, int(place * size)))


def kernel_fails(training: Training, place: float, error: Callable[[], Exception], lasting: bool) -> str:
    """A launch of the forward or backward fails. Returns the kernel's name."""
    state, launched = training.state(), []
    with at_launches(launched.append):
        results(training)
    failing = Failing(int(place * len(launched)), error, lasting)
    with at_launches(failing):
        found = results(training)
        _check_reported(training.model, failing)
        if lasting:
            for _ in range(LASTING):
                training.step()
            found = results(training)
    forget_failures()
    judge(found, training)
    training.restore(state)
    return failing.kernel or ""


def _check_reported(model: nn.Module, failing: Failing) -> None:
    assert failing.kernel is not None and failing.kernel in failures.reasons, (failing.kernel, failures.reasons)
    told = "; ".join(row.reason for row in fastbert.report(model).rows)
    assert f"{failing.kernel} failed: " in told, f"report does not say that {failing.kernel} failed: {told}"


def optimizer_kernel_fails(training: Training, place: float) -> None:
    del place
    with at_launches(Failing(0, ERRORS["driver"], lasting=True, only="adamw_kernel")):
        found = stepped(training)
    assert failures.reasons.keys() == {"adamw_kernel"}, failures.reasons
    forget_failures()
    judge(found, training, stepped)


def _no_such_file() -> OSError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), triton.knobs.cache.dir)


_OF_THE_CACHE: dict[str, Callable[[], Exception]] = {
    "cache is full": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "cache is read-only": lambda: OSError(errno.EROFS, os.strerror(errno.EROFS)),
    "cache has vanished": _no_such_file,
    "cache is damaged": lambda: json.JSONDecodeError("Expecting value", "", 0),
}


def cache_fails(training: Training, place: float, kind: str) -> float:
    """A kernel is compiled while Triton's cache is of no use: it goes elsewhere, and the step is the same to the last bit."""
    launched: list[str] = []
    with at_launches(launched.append):
        results(training)
    former, failures.move_cache.folder = failures.move_cache.folder, None
    failing = Failing(int(place * len(launched)), _OF_THE_CACHE[kind])
    with triton.knobs.cache.scope(), at_launches(failing):
        loss = training.step()
    moved, failures.move_cache.folder = failures.move_cache.folder, former
    assert moved is not None and not failures.reasons, f"the cache was not moved: {failures.reasons}"
    moved.cleanup()
    return loss


def patched_again(training: Training, place: float) -> None:
    del place
    fastbert.unpatch(training.model)
    fastbert.patch(training.model, **OPTIONS)
    assert all(not row.kernel_calls for row in fastbert.report(training.model).rows)


def without_attention(training: Training, place: float) -> None:
    """In eval mode, because stock's attention draws another dropout."""
    del place
    model = training.model.eval()
    fastbert.patch(model, attention=False, **OPTIONS)
    found = results(training)
    reasons = {row.hf_class: row.reason for row in fastbert.report(model).rows}
    assert reasons["BertSelfAttention"] == "attention=False", reasons
    fastbert.patch(model, **OPTIONS)
    judge(found, training)
    reasons = {row.hf_class: row.reason for row in fastbert.report(model).rows}
    assert not any("attention=False" in reason or "not patched" in reason for reason in reasons.values()), reasons
    model.train()


def verified(training: Training, place: float) -> None:
    del place
    model, batch = training.model[head_of(training.done)], batch_of(training.done)
    result = fastbert.verify(model, batch)
    assert result, str(result)


def reported(training: Training, place: float) -> None:
    """One call more is one call more in the report, of a kernel or of stock code."""
    del place

    def calls() -> tuple[int, int]:
        row = next(row for row in fastbert.report(training.model).rows if row.hf_class == "BertEmbeddings")
        return row.kernel_calls, sum(row.fallback_calls.values())

    kernel, stock = calls()
    results(training)
    more = (1, 0) if on_kernels(training.done) else (0, 1)
    assert calls() == (kernel + more[0], stock + more[1]), (calls(), kernel, stock)


def called_by_a_thread(training: Training, place: float) -> float:
    """While the step is taken, another thread calls a copy of the model in eval mode, which gives what it gave before."""
    del place
    model, batch = copy.deepcopy(training.model["classify"]).eval(), batch_of(4)
    wanted = _logits(model, batch)
    ready, over, found = threading.Event(), threading.Event(), []

    def serve() -> None:
        while not over.is_set() or not found:
            found.append(torch.equal(_logits(model, batch), wanted))
            ready.set()

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait()
    try:
        loss = training.step()
    finally:
        over.set()
        thread.join()
    assert all(found), "a call by another thread gave something else during a step"
    return loss


def _logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def meet(kind: str, training: Training, place: float, checkpoint: Path) -> dict[str, Any]:
    """Let `training` meet one fault. Returns what there is to tell: the loss if the step was taken, the kernel that failed."""
    error = list(ERRORS.values())[int(place * 1000) % len(ERRORS)]
    match kind:
        case "out of memory in a forward" | "out of memory in a backward":
            out_of_memory(training, place, kind.endswith("forward"))
        case "out of memory in an optimizer step":
            return {"loss": out_of_memory_in_the_optimizer(training, place)}
        case "interrupted":
            interrupted(training, place, checkpoint)
        case "kernel fails once" | "kernel fails from now on":
            return {"kernel": kernel_fails(training, place, error, kind.endswith("now on"))}
        case "kernel does not compile":
            return {"kernel": kernel_fails(training, place, ERRORS["compilation"], lasting=True)}
        case "killed":
            killed(training, place)
        case "killed while saving":
            killed_while_saving(training, place, checkpoint)
        case "called by another thread":
            return {"loss": called_by_a_thread(training, place)}
        case _ if kind in _OF_THE_CACHE:
            return {"loss": cache_fails(training, place, kind)}
        case _:
            _OTHERS[kind](training, place)
    return {}


_OTHERS: dict[str, Callable[[Training, float], None]] = {
    "optimizer's kernel fails": optimizer_kernel_fails,
    "unpatched and patched again": patched_again,
    "patched without attention": without_attention,
    "verified": verified,
    "reported": reported,
}
