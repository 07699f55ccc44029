"""The tables on the device by which one AdamW launch finds its tensors: rows of pointers, chunks of rows, hyperparameters.

    rows             int64   [tensors, COLUMNS]   uploaded again when a tensor moved
    chunks           int64   [chunks, 2]          a row, and the element of it at which a program starts
    hyperparameters  float64 [groups, 6]          uploaded again when a number changed

Launches are planned again only when the set of gradients, a parameter or a state changes. Gradients that only moved upload
their pointers again, and a changed learning rate uploads a few numbers. A step in which nothing changed is one launch and no
ATen call (tests/optim/test_host.py). No upload waits for the device.

Which parameters have gradients, where a thousand tensors are and what they are is compared in a few C calls over whole lists,
because a Python loop over parameters takes longer than torch's optimizer.

A step that a CUDA graph captures has tables of its own in the graph's memory. Their contents are arguments of launches, which
the graph holds: pinned memory would have to live as long as the graph, and the end of a graph cannot be observed. That costs
some forty small launches per replay for BERT-base's 200 parameters. tests/optim/graph.py is a CUDA graph's stand-in on the CPU.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_dtype
from ..core.failures import is_float64_on_gpu
from ..core.launch import choose
from ..core.tensor_forms import Forms

# The columns of a row. The pointer to an absent tensor is 0, and no program reads it.
POINTERS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "step")
GRAD = POINTERS.index("grad")
COLUMNS = len(POINTERS) + 2  # plus the number of elements and the group
VECTOR_BYTES = 16


class Parameter(NamedTuple):
    """A parameter with its gradient and state; `group` is the index of its hyperparameters."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    max_exp_avg_sq: Tensor | None = None
    master: Tensor | None = None
    group: int = 0


class Columns(NamedTuple):
    """Parameters as lists, one per field of Parameter. An optional list holds None where absent, or is None if all are."""

    param: list[Tensor]
    grad: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    step: list[Tensor]
    max_exp_avg_sq: list[Tensor | None] | None
    master: list[Tensor | None] | None
    group: list[int]

    @classmethod
    def of(cls, parameters: Sequence[Parameter]) -> "Columns":
        param, grad, exp_avg, exp_avg_sq, step, *optional, group = map(list, zip(*parameters, strict=True))
        present = (column if any(x is not None for x in column) else None for column in optional)
        return cls(param, grad, exp_avg, exp_avg_sq, step, *present, group)

    def tensors(self) -> tuple[list[Tensor], list[list[bool] | None]]:
        """All tensors, one column after the other, and which parameters have the optional ones."""
        found = [*self.param, *self.grad, *self.exp_avg, *self.exp_avg_sq, *self.step]
        present: list[list[bool] | None] = [None, None]
        for i, column in enumerate((self.max_exp_avg_sq, self.master)):
            if column is not None:
                found += [tensor for tensor in column if tensor is not None]
                present[i] = [tensor is not None for tensor in column]
        return found, present


class Hyperparameters(NamedTuple):
    """The numbers of one group. A tensor has one element; on the parameters' device it is read without a synchronisation."""

    lr: float | Tensor = 1e-3
    beta1: float | Tensor = 0.9
    beta2: float | Tensor = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    maximize: bool = False


class Kind(NamedTuple):
    """The properties that all tensors of one launch share."""

    device: torch.device
    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    max_exp_avg_sq: torch.dtype | None
    master: torch.dtype | None
    aligned: bool  # every tensor starts at a multiple of 16 bytes
    occurrence: int  # a parameter listed twice is updated twice, by separate launches


