"""Makes the lanes that fastbert replays from CUDA graphs: forwards of a patched model, and whole training steps.

Budgets of a step are the largest counts of its batches, rounded up to a multiple of ROUNDED: what a user takes who knows
the data and wants one graph for all of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastbert
from bench.core.peers import Absent

ROUNDED = 256  # tokens and read rows; 2 % of a batch of 32 x 512 at fill 0.5 on average
Batch = dict[str, Tensor]
Step = Callable[..., Tensor]  # step(**batch) is the loss of a whole training step


def forward(model: nn.Module) -> nn.Module:
    """The patched model, whose forwards without gradients are replayed from now on.

    Raises:
        Absent: this fastbert has no such function.
    """
    return _function("graphed")(model)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]) -> Step:
    """Forward, backward and AdamW as one graph for all of `batches`.

    Raises:
        Absent: this fastbert has no such function.
    """
    return _function("graphed_step")(model, optimizer, **budgets(batches))


def budgets(batches: Sequence[Batch]) -> dict[str, int]:
    """The token budget of padded batches, and the read budget of batches with a label per token."""
    found: dict[str, int] = {}
    if all("attention_mask" in batch for batch in batches):
        found["token_budget"] = _rounded(max(int(batch["attention_mask"].sum()) for batch in batches))
    if all("labels" in batch and batch["labels"].shape == batch["input_ids"].shape for batch in batches):
        found["read_budget"] = _rounded(max(int((batch["labels"] != -100).sum()) for batch in batches))
    return found


def _rounded(count: int) -> int:
    return -(-count // ROUNDED) * ROUNDED


def _function(name: str) -> Callable[..., Any]:
    found = getattr(fastbert, name, None)
    if found is None:
        raise Absent(f"this fastbert has no {name}")
    return found


class Stepped(nn.Module):
    """A patched model with its graphed step, which tells the gradients of a step: the first moments of its AdamW, by beta1 = 0.

    The learning rate is large enough that a graph which reads former weights is found out.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.optimizer = fastbert.AdamW(model.parameters(), lr=1e-3, betas=(0.0, 0.999), capturable=True)
        self.step = step(model, self.optimizer, batches)

    def results(self, batch: Batch, within: AbstractContextManager) -> dict[str, Tensor]:
        """The loss of one step, which it takes `within` a context, and every gradient by name."""
        with within:
            found = {"loss": self.step(**batch).detach().clone()}
        states = ((name, self.optimizer.state.get(p)) for name, p in self.model.named_parameters())
        return found | {f"gradient of {name}": state["exp_avg"].clone() for name, state in states if state}


class Replays:
    """Counts the replays of all graphs that are captured while it counts (`counting_replays`)."""

    def __init__(self) -> None:
        self.count = 0


class _Counted:
    """A graph that counts its replays."""

    def __init__(self, graph: Any, replays: Replays) -> None:
        self.graph, self.replays = graph, replays

    def replay(self) -> None:
        self.replays.count += 1
        self.graph.replay()


@contextmanager
def counting_replays() -> Iterator[Replays]:
    """Count the replays of graphs whose recorder is made within the block."""
    from fastbert.graphs import capture

    replays = Replays()

    def counting(make: Callable[[torch.device], Any]) -> Callable[[torch.device], Any]:
        def made(device: torch.device) -> Any:
            recorder = make(device)
            captured = recorder.capture

            def capture_counted(function: Callable[[], Any]) -> tuple[_Counted, Any]:
                graph, result = captured(function)
                return _Counted(graph, replays), result

            recorder.capture = capture_counted
            return recorder

        return made

    with mock.patch.dict(capture.RECORDERS, {name: counting(make) for name, make in capture.RECORDERS.items()}):
        yield replays
