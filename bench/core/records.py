"""Records of a benchmark run: plain dataclasses, one for each kind of measurement.

Units are seconds, bytes and operations. A record whose status is not "ok" has no time; `reason` says why.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

SCHEMA = 1
GIB = 1 << 30
# absent: a peer that is not installed or cannot run the case; failed: the check did not pass; error: it raised or was
# killed; dry-run: it ran on tiny shapes without a GPU.
STATUSES = ("ok", "absent", "failed", "error", "dry-run")
NOT_REACHED = "not reached"  # status of a job for which no time was left


class FromJson:
    """Base of what is read from JSON (bench.core.schema). Types are not converted and unknown fields are errors."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True)
class Spread(FromJson):
    """Quartiles of repeated measurements, in seconds."""

    low: float
    median: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(low, median, high, len(samples))

    def differs(self, other: "Spread") -> bool:
        """The noise rule: two lanes differ only if their quartiles do not overlap."""
        return self.low > other.high or self.high < other.low


@dataclass(frozen=True)
class Environment(FromJson):
    """Machine and versions. None: could not be read. pretended: the GPU is a stub whose launches do nothing."""

    gpu: str | None
    driver: str | None
    cuda: str | None
    capability: str | None
    multiprocessors: int | None
    memory_bytes: int | None
    l2_bytes: int | None
    python: str
    torch: str
    triton: str | None
    transformers: str
    fastbert: str
    commit: str | None
    date: str
    clocks: dict[str, str] = field(default_factory=dict)
    pretended: bool = False

    @property
    def identity(self) -> tuple[str | None, ...]:
        """The fields that must be equal for two results to share a table."""
        gpu = f"pretended {self.gpu}" if self.pretended else self.gpu
        return gpu, self.driver, self.cuda, self.torch, self.triton, self.transformers, self.commit


@dataclass(frozen=True)
class Ceiling(FromJson):
    """The best rate measured in this run: bytes per second ("copy") or operations per second ("bf16 product")."""

    name: str
    per_second: float
    seconds: Spread


@dataclass(frozen=True)
class Timed(FromJson):
    """Fields of every timed record. `runs` are the medians of repeated runs and show their scatter."""

    lane: str
    status: str
    reason: str | None
    seconds: Spread | None
    runs: list[float]
    peak_bytes: int | None


@dataclass(frozen=True)
class OpRecord(Timed):
    """One lane of one op. `moved` bytes and `operations` come from bench.core.floors and are the same for all lanes."""

    op: str
    direction: str
    dtype: str
    hidden: int
    batch: int
    seqlen: int
    fill: float
    p: float
    moved: int
    operations: int

    @property
    def case(self) -> tuple[Any, ...]:
        return self.op, self.direction, self.dtype, self.hidden, self.batch, self.seqlen, self.fill, self.p


@dataclass(frozen=True)
class ModelRecord(Timed):
    """One lane of one model: seconds per step (or forward), over batches with `real_tokens` on average.

    flops counts real tokens only (bench.core.flops). phases and parts: seconds per step, by phase and by kind of kernel.
    losses: losses of the first steps without dropout, from the same weights and data in every lane.
    """

    model: str
    head: str
    mode: str
    precision: str
    batch: int
    seqlen: int
    fill: float
    lengths: str
    real_tokens: float
    flops: float
    first_step_seconds: float | None
    phases: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    @property
    def case(self) -> tuple[Any, ...]:
        return (
            self.model,
            self.head,
            self.mode,
            self.precision,
            self.batch,
            self.seqlen,
            self.fill,
            self.lengths,
        )


@dataclass(frozen=True)
class HostRecord(Timed):
    """One lane of one step of bench.host.run: CPU time (`seconds`) and wall time (`wall`) until the whole step is issued.

    runs and wall_runs: medians per turn, comparable with the other lanes' of the same turn. launches: those of one step, by
    kind and name (bench.host.counts). peak_bytes: includes weights, gradients and optimizer state. parts: `runs` of each
    part of a step (bench.host.step.PARTS).
    """

    name: str
    wall: Spread | None
    wall_runs: list[float]
    parts: dict[str, list[float]]
    launches: dict[str, dict[str, int]]

    @property
    def case(self) -> tuple[Any, ...]:
        return (self.name,)


@dataclass(frozen=True)
class LatencyRecord(Timed):
    """One lane of one stream of requests of `batch` rows: `seconds` has the median (p50), p99 the 99th percentile.

    lengths: "full", rows of `seqlen` tokens; "mixed", every request has other lengths, with a mean of fill x seqlen and at
    most `seqlen`. first_pass_seconds: the first request of every shape, one after another, with captures and compilation.
    """

    model: str
    head: str
    precision: str
    batch: int
    seqlen: int
    fill: float
    lengths: str
    p99: float | None
    first_pass_seconds: float | None

    @property
    def case(self) -> tuple[Any, ...]:
        return self.model, self.head, self.precision, self.batch, self.seqlen, self.fill, self.lengths


@dataclass(frozen=True)
class EncodeRecord(Timed):
    """One lane of one call of SentenceTransformer.encode, from texts to embeddings on the device: seconds per call.

    sentences: texts of a call; 1: single queries, one call each. batch: encode's batch size. lengths: mixed, up to `longest`
    tokens. real_tokens: of one call, on average. reason: of a lane of fastbert with a time, why it did not pack, if so.
    first_pass_seconds: the first call of every kind, with captures and compilation.
    """

    model: str
    pooling: str
    precision: str
    batch: int
    sentences: int
    longest: int
    real_tokens: float
    p99: float | None
    first_pass_seconds: float | None

    @property
    def case(self) -> tuple[Any, ...]:
        return self.model, self.pooling, self.precision, self.batch, self.sentences, self.longest


@dataclass(frozen=True)
class TuneRecord(Timed):
    """One configuration tried for an entry of kernels/core/configs.py. lane is "present" or "candidate"."""

    kernel: str
    architecture: str
    dtype: str
    width: int
    config: dict[str, int]
    audit: dict[str, Any]

    @property
    def case(self) -> tuple[Any, ...]:
        return self.kernel, self.architecture, self.dtype, self.width

    @property
    def call(self) -> str:
        """The configuration as source text for kernels/core/configs.py."""
        return f"Config({', '.join(f'{name}={value}' for name, value in self.config.items())})"


@dataclass(frozen=True)
class SuiteRecord(FromJson):
    """The correctness tests of the same run. finished is False if time ran out."""

    passed: int
    failed: int
    errors: int
    skipped: int
    seconds: float
    finished: bool
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StageRecord(FromJson):
    """One job of a plan. status: ok, error (raised, killed, out of memory), or not reached in the given time."""

    name: str
    status: str
    seconds: float
    reason: str | None


@dataclass
class Results(FromJson):
    """All records of one run. dry_run results hold no times. invented results are samples for tests; documents reject them."""

    environment: Environment
    dry_run: bool = False
    invented: bool = False
    schema: int = SCHEMA
    ceilings: list[Ceiling] = field(default_factory=list)
    tests: SuiteRecord | None = None
    models: list[ModelRecord] = field(default_factory=list)
    ops: list[OpRecord] = field(default_factory=list)
    tuning: list[TuneRecord] = field(default_factory=list)
    host: list[HostRecord] = field(default_factory=list)
    latency: list[LatencyRecord] = field(default_factory=list)
    encode: list[EncodeRecord] = field(default_factory=list)
    stages: list[StageRecord] = field(default_factory=list)

    def ceiling(self, name: str) -> float | None:
        return next((ceiling.per_second for ceiling in self.ceilings if ceiling.name == name), None)