class Tables:
    """The launches that update a list of parameters, kept from step to step.

    `built` counts how often the launches were planned, `uploaded` how often pointers were sent to the device. `captured` tables
    belong to one step that a CUDA graph captures: the graph fills them at each replay, so that nothing on the host has to
    outlive the step.
    """

    def __init__(self, captured: bool = False) -> None:
        self._captured = captured
        self.launches: list[LaunchTable] = []
        self.built = 0
        self.uploaded = 0
        self._forms: Forms | None = None
        self._places: tuple = ()
        self._pointers: list[int] = []
        self._host = torch.empty(0, COLUMNS, dtype=torch.int64)
        self._numbers: list[float] | None = None

    def refresh(self, parameters: Sequence[Parameter], groups: Sequence[Hyperparameters]) -> None:
        """Bring everything on the device up to date.

        Raises:
            ValueError: a tensor has another size than its parameter, is on another device, or has a dtype without a kernel.
            RuntimeError: a sparse gradient.
        """
        columns = Columns.of(parameters)
        if not self.follow(columns):
            self._plan(parameters, columns)
        self.set_hyperparameters(groups)

    def follow(self, columns: Columns) -> bool:
        """Whether the planned launches still fit; moved gradients are uploaded.

        Every step asks this first, so it compares whole columns: addresses, and what may change at the same address.
        """
        tensors, present = columns.tensors()
        if self._forms is None or self._places != (columns.group, present) or not self._forms.same(tensors):
            return False
        pointers = list(map(Tensor.data_ptr, tensors))
        if pointers != self._pointers:
            gradients = slice(len(columns.param), 2 * len(columns.param))
            if not self._only_moved(gradients, pointers):
                return False
            self._host[:, GRAD] = torch.frombuffer(array("q", pointers[gradients]), dtype=torch.int64)
            self._send(pointers)
        return True

    def _only_moved(self, moved: slice, pointers: list[int]) -> bool:
        """Whether only these moved, to equally aligned addresses. That is the usual case when gradients are set to None."""
        if any(table.copies for table in self.launches):
            return False
        before = self._pointers
        if before[: moved.start] != pointers[: moved.start] or before[moved.stop :] != pointers[moved.stop :]:
            return False
        return not any([(old - new) % VECTOR_BYTES for old, new in zip(before[moved], pointers[moved], strict=True)])

    def _plan(self, parameters: Sequence[Parameter], columns: Columns) -> None:
        self._forms, self._numbers = None, None
        plan = _plan(parameters)
        self.launches = [LaunchTable(kind, indices, parameters, self._captured) for kind, indices in plan.items()]
        self.built += 1
        tensors, present = columns.tensors()
        rows = [[0 if x is None else x.data_ptr() for x in (getattr(p, name) for name in POINTERS)] for p in parameters]
        rows = [[*row, p.param.numel(), p.group] for row, p in zip(rows, parameters, strict=True)]
        self._host = torch.tensor(rows, dtype=torch.int64)
        self._send(list(map(Tensor.data_ptr, tensors)))
        self._forms, self._places = Forms(tensors), (columns.group, present)

    def _send(self, pointers: list[int]) -> None:
        self._pointers = []  # if an upload fails, what is on the device is unknown
        for table in self.launches:
            table.send_rows(self._host)
        self._pointers = pointers
        self.uploaded += 1

    def set_hyperparameters(self, groups: Sequence[Hyperparameters]) -> None:
        """Upload the numbers if one changed; tensors on a device are copied from there at every step."""
        numbers = list(chain.from_iterable(groups))
        tensors: list[tuple[int, Tensor]] = []
        if any(issubclass(kind, Tensor) for kind in set(map(type, numbers))):
            tensors = [(place, x) for place, x in enumerate(numbers) if _on_device(x)]
            numbers = [0.0 if _on_device(x) else float(x) for x in numbers]
        if numbers != self._numbers:
            host = torch.tensor(numbers, dtype=torch.float64).view(len(groups), -1)
            self._numbers = None  # as for pointers
            for table in self.launches:
                table.hyperparameters.send(host)
            self._numbers = numbers
        for table in self.launches if tensors else ():
            flat = table.hyperparameters.tensor.view(-1)
            torch._foreach_copy_([flat[place] for place, _ in tensors], [x.reshape(()) for _, x in tensors])


