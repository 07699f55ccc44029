"""Makes the lanes that fastbert replays from CUDA graphs, and counts their replays: no time counts without them.

A step's budgets are the largest counts of its batches, rounded up as `fastbert.graphed_step` rounds: to the next multiple of
1/16 of the power of two above, at most an eighth more. So all batches of a workload share one graph. Batches bring the counts
that a LengthsCollator adds, as in training with one, so that no step waits for the device to count.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastbert

# fastbert.graphs and fastbert.testing.graphs are imported inside functions: they import triton.

Batch = dict[str, Tensor]
Step = Callable[..., Tensor]  # step(**batch) is the loss of a whole training step


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]) -> Step:
    """Forward, backward and AdamW as one graph for all of `batches`, which it takes as `counted` returns them."""
    return fastbert.graphed_step(model, optimizer, **budgets(batches))


def budgets(batches: Sequence[Batch]) -> dict[str, int]:
    """The token budget of padded batches, and the read budget of batches with a label per token."""
    from fastbert.graphs.training_budgets import rounded

    def budget(counts: list[int]) -> int:
        return min(rounded(max(counts)), batches[0]["input_ids"].numel())

    found: dict[str, int] = {}
    if all("attention_mask" in batch for batch in batches):
        found["token_budget"] = budget([int(batch["attention_mask"].sum()) for batch in batches])
    if all("labels" in batch and batch["labels"].shape == batch["input_ids"].shape for batch in batches):
        found["read_budget"] = budget([int((batch["labels"] != -100).sum()) for batch in batches])
    return found


def counted(batch: Batch, *, causal: bool = False) -> dict[str, Any]:
    """The batch with the counts of a LengthsCollator."""
    return dict(fastbert.LengthsCollator(dict, causal=causal)(batch))  # type: ignore[arg-type]


class Stepped(nn.Module):
    """A patched model and its graphed step, whose gradients are known: with beta1 = 0 they are AdamW's first moments."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], causal: bool = False) -> None:
        super().__init__()
        self.model, self.config, self.causal = model, model.config, causal
        self.optimizer = fastbert.AdamW(model.parameters(), lr=1e-4, betas=(0.0, 0.999), capturable=True)
        self.step = step(model, self.optimizer, batches)

    def results(self, batch: Batch, within: AbstractContextManager) -> dict[str, Tensor]:
        """The loss of one step, which it takes `within` a context, and every gradient by name."""
        with within:
            found = {"loss": self.step(**counted(batch, causal=self.causal)).detach().clone()}
        states = ((name, self.optimizer.state.get(p)) for name, p in self.model.named_parameters())
        return found | {f"gradient of {name}": state["exp_avg"].clone() for name, state in states if state}


class Replays:
    """Counts the replays of all graphs whose recorder is made within `counting_replays`."""

    def __init__(self) -> None:
        self.count = 0

    def missing(self, before: int, calls: int) -> str | None:
        """What is said of `calls` calls since the count `before`, not all of which were replayed; None if all were."""
        found = self.count - before
        return None if found >= calls else f"{found} of {calls} calls replayed a graph"


class _Counted:
    """A graph that counts its replays."""

    def __init__(self, graph: Any, replays: Replays) -> None:
        self.graph, self.replays = graph, replays

    def replay(self) -> None:
        self.replays.count += 1
        self.graph.replay()


@contextmanager
def counting_replays() -> Iterator[Replays]:
    """Count the replays of graphs. Without a GPU, graphs are recorded and run again on the CPU within the block."""
    from fastbert.graphs import capture
    from fastbert.testing.graphs import recording_graphs

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

    with nullcontext() if torch.cuda.is_available() else recording_graphs():
        recorders = {name: counting(make) for name, make in capture.RECORDERS.items()}
        with mock.patch.dict(capture.RECORDERS, recorders):
            yield replays


def why_not(called: Any) -> str:
    """What a model with graphs, or a graphed step, says of the calls that it did not replay, in one line."""
    step = called.step if isinstance(called, Stepped) else called
    if not isinstance(step, nn.Module):
        return " ".join(str(step).split())
    graphs = getattr(called, "_fastbert_graphs", None)
    if graphs is None:
        return "it has no graphs"
    return "; ".join(f"{reason} ({times}x)" for reason, times in graphs.fallbacks.items())
