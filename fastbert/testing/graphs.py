"""A stand-in for CUDA graphs on the CPU: it records the operations of a call and runs them again in the same memory.

`TapeRecorder` implements the protocols of `fastbert.graphs.capture`. It is as unforgiving as a CUDA graph, so that tests
without a GPU find what would be stale, overwritten or forbidden on one:

- A capture computes nothing. Launches do not run, writes to older memory are undone, new memory holds NaN (-7 for integers)
  until the first replay, and torch's generator draws nothing.
- A replay runs operations and launches, and no Python of the captured function: numbers and flags are those of the capture.
  Random operations draw anew. No mode sees a replay, no version counter changes, and no launch is counted.
- Whatever the host would wait for raises during a capture: `item()`, `tolist()`, `nonzero()`, copies between host and device.
  Tensors made without a device (`torch.tensor(3)`) stand for memory of the host. A capture freezes their values.
- All graphs of one recorder share their memory. A replay leaves NaN in all of it, except what somebody still refers to, such
  as results, and gradients that a training step left on its parameters. It also overwrites what graphs captured later have
  left, because they may have received memory that this graph uses as well.
- Graphs of one recorder that run at the same time raise AssertionError, and so does a replay that reads memory which nobody
  but graphs refers to: on a GPU it would be free.

What is referred to is read off the reference counts of storages. Tapes refer to memory by tensors of their own, whose number
is known, so every reference beyond these is somebody else's.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastbert.graphs import capture
from fastbert.graphs.capture import CudaRecorder, Result
from fastbert.testing.capturing import Arguments, current, intercepting, not_permitted, recorded_by

aten = torch.ops.aten
_ALLOCATIONS = ("aten::empty", "aten::new_empty")
_ASSERTIONS = {aten._assert_async.default, aten._assert_async.msg}
_COPIES = {aten.copy_.default, aten._foreach_copy_.default}
_BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_OTHER_MEMORY = ("aten::resize_", "aten::set_")
_TO_HOST = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu, torch.Tensor.__repr__}
_FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer}
_FACTORIES = {
    *_FROM_NUMBERS,
    *(torch.arange, torch.empty, torch.empty_strided, torch.eye, torch.full, torch.linspace, torch.ones, torch.zeros),
    *(torch.rand, torch.randint, torch.randn, torch.randperm, torch.scalar_tensor),
}


class _Memory:
    """A storage that tapes refer to, all of them by the tensors in `aliases`. There is one object per storage."""

    _known: WeakValueDictionary[int, "_Memory"] = WeakValueDictionary()
    _lock = threading.Lock()

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()
        self.dtype = tensor.dtype
        self.aliases: dict[tuple, Tensor] = {}

    @classmethod
    def of(cls, tensor: Tensor) -> "_Memory":
        address = tensor.untyped_storage()._cdata  # no other storage has it while a _Memory holds this one
        with cls._lock:
            return cls._known.get(address) or cls._known.setdefault(address, cls(tensor))

    def alias(self, tensor: Tensor) -> Tensor:
        """The tapes' own tensor that is the same view of this memory: never a parameter, and without a history."""
        if tensor.is_conj() or tensor.is_neg():
            raise NotImplementedError("a lazily conjugated or negated tensor cannot be recorded")
        key = tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype
        if key not in self.aliases:
            self.aliases[key] = self._view(*key)
        return self.aliases[key]

    def _view(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(0, dtype=dtype).set_(self.storage, offset, size, stride)

    def is_held(self) -> bool:
        """Whether anybody but the tapes refers to it."""
        return torch._C._storage_Use_Count(self.storage._cdata) > len(self.aliases) + 1

    def overwrite(self) -> None:
        """Fill it with values that nobody computed."""
        flat = self._view(0, (self.storage.nbytes() // self.dtype.itemsize,), (1,), self.dtype)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            flat.fill_(float("nan"))
        elif self.dtype != torch.bool:
            flat.fill_(-7 if self.dtype.is_signed else 249)
        else:
            flat.copy_(torch.arange(len(flat)) % 2)

    def saved(self) -> Callable[[], Any]:
        """A function that restores the contents of now."""
        now = self._view(0, (self.storage.nbytes(),), (1,), torch.uint8).clone()
        return lambda: self._view(0, (self.storage.nbytes(),), (1,), torch.uint8).copy_(now)


class Step(NamedTuple):
    """One operation or launch of a graph."""

    name: str
    run: Callable[[], None]


class _Tape(TorchDispatchMode):
    """Records what runs while it is active in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.inside: dict[int, _Memory] = {}  # allocated during the capture, by address of the storage
        self.outside: dict[int, _Memory] = {}  # older
        self.host: dict[int, torch.UntypedStorage] = {}  # of the host
        self.makes_host_memory = False
        self.executing = 0  # above 0, launches are part of an operation
        self._undo: dict[int, Callable[[], Any]] = {}

    def undo(self) -> None:
        """Restore the memory from outside."""
        for restore in self._undo.values():
            restore()

    def launch(self, run: Callable[..., None], kernel: Any, arguments: Arguments) -> None:
        """Record a launch; it does not run, so that what it would write stays as it is."""
        if any(map(self.is_host, _tensors(arguments))):
            raise not_permitted(f"{kernel.__name__} reads memory of the host")
        with _unseen():
            args, kwargs = self._aliased(arguments)
        self.steps.append(Step(kernel.__name__, lambda: run(kernel, *args, **kwargs)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            raise NotImplementedError(f"{func} cannot be recorded")
        with self:  # in inference mode nothing has split composite operations before
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        self.executing += 1
        try:
            with torch._C.DisableTorchFunction():
                return self._run(func, args, kwargs)
        finally:
            self.executing -= 1

    def _run(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors, written = list(_tensors((args, kwargs))), _written(func, args, kwargs)
        if any(isinstance(leaf, torch.Generator) for leaf in _pytree.tree_leaves((args, kwargs))):
            raise not_permitted(f"{func} draws from a generator that the graph does not know")
        if func is aten.lift_fresh.default:  # C++ has made it from a number or a list
            self.keep_on_host(tensors)
        if self._runs_on_host(func, tensors, written):
            return self.keep_on_host(func(*args, **kwargs))
        if _waits(func, args, kwargs):
            raise not_permitted(f"{func} waits for a value on the device")
        if func.name().startswith(_OTHER_MEMORY):
            raise NotImplementedError(f"{func} cannot be recorded")
        recorded = self._aliased((args, kwargs))
        for tensor in written:
            memory, address = _Memory.of(tensor), _address(tensor)
            if address in self.outside and address not in self._undo:
                self._undo[address] = memory.saved()
        out = None if func in _ASSERTIONS else func(*args, **kwargs)
        given = set(map(_address, tensors))
        outputs = [None if _address(x) in given else self._allocated(x) for x in _tensors(out)]
        made = [x for x in outputs if x is not None]
        if made and func.name().startswith(_ALLOCATIONS):
            for x in made:
                x.zero_()  # in place of what launches would write: harmless as an index
        elif (made or written or out is None) and torch.Tag.inplace_view not in func.tags:
            self.steps.append(Step(func.name(), lambda: _again(func, *recorded, outputs)))
        return out

    def _runs_on_host(self, func: OpOverload, tensors: list[Tensor], written: list[Tensor]) -> bool:
        on_host = [self.is_host(tensor) for tensor in tensors]
        if all(on_host):
            return self.makes_host_memory or bool(tensors)
        if not any(on_host):
            return False
        # Numbers on the host may be operands of operations on the device, which a launch receives by value.
        large = any(host and x.dim() for host, x in zip(on_host, tensors, strict=True))
        if large or func in _COPIES or any(map(self.is_host, written)):
            raise not_permitted(f"{func} copies between host and device")
        return False

    def is_host(self, tensor: Tensor) -> bool:
        return _address(tensor) in self.host

    def keep_on_host(self, tree: Any) -> Any:
        """Note that tensors without a memory on the device are in that of the host."""
        for tensor in _tensors(tree):
            if _address(tensor) not in self.inside and _address(tensor) not in self.outside:
                self.host[_address(tensor)] = tensor.untyped_storage()
        return tree

    def _aliased(self, tree: Any) -> Any:
        return _pytree.tree_map_only(Tensor, self._alias, tree)

    def _alias(self, tensor: Tensor) -> Tensor:
        if self.is_host(tensor):
            return tensor.detach().clone()
        memory = _Memory.of(tensor)
        if _address(tensor) not in self.inside:
            self.outside[_address(tensor)] = memory
        return memory.alias(tensor)

    def _allocated(self, tensor: Tensor) -> Tensor:
        memory = self.inside[_address(tensor)] = _Memory.of(tensor)
        return memory.alias(tensor)


class _HostCalls(TorchFunctionMode):
    """Notices what does not reach a dispatch mode: tensors of the host that are made, and tensors that are read."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, tape = kwargs or {}, self._tape
        named = [x for x in (*args[1:], kwargs.get("device")) if isinstance(x, str)]
        to_host = func in _TO_HOST or (func is torch.Tensor.to and named == ["cpu"])
        if to_host and not tape.is_host(args[0]):
            raise not_permitted(f"{func.__name__} copies to the host")
        if func is torch.Tensor.new_tensor and not tape.is_host(args[0]):
            raise not_permitted(f"{func.__name__} copies from the host")
        if func not in _FACTORIES or (args and isinstance(args[0], Tensor)):
            return func(*args, **kwargs)
        if isinstance(kwargs.get("device"), torch.device):  # the device of another tensor, which stands for a GPU
            if func in _FROM_NUMBERS:
                raise not_permitted(f"{func.__name__} copies from the host")
            return func(*args, **kwargs)
        before, tape.makes_host_memory = tape.makes_host_memory, True
        try:
            return tape.keep_on_host(func(*args, **kwargs))
        finally:
            tape.makes_host_memory = before


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that the operation writes."""
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    names = [argument.name for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write]
    return list(_tensors([named.get(name) for name in names]))


def _waits(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the host needs a value to go on."""
    if func in _BY_INDEX:
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        fills = func is not aten.index.Tensor and len(args[1]) == 1 and args[2].numel() == 1  # it is masked_fill
        return bool(masks) and not fills
    if func is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(func.tags)


def _again(func: OpOverload, args: Any, kwargs: Any, outputs: list[Tensor | None]) -> None:
    for recorded, found in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
        if recorded is not None:
            recorded.copy_(found)


class TapeGraph:
    """A recorded call; `steps` are its operations and launches, by name, and `replays` counts its replays."""

    def __init__(self, recorder: "TapeRecorder", number: int, tape: _Tape) -> None:
        self._recorder = recorder
        self.number = number
        self.steps = tape.steps
        self.replays = 0
        self.memory = list(tape.inside.values())
        # Not what has gone already: C++ made it from a number or a list.
        self._read = [memory for memory in tape.outside.values() if memory.is_held()]

    def replay(self) -> None:
        """Run the steps.

        Raises:
            AssertionError: another graph of the recorder runs or is captured; memory that the graph reads has been given up.
        """
        self._recorder._replay(self)

    def run(self) -> None:
        gone = [tuple(memory.aliases.values())[0].shape for memory in self._read if not memory.is_held()]
        assert not gone, f"the graph reads memory that nobody else refers to any more, of tensors of shapes {gone}"
        for step in self.steps:
            step.run()
        self.replays += 1


class TapeRecorder:
    """Makes graphs that share their memory, as CudaRecorder does; `captures` and `replays` count its work."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.captures = 0
        self.replays = 0
        self.graphs: WeakSet[TapeGraph] = WeakSet()
        self._running = threading.Lock()

    def warm_up(self, function: Callable[[], Result], calls: int | None = None) -> Result:
        assert current() is None, "a warm-up during a capture"
        for _ in range(calls or CudaRecorder.WARM_UP_CALLS):
            result = function()
        return result

    def capture(self, function: Callable[[], Result]) -> tuple[TapeGraph, Result]:
        """A graph of one call of `function`, and the call's result, which holds no values before the first replay.

        Raises:
            RuntimeError: the function does what cannot be captured.
            AssertionError: another graph of the recorder runs or is captured.
        """
        with self._alone():
            tape, state = _Tape(), torch.get_rng_state()
            try:
                with recorded_by(tape), tape, _HostCalls(tape):
                    result = function()
            finally:
                with _unseen():
                    torch.set_rng_state(state)
                    tape.undo()
            self.captures += 1
            graph = TapeGraph(self, self.captures, tape)
            self.graphs.add(graph)
            with _unseen():
                for memory in graph.memory:
                    memory.overwrite()
        return graph, result

    def _replay(self, graph: TapeGraph) -> None:
        with self._alone(), _unseen():
            graph.run()
            self.replays += 1
            for other in self.graphs:
                for memory in other.memory:
                    if other.number > graph.number or not memory.is_held():
                        memory.overwrite()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        assert current() is None, "a capture or a replay during a capture"
        assert self._running.acquire(blocking=False), "two graphs that share their memory at the same time"
        try:
            yield
        finally:
            self._running.release()


@contextmanager
def recording_graphs() -> Iterator[list[TapeRecorder]]:
    """`with recording_graphs() as recorders`: graphs on the CPU are tapes, and `recorders` lists the recorders made.

    In the block, kernels of several threads run one after the other: Triton's interpreter runs one at a time.
    """
    made: list[TapeRecorder] = []

    def make(device: torch.device) -> TapeRecorder:
        made.append(TapeRecorder(device))
        return made[-1]

    with mock.patch.dict(capture.RECORDERS, cpu=make), intercepting():
        yield made


@contextmanager
def _unseen() -> Iterator[None]:
    """Operations in the block are seen by no mode, by no autograd and by no autocast."""
    with (
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch.no_grad(),
        torch._C._DisableAutocast(),
    ):
        yield
