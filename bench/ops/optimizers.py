"""Times the lanes of AdamW: one step over all parameters of a BERT, in float32.

The stated bytes come from bench.core.floors: weight, gradient and two moments read, weight and two moments written.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastbert
from bench.core import floors, timing
from bench.core.records import OpRecord
from bench.models.workloads import Lane as ModelLane
from bench.models.workloads import Workload, make
from fastbert.testing.numerics import comparisons

SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
CHECKED_STEPS = 3
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def _one_by_one(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, foreach=False, **SETTINGS)


LANES: dict[str, Make] = {
    "eager": _one_by_one,
    "foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True, **SETTINGS),
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True, **SETTINGS),
    "fastbert": lambda parameters: fastbert.AdamW(parameters, **SETTINGS),
}
HIDDEN = floors.MODELS | {"tiny": 32}


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model, and two sets of gradients that alternate."""

    values: list[Tensor]
    gradients: list[list[Tensor]]

    @staticmethod
    def of(model: str, device: str) -> "Parameters":
        module = make(Workload(model, "mlm", "train", 1, 16, 1.0, "fp32"), ModelLane(), device)
        values = [parameter.detach() for parameter in module.parameters()]
        return Parameters(values, [[torch.randn_like(x) for x in values] for _ in range(2)])

    def stepping(self, lane: Make, dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Callable[[int], None]]:
        """A copy of the parameters, and a function that runs the lane's step i on it."""
        own = [nn.Parameter(x.clone().to(dtype)) for x in self.values]
        gradients = [[x.to(dtype) for x in draw] for draw in self.gradients]
        optimizer = lane(own)

        def step(i: int) -> None:
            for parameter, gradient in zip(own, gradients[i % 2], strict=True):
                parameter.grad = gradient
            optimizer.step()

        return own, step

    def after(self, lane: Make, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The parameters after CHECKED_STEPS, as one tensor."""
        own, step = self.stepping(lane, dtype)
        for i in range(CHECKED_STEPS):
            step(i)
        return {"parameters": torch.cat([x.detach().flatten() for x in own])}


def run(model: str) -> Iterator[OpRecord]:
    """One record per lane. Each lane's first steps are checked against float64 before it is timed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameters = Parameters.of(model, device)
    eager, exact = parameters.after(_one_by_one), parameters.after(_one_by_one, torch.float64)
    moved = floors.adamw_bytes() * sum(x.numel() for x in parameters.values)
    for name, lane in LANES.items():
        yield OpRecord(
            **{"lane": name, "reason": None, "seconds": None, "runs": [], "peak_bytes": None}
            | _measure(parameters, lane, eager, exact),
            op="adamw",
            direction="step",
            dtype="fp32",
            hidden=HIDDEN[model],
            batch=1,
            seqlen=1,
            fill=1.0,
            p=0.0,
            moved=moved,
            operations=0,
        )


def _measure(parameters: Parameters, lane: Make, eager: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Any]:
    (judged,) = comparisons(parameters.after(lane), eager, exact)
    if not judged.ok:
        return {"status": "failed", "reason": judged.reason}
    if not torch.cuda.is_available():
        return {"status": "dry-run"}
    _, step = parameters.stepping(lane)
    seconds, runs = timing.measure(lambda i: i, step)
    return {"status": "ok", "seconds": seconds, "runs": runs, "peak_bytes": timing.peak_bytes(lambda: step(0))}
