"""What one AdamW launch reads on the device to find its tensors: rows of pointers, chunks of rows, hyperparameters.

    rows             int64   [tensors, COLUMNS]   uploaded again when a tensor moved
    chunks           int64   [chunks, 2]          a row and the element of it that a program starts at
    hyperparameters  float64 [groups, 6]          uploaded again when a number changed

A step in which nothing moved and no number changed uploads nothing. No upload waits for the device.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import choose

# The columns of a row. An absent tensor's pointer is 0, and no program reads it.
POINTERS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "step")
GRAD = POINTERS.index("grad")
COLUMNS = len(POINTERS) + 2  # then the number of elements, and the group
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


class Hyperparameters(NamedTuple):
    """Of one group. A tensor has one element; on the parameters' device it is read there, without a synchronisation."""

    lr: float | Tensor = 1e-3
    beta1: float | Tensor = 0.9
    beta2: float | Tensor = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    maximize: bool = False


class Kind(NamedTuple):
    """What all tensors of one launch share."""

    device: torch.device
    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    max_exp_avg_sq: torch.dtype | None
    master: torch.dtype | None
    aligned: bool  # every tensor starts at a multiple of 16 bytes
    occurrence: int  # a parameter that is listed twice is updated twice, one launch after the other


class Tables:
    """The launches that update a list of parameters, kept from one step to the next.

    `built` counts how often the launches were planned, `uploaded` how often pointers were sent to the device. What a
    CUDA graph reads must stay, so a captured step has tables of its own, with `spares` of the ones outside the graph.
    """

    def __init__(self, spares: list[Tensor] | None = None) -> None:
        self._spares = spares or []
        self.launches: list[LaunchTable] = []
        self.built = 0
        self.uploaded = 0
        self._rows: list[int] = []
        self._host = torch.empty(0, COLUMNS, dtype=torch.int64)
        self._layouts: list[tuple] = []

    def refresh(self, parameters: Sequence[Parameter], groups: Sequence[Hyperparameters]) -> None:
        """Bring everything on the device up to date.

        Raises:
            ValueError: a tensor has another size than its parameter, or is on another device.
        """
        rows, layouts = _rows(parameters), [(p.param.stride(), p.grad.stride()) for p in parameters]
        if rows != self._rows or layouts != self._layouts:
            host = torch.tensor(rows, dtype=torch.int64).view(-1, COLUMNS)
            if layouts != self._layouts or not self._only_gradients_moved(host):
                self._plan(parameters)
            for table in self.launches:
                table.send_rows(host)
            self.uploaded += 1
            self._rows, self._host, self._layouts = rows, host, layouts
        for table in self.launches:
            table.set_hyperparameters(groups)

    def _only_gradients_moved(self, host: Tensor) -> bool:
        """And to places as aligned as before, which is what every step without kept gradients sees: no new plan."""
        if any(table.copies for table in self.launches) or host.shape != self._host.shape:
            return False
        moved = host != self._host
        moved[:, GRAD] = host[:, GRAD] % VECTOR_BYTES != self._host[:, GRAD] % VECTOR_BYTES
        return not bool(moved.any())

    def _plan(self, parameters: Sequence[Parameter]) -> None:
        plan = _plan(parameters)
        self.launches = [LaunchTable(kind, indices, parameters, self._spares) for kind, indices in plan.items()]
        self.built += 1

    def spares(self) -> list[Tensor]:
        """Pinned memory for tables like these: none can be allocated while a graph is captured."""
        uploads = [upload for t in self.launches for upload in (t.rows, t.chunks, t.hyperparameters)]
        return [upload.tensor.new_empty(upload.tensor.shape, device="cpu", pin_memory=True) for upload in uploads]


