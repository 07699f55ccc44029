"""What a captured training step relies on: it compares in some microseconds whether any of it has changed."""

from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.optim import optimizer as optimizers

_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
)
_OF_MODULE = itemgetter("_modules", "_parameters", "_buffers", *_HOOKS, "training")
_OF_PARAMETER = attrgetter("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")


class ModelState:
    """The structure, tensors, modes and hooks of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = list(model.modules())
        self._dicts = list(map(vars, self._modules))
        self._dropouts = [module for module in self._modules if isinstance(module, nn.Dropout)]
        self._config = getattr(model, "config", None)
        self._known = self._read()
        self._known_tensors = self._tensors()
        self._known_parameters = self._of_parameters()

    def is_current(self) -> bool:
        tensors = self._tensors()
        return (
            _same(tensors[0], self._known_tensors[0])
            and tensors[1] == self._known_tensors[1]
            and self._read() == self._known
            and self._of_parameters() == self._known_parameters
        )

    def _read(self) -> tuple[Any, ...]:
        structure, hooks, training = [], [], []
        for modules, _, _, *kinds, mode in map(_OF_MODULE, self._dicts):
            structure += modules.values()
            hooks += filter(None, kinds)
            training.append(mode)
        return (
            list(map(id, structure)),
            [tuple(found) for found in hooks],  # keys, which torch never uses twice
            training,
            list(map(type, self._modules)),
            [own.get("forward") for own in self._dicts],
            [own.get("gradient_checkpointing") for own in self._dicts],
            [dropout.p for dropout in self._dropouts],
            _has_any_global_hook(),
            None if self._config is None else dict(vars(self._config)),
        )

    def _tensors(self) -> tuple[list[Tensor], list[int]]:
        owned = chain.from_iterable((own["_parameters"].values(), own["_buffers"].values()) for own in self._dicts)
        found = [tensor for tensor in chain.from_iterable(owned) if tensor is not None]
        return found, list(map(Tensor.data_ptr, found))

    def _of_parameters(self) -> list[Any]:
        return [(trained, not hooks, not after) for trained, hooks, after in map(_OF_PARAMETER, self._known_tensors[0])]


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
    return any((*own, optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks))


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _same(found: list[Any], known: list[Any]) -> bool:
    return len(found) == len(known) and all(map(is_, found, known))
