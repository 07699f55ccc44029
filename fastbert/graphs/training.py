"""Captures whole training steps as CUDA graphs: `fastbert.graphed_step`.

A step of fine-tuning BERT-base is some 500 launches and a few milliseconds of work; the host needs longer to launch them
than the GPU to do them. A graph launches all of them at once.

The first calls with a batch of one shape are ordinary steps, on the stream of the captures: they compile kernels and create the
optimizer's state. The next call captures a step, which computes nothing, and replays it for its batch. So no batch is skipped
or repeated, and the losses are those of ordinary steps. What a graph relies on is compared before each replay
(training_state.py); after a change the graphs are dropped and captured anew. A step that cannot be captured runs as usual.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.graphs import training_report as reports
from fastbert.graphs.capture import RECORDERS, Graph, Recorder, recorder_of
from fastbert.graphs.training_budgets import Budgets, Chooser, Packers
from fastbert.graphs.training_guard import NoWaiting, renew_accumulators
from fastbert.graphs.training_state import ModelState, OptimizerState, hooks_on
from fastbert.graphs.training_update import Rates, Update, check_optimizer, make_capturable
from fastbert.lengths import Counted
from fastbert.patch import _check_model

# fastbert.dispatch is imported inside functions: it imports triton (see fastbert/patch.py).

_ORDINARY_BEFORE_THE_FIRST = 3  # steps; further shapes need one
# Steps of a shape for which another one's graph is dropped: a capture takes as long as some ordinary steps.
_ORDINARY_BEFORE_REPLACING = 10
_KNOWN_SHAPES = 16  # that are counted, times max_graphs
_ATTEMPTS = 2
_CONSTANTS = (type(None), bool, int, float, str)
_AUTOCAST_DTYPES = (torch.float16, torch.bfloat16)
Loss = Callable[[Any, Mapping[str, Any]], Tensor]


def graphed_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    loss: Loss | None = None,
    token_budget: int | Sequence[int] | None = None,
    read_budget: int | Sequence[int] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    max_grad_norm: float | None = None,
    accumulation: int = 1,
    autocast: torch.dtype | None = None,
    max_graphs: int = 8,
) -> "GraphedStep":
    """A function that trains `model` by one batch per call and replays the whole step as a CUDA graph.

        step = fastbert.graphed_step(model, optimizer, autocast=torch.bfloat16)
        for batch in batches:  # tensors on the model's device
            loss = step(**batch)
            scheduler.step()

    A call is forward, backward, clipping, optimizer step and zero_grad. There is one graph per shape of the batch, so pad to
    few lengths. A model that packs computes the real tokens only, in one of a few numbers of packed rows ("budgets"); how much
    padding a batch has then hardly matters. The first steps of a shape, and those that cannot be captured, run as usual;
    `print(step)` says how many and why. A model on a CPU trains as usual.

    Args:
        model: a model, patched or not.
        optimizer: fastbert.AdamW, torch.optim.AdamW or torch.optim.Adam. Its groups are set to `capturable=True`. Rates may
            be numbers or tensors, and schedulers of any kind may change them.
        loss: called with the model's outputs and the batch; returns the scalar to minimise. By default the outputs' `loss`.
        token_budget: the numbers of packed rows to choose from; ignored where a model does not pack. By default multiples of
            1/16 of the next power of two. Counting a batch's tokens waits for the device, unless fastbert.LengthsCollator
            counted them.
        read_budget: likewise for the positions with a label, for the loss of a patched MLM head.
        scaler: a GradScaler; scale, unscale, step and update are in the graph. Needs fastbert.AdamW or `fused=True`.
        max_grad_norm: clip the norm of all gradients to this.
        accumulation: step the optimizer at every so many calls, with the mean of their gradients.
        autocast: run forward and loss under autocast in this dtype; None: as it is where the step is called.
        max_graphs: keep so many graphs, and drop the one that was not used for longest.

    Returns:
        A `GraphedStep`. It returns the batch's loss, detached, in memory of its own.

    Raises:
        TypeError: `model` is not a module, `optimizer` is none of the three, or an argument has the wrong type.
        ValueError: an argument is out of range, or the scaler needs an optimizer that takes its tensors.
    """
    _check_model(model)
    check_optimizer(optimizer, scaler)
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: expected a function of outputs and batch, got {loss!r}")
    for name, value in (("accumulation", accumulation), ("max_graphs", max_graphs)):
        if not _is_integer(value) or value < 1:
            raise ValueError(f"{name}: expected an integer from 1 on, got {value!r}")
    if max_grad_norm is not None and not (isinstance(max_grad_norm, (int, float)) and max_grad_norm > 0):
        raise ValueError(f"max_grad_norm: expected a number above 0 or None, got {max_grad_norm!r}")
    if autocast is not None and autocast not in _AUTOCAST_DTYPES:
        raise ValueError(f"autocast: expected torch.float16, torch.bfloat16 or None, got {autocast!r}")
    chooser = Chooser(_ascending("token_budget", token_budget), _ascending("read_budget", read_budget))
    return GraphedStep(model, optimizer, loss, chooser, scaler, max_grad_norm, accumulation, autocast, max_graphs)


class _Shape:
    """What is known of the steps with batches of one shape: the graph, its inputs and its loss."""

    def __init__(self) -> None:
        self.ordinary = 0
        self.failures = 0
        self.reason: str | None = None  # why it is not captured
        self.graph: Graph | None = None
        self.inputs: list[Tensor] = []
        self.value: Tensor | None = None


class GraphedStep:
    """A training step that is replayed as a CUDA graph. Made by `fastbert.graphed_step`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss | None,
        chooser: Chooser,
        scaler: torch.amp.GradScaler | None,
        max_grad_norm: float | None,
        accumulation: int,
        autocast: torch.dtype | None,
        max_graphs: int,
    ) -> None:
        self._model, self._optimizer, self._loss = model, optimizer, loss or _own_loss
        self._chooser, self._autocast = chooser, autocast
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._accumulation, self._max_graphs = accumulation, max_graphs
        self._update = Update(optimizer, self._scaler, max_grad_norm, self._with_gradients)
        self._report = reports.StepReport(type(model).__name__)
        self._lock = Lock()
        self._number = 0  # of the call within the accumulation
        self._buffers: list[tuple[Tensor, Tensor]] = []  # parameters and their gradients while accumulating
        self._ordinary_steps = 0
        self._recorder: Recorder | None = None
        self._shapes: OrderedDict[Any, _Shape] = OrderedDict()
        self._drop()

    def __call__(self, **batch: Any) -> Tensor:
        """Train by one batch, and return its loss.

        Args:
            batch: the arguments of the model's forward: tensors on its device, and constants.
        """
        with self._lock:
            return self._step(batch)

    def report(self) -> reports.StepReport:
        """How many calls replayed a graph, and why the others did not."""
        found = self._report.copy()
        found.graphs = self._graphs()
        return found

    def __str__(self) -> str:
        return str(self.report())

    def reset(self) -> None:
        """Drop all graphs and their memory. The next calls are ordinary steps, then shapes are captured anew."""
        with self._lock:
            self._drop()

    def _step(self, batch: dict[str, Any]) -> Tensor:
        changed = self._state is not None and not all(state.is_current() for state in self._state)
        if changed:
            self._drop()
        if self._state is None:  # what is found here changes only with the state
            self._device, self._reason = self._device_and_reason()
            self._packers = Packers.of(self._model)
        reason = self._reason or self._reason_of(batch)
        if reason is not None:
            return self._ordinary(batch, Budgets(), reason)
        budgets = self._packers.reason or self._chooser.choose(self._packers, batch)
        if isinstance(budgets, str):
            return self._ordinary(batch, Budgets(), budgets)
        batch = {name: value for name, value in batch.items() if not isinstance(value, Counted)}
        key, tensors = self._key(batch, budgets)
        shape = self._shape(key)
        if shape.graph is None:
            if (reason := self._not_yet(shape)) is not None:
                loss = self._ordinary(batch, budgets, reports.CHANGED if changed else reason)
                shape.ordinary += 1
                return loss
            if shape.failures < _ATTEMPTS:
                self._capture(shape, batch, budgets)
            if shape.graph is None:
                return self._ordinary(batch, budgets, str(shape.reason))
        return self._replay(shape, tensors)

    def _shape(self, key: Any) -> _Shape:
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = _Shape()
            if len(self._shapes) > _KNOWN_SHAPES * self._max_graphs:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(key)
        return shape

    def _not_yet(self, shape: _Shape) -> str | None:
        """Why a step of this shape must run as usual before it is captured, or None."""
        if shape.ordinary < 1 or self._ordinary_steps < _ORDINARY_BEFORE_THE_FIRST:
            return reports.WARMING_UP
        if self._accumulation > 1 and self._new_buffers:
            return reports.CHANGED
        if self._graphs() >= self._max_graphs and shape.ordinary < _ORDINARY_BEFORE_REPLACING:
            return reports.RARE
        return None

    def _graphs(self) -> int:
        return sum(shape.graph is not None for shape in self._shapes.values())

    # The step itself.

    def _forward_backward(self, batch: dict[str, Any], budgets: Budgets) -> Tensor:
        """The loss; its gradient is added to the parameters'."""
        with self._autocasting(), self._packers.using(budgets):
            outputs = self._model(**batch)
            loss = self._loss(outputs, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss: expected a scalar tensor, got {found}")
        scaled = loss if self._accumulation == 1 else loss / self._accumulation
        (scaled if self._scaler is None else self._scaler.scale(scaled)).backward()
        return loss.detach()

    def _autocasting(self) -> AbstractContextManager:
        """Autocast without its cache, whose casts of the weights a replay would not repeat."""
        dtype = self._autocast_dtype()
        if dtype is None:
            return nullcontext()
        torch.clear_autocast_cache()
        return torch.autocast(self._device.type, dtype, cache_enabled=False)

    def _autocast_dtype(self) -> torch.dtype | None:
        kind = self._device.type
        if self._autocast is None and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self._autocast

    def _whole_step(self, batch: dict[str, Any], budgets: Budgets) -> Tensor:
        self._clear_gradients()
        loss = self._forward_backward(batch, budgets)
        self._update()
        self._clear_gradients()
        return loss

    def _finish(self) -> None:
        """The step of the optimizer after the last call of an accumulation."""
        self._update()
        self._zero_buffers()

    def _ordinary(self, batch: dict[str, Any], budgets: Budgets, reason: str) -> Tensor:
        self._report.count(reason)
        make_capturable(self._optimizer, self._device)

        def step() -> Tensor:
            if self._accumulation == 1:
                return self._whole_step(batch, budgets)
            self._restore_buffers()
            loss = self._forward_backward(batch, budgets)
            self._keep_buffers()
            if self._ends_accumulation():
                self._finish()
            return loss

        if self._recorder is None and self._reason is None:
            self._recorder = recorder_of(self._device)
        loss = step() if self._recorder is None or self._reason is not None else self._recorder.warm_up(step, calls=1)
        self._ordinary_steps += 1
        self._count_call()
        self._state = self._read_state()  # the step may have created state of the optimizer
        return loss.clone()

    # Capture and replay.

    def _capture(self, shape: _Shape, batch: dict[str, Any], budgets: Budgets) -> None:
        """Capture a step of this shape; if it fails, `shape.reason` says why."""
        assert self._recorder is not None
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        inputs = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        static = batch | inputs
        accumulating = self._accumulation > 1
        if accumulating:
            self._restore_buffers()

        def step() -> Tensor:
            with NoWaiting():
                return (self._forward_backward if accumulating else self._whole_step)(static, budgets)

        renew_accumulators(self._parameters())
        try:
            self._rates.send()
            with self._rates.on_device():
                graph, value = self._recorder.capture(step)
        except Exception as error:
            self._failed(shape, error)
            return
        finally:
            if not accumulating:
                self._clear_gradients()
        shape.graph, shape.value, shape.inputs = graph, value, list(inputs.values())
        self._report.captured += 1
        captured = [key for key, known in self._shapes.items() if known.graph is not None]
        for key in captured[: -self._max_graphs]:
            del self._shapes[key]

    def _failed(self, shape: _Shape, error: Exception) -> None:
        shape.failures += 1
        shape.reason = f"its capture failed: {_first_line(error)}"
        self._update.forget()
        if all(known.graph is None for known in self._shapes.values()):
            # A memory pool without graphs cannot be used again.
            self._recorder = recorder_of(self._device)

    def _replay(self, shape: _Shape, tensors: list[Tensor]) -> Tensor:
        assert shape.graph is not None and shape.value is not None
        if tensors:
            torch._foreach_copy_(shape.inputs, tensors)
        if self._accumulation > 1:
            self._restore_buffers()
        else:
            self._rates.send()
        shape.graph.replay()
        self._optimizer._opt_called = True  # by which a scheduler knows that it is not called too early
        loss = shape.value.clone()
        if self._accumulation > 1 and self._ends_accumulation():
            self._replay_update()
        self._count_call()
        self._report.replayed += 1
        return loss

    def _replay_update(self) -> None:
        """The optimizer's step as a graph of its own, shared by all shapes."""
        assert self._recorder is not None
        self._rates.send()
        if self._update_graph is None and not self._update_failed:

            def finish() -> None:
                with NoWaiting():
                    self._finish()

            try:
                with self._rates.on_device():
                    self._update_graph, _ = self._recorder.capture(finish)
            except Exception as error:
                self._update_failed = True
                self._update.forget()
                reports.logger.warning("graphed_step: the optimizer's step has no graph: %s", _first_line(error))
        if self._update_graph is None:
            self._finish()
        else:
            self._update_graph.replay()

    # Gradients.

    def _with_gradients(self) -> list[Tensor]:
        return [param for param in self._parameters() if param.grad is not None]

    def _parameters(self) -> list[Tensor]:
        in_groups = [param for group in self._optimizer.param_groups for param in group["params"]]
        return list(dict.fromkeys([*self._model.parameters(), *in_groups]))

    def _clear_gradients(self) -> None:
        for param in self._parameters():
            param.grad = None

    def _keep_buffers(self) -> None:
        """Keep the gradients of an ordinary call, for all later ones to add to."""
        if len(found := self._with_gradients()) != len(self._buffers):
            self._buffers = [(param, param.grad) for param in found]
            self._update_graph = None

    def _restore_buffers(self) -> None:
        """Make the kept gradients the parameters' again. A caller who has set them to None wants them to be zero."""
        if self._new_buffers and self._number == 0:
            self._clear_gradients()
            self._buffers, self._new_buffers = [], False
            for shape in self._shapes.values():
                shape.ordinary = 0  # a captured step must find all of its gradients
        for param, buffer in self._buffers:
            if param.grad is not buffer:
                buffer.zero_() if param.grad is None else buffer.copy_(param.grad)
                param.grad = buffer

    def _zero_buffers(self) -> None:
        torch._foreach_zero_([param.grad for param in self._with_gradients()])

    def _ends_accumulation(self) -> bool:
        return self._number == self._accumulation - 1

    def _count_call(self) -> None:
        self._number = (self._number + 1) % self._accumulation

    # What a call relies on.

    def _drop(self) -> None:
        if self._shapes and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a graph may still be running
        self._shapes.clear()
        self._update_graph: Graph | None = None
        self._update_failed = False
        self._state: tuple[ModelState, OptimizerState] | None = None
        self._recorder = None  # a memory pool without graphs cannot be used again
        self._new_buffers = True  # with the next accumulation: parameters may have been frozen
        device = next((param.device for param in self._parameters()), torch.device("cpu"))
        self._rates = Rates(self._optimizer, device)

    def _read_state(self) -> tuple[ModelState, OptimizerState]:
        return ModelState(self._model), OptimizerState(self._optimizer, self._scaler, self._rates.names)

    def _device_and_reason(self) -> tuple[torch.device, str | None]:
        """The model's device, and why no step of this model can be captured as it is, or None."""
        from fastbert.dispatch import IDLE_HOOKS, hooks_of

        model, parameters = self._model, self._parameters()
        devices = list({param.device: None for param in parameters})
        if len(devices) != 1:
            return (devices or [torch.device("cpu")])[0], f"parameters on {len(devices)} devices"
        reason = None
        if any(type(param) not in (Tensor, nn.Parameter) for param in parameters):
            reason = "parameters that are not plain tensors"
        for module in model.modules():
            if _is_wrapper(module):
                reason = f"a {type(module).__name__}"
            hooks = [hook for found in hooks_of(module) for hook in found.values()]
            if any(not (getattr(hook, "__module__", None) or "").startswith(IDLE_HOOKS) for hook in hooks):
                reason = f"hooks on a {type(module).__name__}, which a replay does not call"
            if module.training and getattr(module, "gradient_checkpointing", False):
                reason = "gradient checkpointing, which reads the state of the random generator"
        if any(param._backward_hooks or param._post_accumulate_grad_hooks for param in parameters):
            reason = "hooks on parameters, which a replay does not call"
        if hooks_on(self._optimizer):
            reason = "hooks on the optimizer, which a replay does not call"
        return devices[0], reason

    def _reason_of(self, batch: dict[str, Any]) -> str | None:
        """Why no step with this batch can be captured, or None."""
        if self._device.type not in RECORDERS:
            return f"a model on {self._device.type}, which has no graphs"
        if self._packers.given_outside():
            return "inside fastbert.lengths: give the budgets to graphed_step"
        for name, value in batch.items():
            if isinstance(value, Tensor):
                if value.device != self._device:
                    return f"{name} on {value.device}"
                if value.requires_grad or type(value) is not Tensor or value.layout is not torch.strided:
                    return f"{name}, which is not a plain tensor without a gradient"
            elif not isinstance(value, (*_CONSTANTS, Counted)):
                return f"{name}, which is a {type(value).__name__}"
        return None

    def _key(self, batch: dict[str, Any], budgets: Budgets) -> tuple[Any, list[Tensor]]:
        """What the graph of a batch depends on besides the state, and the batch's tensors."""
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        forms = tuple([(x.shape, x.dtype) if isinstance(x, Tensor) else (type(x), x) for x in batch.values()])
        from fastbert.graphs.request import matmul_precision  # imports transformers

        modes = matmul_precision(), torch.are_deterministic_algorithms_enabled()
        return (tuple(batch), forms, budgets, self._autocast_dtype(), modes), tensors


def _own_loss(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    loss = getattr(outputs, "loss", None)
    if loss is None:
        raise ValueError(f"loss: expected a function, because the {type(outputs).__name__} has no loss (are there labels?)")
    return loss


def _is_wrapper(module: nn.Module) -> bool:
    """Whether `module` exchanges gradients or parameters with other processes or devices, or checkpoints activations."""
    parallel = nn.parallel.DistributedDataParallel, nn.DataParallel
    return isinstance(module, parallel) or type(module).__module__.startswith("torch.distributed.")


def _first_line(error: BaseException) -> str:
    """The first line of the error that came first: ending a broken capture raises errors of its own."""
    while error.__context__ is not None:
        error = error.__context__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].strip()[:200] if text else 'without a message'}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ascending(name: str, given: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    found = (given,) if _is_integer(given) else given
    if isinstance(found, str) or not isinstance(found, Sequence) or not found or not all(map(_is_integer, found)):
        raise ValueError(f"{name}: expected an integer or a sequence of integers, got {given!r}")
    if min(found) < 1:
        raise ValueError(f"{name}: expected integers from 1 on, got {given!r}")
    return tuple(sorted(found))
