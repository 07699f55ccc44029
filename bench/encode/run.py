"""Measures SentenceTransformer.encode end to end: seconds from texts to embeddings on the device, with the tokenizer's part.

Before a lane is timed it has made the same calls several times, so that everything is compiled and captured. Then it encodes
other texts of the same lengths: their embeddings are compared with those of eager attention by the rule of fastbert.verify,
with a float64 copy as the reference.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

import fastbert
from bench.core import timing
from bench.core.peers import Absent
from bench.core.pretended import true_reads_of_features
from bench.core.records import EncodeRecord
from bench.encode import encoders, flash, texts
from bench.encode.cases import EAGER, LANES, EncodeCase, EncodeLane, lanes_of
from bench.models import gate, graphs
from fastbert.kernels.core.launch import counts
from fastbert.testing.models import assert_equal

QUERIES = {"cuda": 64, "cpu": 3}  # single queries that take turns
CORPORA = 2  # sets of texts that take turns
PASSES = {"cuda": 3, "cpu": 2}
FEWEST_QUERIES = 200  # timed calls, for a p99 that means something
SECONDS = 1.0


def run(
    cases: Sequence[EncodeCase],
    lanes: Sequence[str] | None = None,
    *,
    seconds: float = SECONDS,
    budget: float = float("inf"),
) -> Iterator[EncodeRecord]:
    """Yield one record per case and lane: of each case those of `lanes` that suit it. No case starts after `budget` seconds."""
    end = time.monotonic() + budget
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ExitStack() as stack:
        stack.enter_context(flash.available())
        replays = stack.enter_context(graphs.counting_replays())
        for case in cases:
            if time.monotonic() >= end:
                return
            chosen = [name for name in lanes_of(case) if lanes is None or name in lanes]
            corpus = Corpus(case, device)
            for name in chosen:
                yield _record(corpus, name, replays, seconds)


class Corpus:
    """The calls of a case, and others of the same lengths with the embeddings that eager and its float64 copy give them."""

    def __init__(self, case: EncodeCase, device: str) -> None:
        self.case, self.device = case, device
        if case.single:
            lengths = [[length] for length in case.lengths(QUERIES[device])]
        else:
            lengths = [case.shuffled(seed) for seed in range(CORPORA)]
        self.calls = [texts.texts(rows, seed) for seed, rows in enumerate(lengths)]
        self.tokens = sum(map(sum, lengths)) / len(lengths)
        checked = lengths if case.single else lengths[:1]
        self.checked = [texts.texts(rows, 1000 + seed) for seed, rows in enumerate(checked)]
        self.expected: list[tuple[Tensor, Tensor]] | None = None

    def problem(self, encode: encoders.Encode) -> str | None:
        """How the embeddings of the checked texts differ from eager's; None if they do not."""
        self.expected = self.expected or self._references()
        for call, (eager, exact) in zip(self.checked, self.expected, strict=True):
            try:
                assert_equal(*({"embeddings": x} for x in (encode(call), eager, exact)))
            except AssertionError as failure:
                return f"differ from eager: {failure}"
        return None

    def _references(self) -> list[tuple[Tensor, Tensor]]:
        """Embeddings of eager attention in the case's precision, and of its copy in float64. The weights are the same."""
        model = encoders.make(self.case, EAGER, self.device)
        encode = encoders.encoder(model, self.case, EAGER)
        eager = [encode(call) for call in self.checked]
        model.double()
        return list(zip(eager, [encode(call) for call in self.checked], strict=True))


def _record(corpus: Corpus, name: str, replays: graphs.Replays, seconds: float) -> EncodeRecord:
    case = corpus.case
    found: dict[str, Any] = {"lane": name, "reason": None, "seconds": None, "runs": [], "peak_bytes": None}
    found |= {"model": case.model, "pooling": case.pooling, "precision": case.precision, "batch": case.batch}
    found |= {"sentences": case.sentences, "longest": case.longest, "real_tokens": float(corpus.tokens)}
    found |= {"p99": None, "first_pass_seconds": None}
    try:
        found |= _measure(corpus, LANES[name], replays, seconds)
    except Absent as absent:
        found |= {"status": "absent", "reason": str(absent)}
    except (torch.OutOfMemoryError, timing.NoTime) as error:
        found |= {"status": "error", "reason": str(error) if isinstance(error, timing.NoTime) else "out of memory"}
    finally:
        timing.release_memory()
    return EncodeRecord(**found)


def _measure(corpus: Corpus, lane: EncodeLane, replays: graphs.Replays, seconds: float) -> dict[str, Any]:
    device, case, launched = corpus.device, corpus.case, counts.total()
    model = encoders.make(case, lane, device)
    serve = Server(corpus.calls, encoders.encoder(model, case, lane))
    with true_reads_of_features(*encoders.made_on_the_host(model)):
        start = time.perf_counter()
        for i in range(len(corpus.calls)):
            serve(i).cpu()
        first = time.perf_counter() - start
        for i in range(len(corpus.calls) * (PASSES[device] - 1)):
            serve(i)
        replayed = replays.count
        if wrong := corpus.problem(serve.encode):
            return {"status": "failed", "reason": wrong}
        if lane.model.graphed and replays.count == replayed:
            return {"status": "failed", "reason": f"{gate.NOT_REPLAYED}: {graphs.why_not(model[0].model)}"}
        if lane.ours and counts.total() == launched:
            return {"status": "failed", "reason": gate.NO_KERNEL}
        if device == "cpu":
            return {"status": "dry-run", "reason": _padded(model, lane)}
        spread, runs, p99 = timing.measure_responses(serve.whole, seconds=seconds, fewest=FEWEST_QUERIES * case.single)
        peak = timing.fullest_bytes(lambda: serve(0))
    found = {"status": "ok", "reason": _padded(model, lane)}
    return found | {"seconds": spread, "runs": runs, "p99": p99, "first_pass_seconds": first, "peak_bytes": peak}


def _padded(model: Any, lane: EncodeLane) -> str | None:
    """Why calls of a patched model ran padded, by its report; None if its pooling read packed rows in every call."""
    if not lane.model.fast:
        return None
    (row,) = (row for row in fastbert.report(model).rows if row.hf_class == "Pooling")
    calls = row.kernel_calls + sum(row.fallback_calls.values())
    reasons = [f"{reason} ({times} of {calls} calls)" for reason, times in row.fallback_calls.items()]
    return f"padded: {'; '.join(reasons) or row.reason}" if reasons or not calls else None


class Server:
    """serve(i) encodes the texts of call i; serve.whole(i) also waits until the embeddings are there."""

    def __init__(self, calls: list[list[str]], encode: encoders.Encode) -> None:
        self.calls, self.encode = calls, encode

    def __call__(self, i: int) -> Tensor:
        return self.encode(self.calls[i % len(self.calls)])

    def whole(self, i: int) -> Tensor:
        return self(i).cpu()
