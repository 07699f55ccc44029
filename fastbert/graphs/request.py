"""Decides whether a call of a model can be replayed, from its arguments and torch's state."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils._device import DeviceContext

from fastbert.dispatch import autocast_dtype, mode_reason
from fastbert.layers.capturing import is_recording
from fastbert.lengths import Counted

_IDS = (torch.int64, torch.int32)
# Arguments whose value, where it is one of these, changes nothing in a forward that is replayed.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "return_dict": (True,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}


class Request(NamedTuple):
    """The tensors of a call that a graph can serve. ids, and types and mask if given, have one shape [..., S]."""

    ids: Tensor
    types: Tensor | None
    mask: Tensor | None
    counts: tuple[int, ...] | None  # the tokens of each row, if a LengthsCollator counted them
    cached: bool | None  # use_cache, if it was given


def request_of(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], choices: bool) -> Request | str:
    """The request of a call, or why it must run the ordinary way.

    Args:
        names: the parameters of the model's forward.
        args, kwargs: those of the call.
        choices: the batch has a dimension of choices, [B, C, S].
    """
    if len(args) > len(names):
        return "more arguments than the forward takes"
    if args and not kwargs.keys().isdisjoint(names[: len(args)]):
        return "an argument was given twice"
    found: dict[str, Any] = {"input_ids": None, "token_type_ids": None, "attention_mask": None}
    counts = cached = None
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if value is None:
            continue
        if name in found:
            found[name] = value
        elif name == "lengths" and type(value) is Counted:
            counts = tuple(value)
        elif name == "use_cache" and value is False:
            cached = False
        elif not (value in _NEUTRAL.get(name, ()) if isinstance(value, bool) else type(value) is Counted):
            return f"{name} was given"
    ids, types, mask = found.values()
    if ids is None:
        return "no input_ids"
    for name, tensor in found.items():
        if tensor is None:
            continue
        if type(tensor) is not Tensor:
            return f"{name} is a {type(tensor).__name__}"
        if tensor.shape != ids.shape:
            return f"{name} of shape {tuple(tensor.shape)} beside input_ids of shape {tuple(ids.shape)}"
        if tensor.device != ids.device:
            return f"{name} on {tensor.device} and input_ids on {ids.device}"
        if name != "attention_mask" and tensor.dtype not in _IDS:
            return f"{name} of {tensor.dtype}"
    if ids.dim() != (3 if choices else 2) or not ids.numel():
        return f"input_ids of shape {tuple(ids.shape)}"
    return Request(ids, types, mask, counts, cached)


def surroundings_reason() -> str | None:
    """Why no call can be replayed now, whatever its arguments, or None."""
    if is_recording():
        return "hidden states or attention weights were requested"
    modes = torch._C._len_torch_function_stack()
    if torch._C._len_torch_dispatch_stack() or (modes and not _are_default_devices(modes)):
        return "a torch dispatch or function mode is active"
    if parametrize._cache_enabled:
        return "inside torch.nn.utils.parametrize.cached"
    return mode_reason()


def _are_default_devices(modes: int) -> bool:
    """Whether the active function modes are those of torch.set_default_device and `with torch.device(...)` only."""
    return all(isinstance(torch._C._get_function_stack_at(i), DeviceContext) for i in range(modes))


def settings(device: torch.device) -> tuple[Any, ...]:
    """What torch's global settings add to the work of a forward; a graph belongs to one set of them."""
    return (autocast_dtype(device.type), torch.get_default_dtype(), *[setting() for setting in _SETTINGS], *matmul_precision())


def matmul_precision() -> tuple[Any, ...]:
    """How matrix products of float32 may be rounded on a GPU, set by either of torch's interfaces.

    `torch.get_float32_matmul_precision` raises once the newer one was used.
    """
    return _PRECISION("cuda", "matmul"), _PRECISION("cuda", "all")


# torch's own functions behind torch.backends, whose Python takes several times as long; those that this release has.
_SETTINGS = [
    getattr(torch._C, name)
    for name in (
        "_get_deterministic_algorithms",
        "_get_cublas_allow_fp16_reduced_precision_reduction",
        "_get_cublas_allow_bf16_reduced_precision_reduction",
        "_get_cublas_allow_fp16_accumulation",
        "_get_flash_sdp_enabled",
        "_get_mem_efficient_sdp_enabled",
        "_get_math_sdp_enabled",
        "_get_cudnn_sdp_enabled",
        "_get_math_sdp_allow_fp16_bf16_reduction",
    )
    if hasattr(torch._C, name)
]
_PRECISION = torch._C._get_fp32_precision_getter