class LaunchTable:
    """One launch: which parameters, and their tables on the device."""

    def __init__(self, kind: Kind, indices: list[int], parameters: Sequence[Parameter], spares: list[Tensor]) -> None:
        self.kind = kind
        self.like = parameters[indices[0]].param
        self.config = choose("adamw", self.like, 1)
        self.n_rows = len(indices)
        self.rows = Upload(kind.device, spares)
        self.chunks = Upload(kind.device, spares)
        self.hyperparameters = Upload(kind.device, spares)
        self.done = torch.zeros((), dtype=torch.int32, device=kind.device)
        self.copies: list[Copy] = []
        self.indices = indices
        self._numbers: list[list[float]] | None = None
        self._copy_other_layouts(parameters)
        sizes = [parameters[i].param.numel() for i in indices]
        self.chunks.send(_chunks(sizes, self.config.BLOCK_M * self.config.BLOCK_N))

    def _copy_other_layouts(self, parameters: Sequence[Parameter]) -> None:
        """A tensor whose memory is laid out unlike its parameter's is stood in for by a copy."""
        for row, i in enumerate(self.indices):
            param = parameters[i].param
            layout = param if _is_dense(param) else torch.empty_like(param)
            for column, name in enumerate(POINTERS):
                tensor = getattr(parameters[i], name)
                if tensor is not None and name != "step" and not _same_layout(tensor, layout):
                    self.copies.append(Copy(row, column, tensor, torch.empty_like(layout, dtype=tensor.dtype)))

    def send_rows(self, host: Tensor) -> None:
        """Upload this launch's rows of the table of all parameters."""
        rows = host[self.indices]
        for row, column, _, copy in self.copies:
            rows[row, column] = copy.data_ptr()
        self.rows.send(rows)

    def copy_in(self) -> None:
        """Before the launch: fill the copies."""
        for _, _, tensor, copy in self.copies:
            copy.copy_(tensor)

    def copy_out(self, unscaled: bool) -> None:
        """After the launch: write the copies back; those of gradients only where the kernel unscaled them."""
        for _, column, tensor, copy in self.copies:
            if column != GRAD or unscaled:
                tensor.copy_(copy)

    def set_hyperparameters(self, groups: Sequence[Hyperparameters]) -> None:
        """Upload the numbers if one changed; tensors on a device are copied from there, every time."""
        tensors = [(i, column, x) for i, group in enumerate(groups) for column, x in enumerate(group) if _on_device(x)]
        numbers = [[0.0 if _on_device(x) else float(x) for x in group] for group in groups]
        if numbers != self._numbers:
            self.hyperparameters.send(torch.tensor(numbers, dtype=torch.float64))
            self._numbers = numbers
        if tensors:
            places = [self.hyperparameters.tensor[i, column] for i, column, _ in tensors]
            torch._foreach_copy_(places, [x.reshape(()) for _, _, x in tensors])


class Copy(NamedTuple):
    """Where a pointer stands, the tensor it is of, and the copy of that which the kernel works on."""

    row: int
    column: int
    tensor: Tensor
    copy: Tensor


class Upload:
    """A tensor on the device, and the pinned memory that it came from.

    torch gives pinned memory out again only when the copy is done. A captured graph copies at every replay, so what it
    copies from has to live as long as the table.
    """

    def __init__(self, device: torch.device, spares: list[Tensor]) -> None:
        self.device = device
        self._spares = spares
        self.tensor = torch.empty(0)
        self._host = self.tensor

    def send(self, host: Tensor) -> None:
        """Make the tensor equal `host`, without waiting for the device."""
        if self.tensor.shape != host.shape:
            self.tensor = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        self._host = self._pinned(host) if self.device.type == "cuda" else host
        self.tensor.copy_(self._host, non_blocking=True)

    def _pinned(self, host: Tensor) -> Tensor:
        for i, spare in enumerate(self._spares):
            if (spare.shape, spare.dtype) == (host.shape, host.dtype):
                return self._spares.pop(i).copy_(host)
        return host.pin_memory()


def _on_device(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _rows(parameters: Sequence[Parameter]) -> list[int]:
    found = []
    for param, grad, exp_avg, exp_avg_sq, step, max_exp_avg_sq, master, group in parameters:
        found += (
            param.data_ptr(),
            grad.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            0 if max_exp_avg_sq is None else max_exp_avg_sq.data_ptr(),
            0 if master is None else master.data_ptr(),
            step.data_ptr(),
            param.numel(),
            group,
        )
    return found


def _plan(parameters: Sequence[Parameter]) -> dict[Kind, list[int]]:
    """Which parameters go into which launch."""
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
        if tensor.device != param.device:
            raise ValueError(f"{name}: expected a tensor on {param.device}, as its parameter, got one on {tensor.device}")
        if tensor.shape != (() if name == "step" else param.shape):
            expected = () if name == "step" else tuple(param.shape)
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
    if parameter.step.dtype != torch.float32:
        raise ValueError(f"step: expected torch.float32, got {parameter.step.dtype}")


def _chunks(sizes: list[int], chunk: int) -> Tensor:
    """[chunks, 2]: every tensor from its start, `chunk` elements a program. An empty one has a program as well, so
    that some program counts its step."""
    counts = torch.tensor([max(1, -(-size // chunk)) for size in sizes])
    rows = torch.arange(len(sizes)).repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.stack([rows, (torch.arange(rows.numel()) - first) * chunk], dim=1)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill their memory without holes or overlaps, in any order of dimensions."""
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
