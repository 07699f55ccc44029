"""The second half of a training step: unscale, clip, step, in a form that a graph can hold.

A graph holds numbers as they were when it was captured. Learning rates change at every step, so while a step is captured the
groups hold tensors on the device in their place, which `Rates.send` fills before a replay. Outside of the capture the groups
hold what the user put there, so schedulers, logs and checkpoints see nothing of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import fastbert.optim

SUPPORTED = (fastbert.optim.AdamW, torch.optim.AdamW, torch.optim.Adam)


class Rates:
    """The numbers of an optimizer's groups that graphs read from the device: those that are not tensors there already.

    names: the options of a group that are read on the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer, self._device = optimizer, device
        ours = isinstance(optimizer, fastbert.optim.AdamW)
        self.names = ("lr", "betas") if ours else ("lr",)
        self._dtype = torch.float64 if ours else torch.float32  # torch's fused kernels take no other
        self._tensor = torch.empty(0)
        self._sent: list[float] = []

    def send(self) -> None:
        """Fill the tensors with the current numbers, without waiting for the device."""
        numbers = [float(value) for _, _, _, value in self._numbers()]
        if numbers == self._sent:
            return
        host = torch.tensor(numbers, dtype=self._dtype)
        if self._tensor.shape != host.shape:
            self._tensor = torch.empty_like(host, device=self._device)
        self._tensor.copy_(host.pin_memory() if self._device.type == "cuda" else host, non_blocking=True)
        self._sent = numbers

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within it the groups hold the tensors instead of the numbers; `send` has been called before."""
        groups = self._optimizer.param_groups
        before = [{name: group[name] for name in self.names} for group in groups]
        try:
            for (index, name, place, _), tensor in zip(list(self._numbers()), self._tensor.unbind(), strict=True):
                group = groups[index]
                if place is None:
                    group[name] = tensor
                else:
                    group[name] = (*group[name][:place], tensor, *group[name][place + 1 :])
            yield
        finally:
            for group, values in zip(groups, before, strict=True):
                group.update(values)

    def _numbers(self) -> Iterator[tuple[int, str, int | None, Any]]:
        """Group, option, place in a tuple, and value of each number that is not on the device."""
        for index, group in enumerate(self._optimizer.param_groups):
            for name in self.names:
                value = group[name]
                if isinstance(value, tuple):
                    yield from ((index, name, i, x) for i, x in enumerate(value) if not self._is_there(x))
                elif not self._is_there(value):
                    yield index, name, None, value

    def _is_there(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device == self._device and self._device.type != "cpu"


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Set `capturable` in all groups, as a capture requires, and move the steps that torch counts on the host to the device."""
    if device.type == "cpu":  # where torch has no capturable step
        return
    for group in optimizer.param_groups:
        if group["capturable"]:
            continue
        group["capturable"] = True
        for param in group["params"]:
            state = optimizer.state.get(param)
            if state and isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(device=param.device, dtype=torch.float32)
    optimizer._warned_capturable_if_run_uncaptured = True  # torch would warn of the ordinary steps


class Update:
    """Steps an optimizer with the gradients of `parameters`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        max_grad_norm: float | None,
        parameters: Callable[[], list[Tensor]],
    ) -> None:
        self._optimizer, self._scaler, self._max_grad_norm = optimizer, scaler, max_grad_norm
        self._parameters = parameters

    def __call__(self) -> None:
        optimizer, scaler = self._optimizer, self._scaler
        if self._max_grad_norm is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self._parameters(), self._max_grad_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    def forget(self) -> None:
        """Undo what a call that broke off has left on the host."""
        if self._scaler is not None:
            self._scaler._per_optimizer_states.clear()
            for name in ("grad_scale", "found_inf"):
                vars(self._optimizer).pop(name, None)


def check_optimizer(optimizer: Any, scaler: Any) -> None:
    """Raise unless the optimizer's step can be captured, and with a scaler needs no value on the host."""
    if type(optimizer) not in SUPPORTED:
        raise TypeError(
            f"optimizer: expected a fastbert.AdamW, torch.optim.AdamW or torch.optim.Adam, got {type(optimizer).__name__}"
        )
    if optimizer.defaults.get("differentiable"):
        raise ValueError("optimizer: expected differentiable=False, got True")
    on_device = isinstance(optimizer, fastbert.optim.AdamW) or all(group.get("fused") for group in optimizer.param_groups)
    if scaler is not None and scaler.is_enabled() and not on_device:
        raise ValueError(
            f"scaler: expected a fastbert.AdamW or fused=True with it, got {type(optimizer).__name__} with fused=False, which "
            f"reads on the host whether a gradient is infinite"
        )
