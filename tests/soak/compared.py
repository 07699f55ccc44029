"""Judges a step that was computed another way, by the project's rule, against the same step on kernels and in float64."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from fastbert.kernels.core import failures
from fastbert.kernels.encoder_layer import plan
from fastbert.testing.models import assert_equal
from tests.soak.inject import at_launches
from tests.soak.training import Training


def forget_failures() -> None:
    """Let every kernel be tried again, as in a new process."""
    failures.reset()
    plan.clear()


def results(training: Training) -> dict[str, Tensor]:
    """The loss of the next step and every gradient; the training is then as before."""
    random = torch.get_rng_state()
    loss = training.forward()
    loss.backward()
    found = {f"gradient of {name}": param.grad for name, param in training.model.named_parameters() if param.grad is not None}
    training.again(random)
    return found | {"loss": loss.detach()}


def exact(training: Training) -> dict[str, Tensor]:
    """The results of the next step in float64, by plain PyTorch with the kernels' dropout."""
    wide = copy.copy(training)
    wide.model = copy.deepcopy(training.model).double()
    wide.optimizer = torch.optim.SGD(wide.model.parameters())  # clears their gradients

    def fail(kernel: str) -> None:
        raise RuntimeError(f"{kernel} is left out")

    with at_launches(fail):
        found = results(wide)
    forget_failures()
    return found


def stepped(training: Training, wide: bool = False) -> dict[str, Tensor]:
    """Parameters and optimizer state after the next step; the training is then as before. `wide`: by torch, in float64."""
    state = training.state()
    training.forward().backward()
    optimizer, params = training.optimizer, dict(training.model.named_parameters())
    if wide:
        grads = {name: param.grad for name, param in params.items()}
        params = {name: param.detach().double() for name, param in params.items()}
        for name, param in params.items():
            param.grad = None if grads[name] is None else grads[name].double()
        names = {param: name for name, param in training.model.named_parameters()}
        groups = [{**group, "params": [params[names[param]] for param in group["params"]]} for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups)
        optimizer.load_state_dict(training.optimizer.state_dict())
    optimizer.step()
    found = {name: param.detach().clone() for name, param in params.items()}
    for name, param in params.items():
        moments = optimizer.state.get(param, {})
        found |= {f"{moment} of {name}": moments[moment].clone() for moment in ("exp_avg", "exp_avg_sq") if moments}
    training.restore(state)
    return found


def judge(found: dict[str, Tensor], training: Training, of: Callable[..., dict[str, Tensor]] = results) -> None:
    """Judge `found` for the next step, whose kernels work now.

    Raises:
        AssertionError: it names every tensor that is not within the rule.
    """
    reference = stepped(training, wide=True) if of is stepped else exact(training)
    assert_equal(found, of(training), reference)
