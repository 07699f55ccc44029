"""Builds one lane of a step: its model, batch, optimizer, and the call that is measured."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

import fastbert
from bench.core.pretended import pretended, true_reads
from bench.host.cases import LANES, HostCase
from bench.models import batches, gate, graphs, workloads

PARTS = FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
WHOLE = "step"


class Step:
    """`step()` issues one step of the lane without synchronising. Call it under `surroundings()`.

    `step(issued)` calls `issued(part)` as soon as that part of the step is issued.
    """

    def __init__(self, case: HostCase, lane: str, device: str) -> None:
        self.workload, self.device, self.lane = case.workload(), device, LANES[lane]
        self.training = case.mode == "train"
        lengths = self.workload.lengths.of_batch(case.batch, case.seqlen, self.workload.fill)
        self._make_batch(case, lengths)
        with self.surroundings():
            self.model = workloads.make(self.workload, self.lane.model, device).train(self.training)
        self.called = workloads.compiled(self.model, self.lane.model)
        self.optimizer = workloads.make_optimizer(self.model, self.lane.model) if self.training else None
        self.whole = (
            graphs.step(self.model, self.optimizer, [self.on_host]) if self.optimizer and self.lane.model.graphed else None
        )

    def _make_batch(self, case: HostCase, lengths: list[int]) -> None:
        made = batches.make(case.head, self.workload.config(), lengths, case.seqlen, 0, "cpu", labels=self.training)
        mask = made.get("attention_mask")
        self.tokens: list[int] = [case.seqlen] * case.batch if mask is None else mask.sum(1).tolist()
        # Positions per row that the head reads: those with a label for MLM, the first one for a classifier.
        self.read: list[int] = (made["labels"] != -100).sum(1).tolist() if case.head == "mlm" else [1] * case.batch
        names = ("input_ids", "attention_mask", "labels")
        self.on_host = {name: made[name] for name in names if name in made}
        self.batch: dict[str, Any] = {name: x.to(self.device) for name, x in self.on_host.items()}
        if self.lane.model.graphed:
            self.batch = graphs.counted(self.on_host) | self.batch
        self.head = case.head

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Supply what the host reads back on a pretended GPU; do nothing elsewhere."""
        with true_reads(self.tokens, self.read) if self.device == "cuda" and pretended() else nullcontext():
            yield

    def __call__(self, issued: Callable[[str], object] = lambda part: None) -> None:
        if self.whole:
            with gate.autocast(self.workload, self.device):
                self.whole(**self.batch)
            issued(WHOLE)
            return
        if self.optimizer is None:
            with torch.inference_mode(), self._row_lengths(), gate.autocast(self.workload, self.device):
                self.called(**self.batch)
            issued(FORWARD)
            return
        with self._row_lengths(), gate.autocast(self.workload, self.device):
            loss = self.called(**self.batch).loss
        issued(FORWARD)
        loss.backward()
        issued(BACKWARD)
        self.optimizer.step()
        self.optimizer.zero_grad()
        issued(OPTIMIZER)

    def _row_lengths(self) -> AbstractContextManager[None]:
        if not self.lane.lengths_given:
            return nullcontext()
        return fastbert.lengths(self.model, self.tokens, read=self.read if self.head == "mlm" else None)
