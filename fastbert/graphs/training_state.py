"""What a captured training step relies on: it compares in some microseconds whether any of it has changed."""

from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.optim import optimizer as optimizers

_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TRAINING = itemgetter("training")
_TORCH_S_OWN = set(vars(nn.Module()))
# Attributes of modules that do not matter to a step: compared otherwise, or kept there by fastbert.
_IRRELEVANT = _TORCH_S_OWN | {"caller_counts", "config", "_fastbert_state", "_fastbert_graphs"}
# Those that matter of torch's own modules, of which a model has hundreds.
_RELEVANT: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: (),
    nn.Dropout: ("p",),
    nn.Embedding: ("padding_idx", "max_norm", "scale_grad_by_freq"),
    nn.LayerNorm: ("eps",),
}
_LATE = ("forward", "gradient_checkpointing")  # attributes that are set on modules that had none
# Buffers of embeddings whose values decide on the host which kernels run (fastbert/layers/embeddings.py).
_INSPECTED = ("position_ids", "token_type_ids")
_OF_PARAMETER = attrgetter("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")


class ModelState:
    """The structure, tensors, modes, attributes and hooks of a model, and writes to its buffers of ids.

    Compared in a few C calls over the whole model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._dicts = list(map(vars, self._modules))
        names = [_RELEVANT.get(type(module), tuple(vars(module).keys() - _IRRELEVANT)) for module in self._modules]
        self._getters = [(itemgetter(*found), own) for found, own in zip(names, self._dicts, strict=True) if found]
        self._children_of = [own["_modules"] for own in self._dicts if own["_modules"]]
        self._tensors_of = [own[kind] for own in self._dicts for kind in ("_parameters", "_buffers") if own[kind]]
        self._owned = self._all(self._tensors_of)
        self._tensors = [tensor for tensor in self._owned if tensor is not None]
        buffers = (own["_buffers"].get(name) for own in self._dicts for name in _INSPECTED)
        self._inspected = [buffer for buffer in buffers if buffer is not None and not buffer.is_inference()]
        self._config = getattr(model, "config", None)
        self._known = self._read()

    def is_current(self) -> bool:
        """Whether nothing has changed but the values of parameters and of buffers that a step reads on the device."""
        try:
            return _same(self._all(self._tensors_of), self._owned) and self._read() == self._known
        except (KeyError, RuntimeError, ValueError):  # an attribute is gone, or cannot be compared with its former value
            return False

    def _read(self) -> tuple[Any, ...]:
        hooks = filter(None, chain.from_iterable(map(_HOOKS, self._dicts)))
        return (
            list(map(Tensor.data_ptr, self._tensors)),
            [buffer._version for buffer in self._inspected],
            self._all(self._children_of),
            list(map(_TRAINING, self._dicts)),
            list(map(type, self._modules)),
            [own[name] for own in self._dicts for name in _LATE if name in own],
            [getter(own) for getter, own in self._getters],
            list(chain.from_iterable(hooks)),  # keys, which torch never uses twice
            _has_any_global_hook(),
            [(trained, not hooks, not after) for trained, hooks, after in map(_OF_PARAMETER, self._tensors)],
            None if self._config is None else dict(vars(self._config)),
        )

    @staticmethod
    def _all(dicts: list[dict[str, Any]]) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, dicts)))


class OptimizerState:
    """The groups, hyperparameters and state of an optimizer, and the tensors of a scaler.

    Rates are compared only as far as they are tensors: a graph reads them from the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: Any, read_on_device: tuple[str, ...]) -> None:
        self._optimizer, self._scaler = optimizer, scaler
        self._read_on_device = read_on_device
        self._names = [name for name in optimizer.defaults if name not in read_on_device]
        self._known_tensors, self._known_numbers = self._tensors(), self._numbers()

    def is_current(self) -> bool:
        return _same(self._tensors(), self._known_tensors) and self._numbers() == self._known_numbers

    def _tensors(self) -> list[Any]:
        optimizer, scaler = self._optimizer, self._scaler
        found = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
        found += chain.from_iterable(map(dict.values, optimizer.state.values()))
        for group in optimizer.param_groups:
            for name in self._read_on_device:
                found += (value for value in _each(group[name]) if isinstance(value, Tensor))
        return found if scaler is None else [*found, scaler._scale, scaler._growth_tracker]

    def _numbers(self) -> list[Any]:
        found: list[Any] = [
            [id(value) if isinstance(value := group.get(name), Tensor) else value for name in self._names]
            for group in self._optimizer.param_groups
        ]
        found.append([len(group["params"]) for group in self._optimizer.param_groups])
        found.append(hooks_on(self._optimizer))
        if (scaler := self._scaler) is not None:
            found.append((scaler._enabled, scaler._growth_factor, scaler._backoff_factor, scaler._growth_interval))
        return found


def hooks_on(optimizer: torch.optim.Optimizer) -> bool:
    """Whether functions of the user run at each step of the optimizer."""
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    hooks = *own, optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks
    return any(
        not (getattr(hook, "__module__", None) or "").startswith("fastbert.") for kind in hooks for hook in kind.values()
    )


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _same(found: list[Any], known: list[Any]) -> bool:
    return len(found) == len(known) and all(map(is_, found, known))