class LaunchTable:
    """One launch: its parameters and their tables on the device."""

    def __init__(self, kind: Kind, indices: list[int], parameters: Sequence[Parameter], captured: bool) -> None:
        self.kind = kind
        self.like = parameters[indices[0]].param
        self.config = choose("adamw", self.like, 1)
        self.n_rows = len(indices)
        self.rows = Upload(kind.device, captured)
        self.hyperparameters = Upload(kind.device, captured)
        self.done = torch.zeros((), dtype=torch.int32, device=kind.device)
        self.copies: list[Copy] = []
        self.indices = indices
        self._copy_other_layouts(parameters)
        self.chunks = self._chunks([parameters[i].param.numel() for i in indices], captured)

    def _chunks(self, sizes: list[int], captured: bool) -> Tensor:
        """Uploaded; for a graph computed on the device, since there are many and a graph would hold each as a number."""
        chunk = self.config.BLOCK_M * self.config.BLOCK_N
        programs = sum(max(1, -(-size // chunk)) for size in sizes)
        upload, numbers = Upload(self.kind.device, captured), torch.tensor(sizes)
        if captured:
            return _chunks(upload.send(numbers), chunk, programs)
        return upload.send(_chunks(numbers, chunk, programs))

    def _copy_other_layouts(self, parameters: Sequence[Parameter]) -> None:
        """Replace tensors whose memory layout differs from their parameter's by copies."""
        for row, i in enumerate(self.indices):
            param = parameters[i].param
            layout = param if _is_dense(param) else torch.empty_like(param)
            for column, name in enumerate(POINTERS):
                tensor = getattr(parameters[i], name)
                if tensor is not None and name != "step" and not _same_layout(tensor, layout):
                    self.copies.append(Copy(row, column, tensor, torch.empty_like(layout, dtype=tensor.dtype)))

    def send_rows(self, host: Tensor) -> None:
        """Upload this launch's rows of the table of all parameters."""
        rows = host if len(host) == self.n_rows and not self.copies else host[self.indices]
        for row, column, _, copy in self.copies:
            rows[row, column] = copy.data_ptr()
        self.rows.send(rows)

    def copy_in(self) -> None:
        """Fill the copies, before the launch."""
        for _, _, tensor, copy in self.copies:
            copy.copy_(tensor)

    def copy_out(self, unscaled: bool) -> None:
        """Write the copies back, after the launch; those of gradients only if the kernel unscaled them."""
        for _, column, tensor, copy in self.copies:
            if column != GRAD or unscaled:
                tensor.copy_(copy)


class Copy(NamedTuple):
    """A pointer's row and column, the tensor it stands for, and the copy that the kernel works on instead."""

    row: int
    column: int
    tensor: Tensor
    copy: Tensor


class Upload:
    """A tensor on the device that receives numbers from the host without waiting for the device.

    They are copied from pinned memory, which torch reuses only after the copy is done. In a `captured` step they are arguments
    of launches instead, which the graph holds.
    """

    def __init__(self, device: torch.device, captured: bool) -> None:
        self.device = device
        self.captured = captured
        self.tensor = torch.empty(0)

    def send(self, host: Tensor) -> Tensor:
        """Make the tensor equal to `host`, and return it."""
        if self.captured:
            self.tensor = torch.zeros(host.shape, dtype=host.dtype, device=self.device)
            torch._foreach_add_(self.tensor.view(-1).unbind(), host.reshape(-1).tolist())
            return self.tensor
        if self.tensor.shape != host.shape:
            self.tensor = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        return self.tensor.copy_(host.pin_memory() if self.device.type == "cuda" else host, non_blocking=True)


def _on_device(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _plan(parameters: Sequence[Parameter]) -> dict[Kind, list[int]]:
    """The parameters of each launch, by index."""
    planned: dict[Kind, list[int]] = {}
    seen: Counter[int] = Counter()
    for index, parameter in enumerate(parameters):
        _check(parameter)
        kind = _kind(parameter, seen[id(parameter.param)])
        seen[id(parameter.param)] += 1
        planned.setdefault(kind, []).append(index)
    return planned


def _kind(parameter: Parameter, occurrence: int) -> Kind:
    tensors = {name: getattr(parameter, name) for name in POINTERS if name != "step"}
    dtypes = {name: None if tensor is None else tensor.dtype for name, tensor in tensors.items()}
    aligned = all(tensor is None or tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors.values())
    return Kind(parameter.param.device, **dtypes, aligned=aligned, occurrence=occurrence)


def _check(parameter: Parameter) -> None:
    param = parameter.param
    for name in POINTERS:
        tensor = getattr(parameter, name)
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:  # torch's own wording
            raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        if tensor.device != param.device:
            raise ValueError(f"{name}: expected a tensor on {param.device}, as its parameter, got one on {tensor.device}")
        if tensor.shape != (() if name == "step" else param.shape):
            expected = () if name == "step" else tuple(param.shape)
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
        check_dtype(name, tensor)
        if is_float64_on_gpu(tensor):
            raise ValueError(f"{name}: torch.float64 has no kernel on a GPU")
    if parameter.step.dtype != torch.float32:
        raise ValueError(f"step: expected torch.float32, got {parameter.step.dtype}")


def _chunks(sizes: Tensor, chunk: int, programs: int) -> Tensor:
    """[programs, 2]: each tensor from its start, `chunk` elements per program. An empty tensor has a program too, so that its
    step is counted."""
    counts = ((sizes + (chunk - 1)) // chunk).clamp(min=1)
    ends = counts.cumsum(0)
    program = torch.arange(programs, device=sizes.device)
    row = torch.searchsorted(ends, program, right=True)
    return torch.stack([row, (program - (ends - counts)[row]) * chunk], dim=1)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without holes or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return True
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _same_layout(tensor: Tensor, other: Tensor) -> bool:
    strides = zip(tensor.stride(), other.stride(), tensor.shape, strict=True)
    return not tensor.numel() or all(a == b for a, b, size in strides if size > 1)
