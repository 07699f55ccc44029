"""Keeps the capture of a training step from being invalidated.

CUDA reports an operation that invalidates a capture, but torch's allocator and random generator are then in a state in which
later work of the process fails. An error raised before the operation leaves a capture that can be ended and thrown away.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
# Their results, or the sizes of their results, are read on the host.
_READS = {
    _ATEN._local_scalar_dense,
    _ATEN.is_nonzero,
    _ATEN.equal,
    _ATEN.nonzero,
    _ATEN.masked_select,
    _ATEN._unique,
    _ATEN._unique2,
    _ATEN.unique_dim,
    _ATEN.unique_consecutive,
    _ATEN.bincount,
}
_COPIES = {_ATEN._to_copy, _ATEN.copy_, _ATEN._copy_from, _ATEN._copy_from_and_resize}
_INDEXING = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_}


class NoWaiting(TorchDispatchMode):
    """Within it, this thread raises RuntimeError instead of waiting for the device or copying between it and the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", None)
        if packet in _READS and _on_device(args):
            raise RuntimeError(f"it waits for the device ({_name(packet)})")
        if packet in _INDEXING and _selects(packet, args):
            raise RuntimeError(f"it waits for the device (indexing with a mask, {_name(packet)})")
        if packet in _COPIES and _between_host_and_device(packet, args, kwargs):
            raise RuntimeError(f"it copies between the host and the device ({_name(packet)})")
        return func(*args, **kwargs)


def renew_accumulators(parameters: Iterable[Tensor]) -> None:
    """Let the next backward make new nodes that accumulate the parameters' gradients.

    Such a node lives as long as any graph of autograd that contains it, for example that of a loss which the caller still
    holds, and runs on the stream on which it was made. That of a capture must be the capture's. Memory, version and
    identity of the parameters stay.
    """
    for param in parameters:
        if param.requires_grad:
            data = param.data
            # torch forgets the node when the dtype changes.
            param.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
            param.data = data


def _name(packet: Any) -> str:
    return str(packet).removeprefix("aten.")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _on_device(args: Any) -> bool:
    return any(not tensor.is_cpu for tensor in _tensors(args))


def _selects(packet: Any, args: Any) -> bool:
    """Whether the indices contain a mask, whose true elements are counted, unless it only fills with a number."""
    fills = packet is not _ATEN.index and args[2].is_cpu and args[2].numel() == 1
    return not fills and any(x.dtype in (torch.bool, torch.uint8) and not x.is_cpu for x in _tensors(args[1]))


def _between_host_and_device(packet: Any, args: Any, kwargs: Any) -> bool:
    devices = {tensor.device.type for tensor in _tensors(args)}
    if packet is _ATEN._to_copy and (device := kwargs.get("device")) is not None:
        devices.add(torch.device(device).type)
    return "cpu" in devices and len(devices) > 1
