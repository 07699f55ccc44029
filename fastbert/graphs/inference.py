"""Replays a model's forward from graphs, one per bucket, captured at their first use.

A call goes through four steps: can it be replayed at all (request.py, state.py), which bucket holds it (buckets.py), copy its
batch in (inputs.py), replay and cut the outputs out (outputs.py). A call that cannot be replayed runs the ordinary way, and its
reason is counted for `fastbert.report`.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from itertools import chain
from threading import Lock, RLock
from typing import Any
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from fastbert.graphs import request as requests
from fastbert.graphs.buckets import Bucket, token_capacity
from fastbert.graphs.capture import Graph, Recorder, recorder_of
from fastbert.graphs.inputs import Inputs
from fastbert.graphs.options import Options
from fastbert.graphs.outputs import Outputs
from fastbert.graphs.request import Request
from fastbert.graphs.state import ModelState
from fastbert.layers.counts import TokenBudget
from fastbert.layers.embeddings import types_reason
from fastbert.layers.encoder import body_of, packing_encoder
from fastbert.layers.positions import longest_text

Forward = Callable[..., Any]
RESTLESS = 4  # changes of the model in a row, each after fewer than CALM replays, that end capturing
CALM = 8
MOST_FAILED = 1024  # shapes that are remembered because they could not be captured
MOST_REASONS = 256  # that are counted; a reason may name shapes
STEADY = 64  # calls in a row without a change, after which it begins again


class Captured:
    """A graph with its inputs and outputs."""

    def __init__(self, graph: Graph, inputs: Inputs, outputs: Outputs) -> None:
        self.graph, self.inputs, self.outputs = graph, inputs, outputs


class Graphs:
    """The graphs of one model. Copies and pickles of it keep the options and no graph."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.replays = 0
        self.fallbacks: Counter[str] = Counter()
        self._lock = RLock()  # all graphs share their working memory, so two threads take turns
        self._counting = Lock()
        self._turns: _Turns | None = None
        self._model: ReferenceType[nn.Module] | None = None
        self._state: ModelState | None = None
        self._recorder: Recorder | None = None
        self._captured: OrderedDict[Any, Captured] = OrderedDict()
        self._failed: dict[Any, str] = {}
        self._asked: Counter[Any] = Counter()  # keys that were turned away while all graphs were in use
        self._inputs: WeakValueDictionary[Any, Inputs] = WeakValueDictionary()
        self._packing: nn.Module | None = None  # the encoder, if it packs for this model
        self._longest: int | None = None  # how many positions the model has
        self._may_pad = True
        self._busy = False  # a call holds the lock, perhaps one of the same thread
        self._restless = self._replays_before = self._steady = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.options,)

    def __len__(self) -> int:
        return len(self._captured)

    def call(self, model: nn.Module, forward: Forward, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of `forward(model, *args, **kwargs)`: from a graph if there can be one, else by calling it."""
        if torch.compiler.is_compiling():
            return forward(model, *args, **kwargs)
        found = self._request(model, names, args, kwargs)
        if not isinstance(found, str):
            with self._lock:
                found = "inside another call of the model" if self._busy else self._alone(model, forward, found)
        if not isinstance(found, str):
            return found
        with self._counting:
            known = found in self.fallbacks or len(self.fallbacks) < MOST_REASONS
            self.fallbacks[found if known else "other reasons"] += 1
        return forward(model, *args, **kwargs)

    def forget(self) -> None:
        """Drop all graphs."""
        with self._lock:
            if self._turns is not None:
                self._turns.finish()
            self._captured.clear()
            self._failed.clear()
            self._asked.clear()
            self._state = self._recorder = self._turns = None

    @staticmethod
    def _request(model: nn.Module, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> Request | str:
        """What a graph would be asked for, or why the call must run the ordinary way. It waits for no other thread."""
        if model.training:
            return "train mode"
        if torch.is_grad_enabled() and any(x.requires_grad for x in chain(model.parameters(), model.buffers())):
            return "gradients are recorded: call the model under torch.inference_mode() or torch.no_grad()"
        request = requests.surroundings_reason() or requests.request_of(
            names, args, kwargs, type(model).__name__.endswith("ForMultipleChoice")
        )
        if isinstance(request, Request) and getattr(model.config, "is_decoder", False) and request.cached is not False:
            return "a decoder's cache: pass use_cache=False"
        return request

    def _alone(self, model: nn.Module, forward: Forward, request: Request) -> Any:
        """As `_replay`. A call from within, of a module that is captured or a signal handler, would overwrite the inputs."""
        self._busy = True
        try:
            return self._replay(model, forward, request)
        finally:
            self._busy = False

    def _replay(self, model: nn.Module, forward: Forward, request: Request) -> Any:
        """The outputs of a replay, or why there is none."""
        state = self._current_state(model)
        if isinstance(state, str):
            return state
        if request.ids.device != state.device:
            return f"input_ids on {request.ids.device} and the model on {state.device}"
        if self._turns.capturing():
            return "a graph is being captured"
        self._turns.begin()
        try:
            captured = self._captured_for(model, forward, request)
            if isinstance(captured, str):
                return captured
            captured.graph.replay()
            self.replays += 1
            return captured.outputs.cut(request.ids.shape, keep=not self.options.reuse_outputs)
        finally:
            self._turns.end()

    def _current_state(self, model: nn.Module) -> ModelState | str:
        """The state that the graphs belong to, or why the model has no graphs. If it has changed, all graphs are dropped."""
        if self._model is None or self._model() is None:
            self._model = ref(model)
        elif self._model() is not model:
            return "a replica of the model"
        state = self._state
        if state is None or not state.is_current():
            if state is not None and state.reason is None:
                calm = self.replays - self._replays_before >= CALM
                self._restless = 0 if calm else self._restless + 1
                self._replays_before = self.replays
            self._steady = 0
            self.forget()
            state = self._state = ModelState(model)
            self._packing = packing_encoder(model)
            self._longest = longest_text(model)
            self._may_pad = state.may_pad()
        if state.reason is not None:
            return state.reason
        if self._restless >= RESTLESS:
            self._steady += 1
            if self._steady < STEADY:
                return "weights or modules change from call to call"
            self._restless = 0
        if self._recorder is None:
            self._recorder = recorder_of(state.device)
            if self._recorder is None:
                return f"a model on {state.device}: graphs need an NVIDIA GPU"
            self._turns = _Turns(state.device)
        return state

    def _captured_for(self, model: nn.Module, forward: Forward, request: Request) -> Captured | str:
        """The graph for a request, whose batch is in its inputs; or why there is none."""
        if request.types is None and (reason := types_reason(body_of(model))) is not None:
            return reason
        shape = request.ids.shape
        longest = shape[-1] if self._longest is None else self._longest
        if shape[-1] > longest:
            return f"{shape[-1]} positions, of which the model has {longest}"
        bucket = self.options.buckets.of(shape[0], shape[-1], longest)
        if bucket is None:
            return f"no bucket for a batch of {shape[0]} rows and {shape[-1]} positions"
        packed = self._packing is not None
        counts = packed and self._packing.caller_counts
        budget = counts and counts.token_budget
        if counts and counts.lengths is not None:
            request = request._replace(counts=counts.lengths)
        if not self._may_pad or (budget is not None and packed):  # the caller's own budget, for exactly this batch
            bucket = Bucket(shape[0], shape[-1])
        inputs = self._inputs_of((bucket.rows, *shape[1:-1], bucket.length), request.ids.device, packed)
        inputs.fill(request)
        capacity = budget or self._capacity(request, inputs, packed)
        if isinstance(capacity, str):
            return capacity
        key = inputs.shape, capacity, requests.settings(request.ids.device)
        captured = self._captured.get(key)
        if captured is not None:
            self._captured.move_to_end(key)
            return captured
        return self._failed.get(key) or self._admitted(key) or self._capture(key, model, forward, inputs, capacity)

    def _inputs_of(self, shape: tuple[int, ...], device: torch.device, packed: bool) -> Inputs:
        inputs = self._inputs.get((shape, packed))
        if inputs is None:
            inputs = self._inputs[shape, packed] = Inputs(shape, device, first=packed)
        return inputs

    @staticmethod
    def _capacity(request: Request, inputs: Inputs, packed: bool) -> int | str:
        """The number of tokens for which a batch is packed, 0 for one that is not; or why it must run the ordinary way.

        Counting takes one synchronisation, unless the mask is absent, a collator has counted, or the batch fills its bucket
        and is not packed.
        """
        shape = request.ids.shape
        rows, length = shape[:-1].numel(), shape[-1]
        if not packed and (request.mask is None or shape == inputs.mask.shape):
            return 0
        if request.mask is None:
            tokens = [length] * rows
        elif request.counts is not None:
            tokens = request.counts
            if len(tokens) != rows or not all(0 <= n <= length for n in tokens):
                raise ValueError(f"lengths: expected {rows} numbers from 0 to {length}, got {list(tokens)}")
        else:
            tokens, padding_first = count_tokens(inputs.mask[: shape[0]].flatten(0, -2))
            if packed and padding_first:
                return "a padded position is read"
        if not packed:
            # A row without keys gets the average over all positions, among which a bucket's would count.
            return 0 if min(tokens) else "a row that is all padding, in a batch smaller than its bucket"
        if not sum(tokens):
            return "a batch of padding only"
        whole = inputs.mask.numel()
        return min(token_capacity(sum(tokens) + inputs.mask.shape[:-1].numel() - rows), whole)

    def _admitted(self, key: Any) -> str | None:
        """Why a new graph may not take the place of another, or None: at its first request, if all places are taken."""
        if len(self._captured) < self.options.max_graphs:
            return None
        if not self._asked[key]:
            if len(self._asked) >= 8 * self.options.max_graphs:
                self._asked.clear()
            self._asked[key] += 1
            return f"a new shape, while all {self.options.max_graphs} graphs are in use"
        del self._asked[key]
        return None

    def _capture(self, key: Any, model: nn.Module, forward: Forward, inputs: Inputs, capacity: int) -> Captured | str:
        arguments = {"input_ids": inputs.ids, "attention_mask": inputs.mask, "token_type_ids": inputs.types}
        if capacity:
            arguments["lengths"] = TokenBudget(capacity)
        if getattr(model.config, "is_decoder", False):
            arguments["use_cache"] = False

        def run() -> Any:
            with torch.no_grad(), _without_weight_cache(inputs.ids.device):
                return forward(model, **arguments, return_dict=True)

        try:
            with torch.inference_mode(False):
                self._recorder.warm_up(run)
                state = ModelState(model)  # the first forward may have left something on modules
                graph, output = self._recorder.capture(run)
            captured = Captured(graph, inputs, Outputs(output, type(model).__name__))
        except Exception as error:  # the ordinary forward, which comes next, raises it if it is the model's
            if len(self._failed) >= MOST_FAILED:
                self._failed.clear()
            self._failed[key] = reason = _no_graph(error)
            if not self._captured:
                self._recorder = None  # a memory pool without graphs cannot be used again
            return reason
        left_something = not self._state.is_current()
        traits = packing_encoder(model), longest_text(model), state.may_pad()
        # By another thread, or by the forward itself: the next call finds out.
        if not state.is_current() or (left_something and traits != (self._packing, self._longest, self._may_pad)):
            return "the model changed during a capture"
        if left_something:  # older graphs know nothing of what the first forwards of this one have changed
            self._turns.finish()
            self._captured.clear()
        self._state = state
        self._captured[key] = captured
        if len(self._captured) > self.options.max_graphs:
            self._turns.finish()
            self._captured.popitem(last=False)
        return captured


def _no_graph(error: BaseException) -> str:
    while error.__context__ is not None:  # the one that came first: to end a broken capture raises errors too
        error = error.__context__
    said = str(error).strip().partition("\n")[0]
    return f"no graph: {type(error).__name__}: {said}"[:300]


def count_tokens(mask: Tensor) -> tuple[list[int], bool]:
    """The tokens of each row of a bool [rows, S], and whether the first position of any row is padding.

    Counted on the host: to copy so few bytes takes less time than to launch a kernel and to copy its result.
    """
    read = mask.cpu().numpy()
    return read.sum(1).tolist(), not read[:, 0].all()


def _without_weight_cache(device: torch.device) -> Any:
    """Autocast as it is, without its cache: a graph that read cached casts would not see new weights."""
    dtype = requests.autocast_dtype(device.type)
    if dtype is None:
        return torch.autocast(device.type, enabled=False)
    torch.clear_autocast_cache()
    return torch.autocast(device.type, dtype, cache_enabled=False)


class _Turns:
    """Orders replays on different streams: each waits for the one before, because they share memory."""

    def __init__(self, device: torch.device) -> None:
        self._index = device.index if device.type == "cuda" else None
        self._last: int | None = None
        self._done = torch.cuda.Event() if self._index is not None else None

    def capturing(self) -> bool:
        """Whether the caller captures a graph of its own."""
        return self._index is not None and torch.cuda.is_current_stream_capturing()

    def begin(self) -> None:
        if self._index is None:
            return
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        if stream != self._last:
            if self._last is not None:
                torch.cuda.current_stream(self._index).wait_event(self._done)
            self._last = stream

    def end(self) -> None:
        if self._index is not None:
            self._done.record(torch.cuda.current_stream(self._index))

    def finish(self) -> None:
        """Wait until the last replay has ended."""
        if self._last is not None:
            self._done.synchronize()
