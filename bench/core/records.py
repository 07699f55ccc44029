"""What a run of the benchmarks leaves behind: plain dataclasses, one for each kind of measurement.

Seconds, bytes and operations throughout. A record whose status is not "ok" has no time: `reason` says why.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

SCHEMA = 1
GIB = 1 << 30
# absent: a peer that is not here or cannot do this; failed: the check did not pass; error: it raised or was killed;
# dry-run: the path was walked on tiny shapes without a GPU.
STATUSES = ("ok", "absent", "failed", "error", "dry-run")
NOT_REACHED = "not reached"  # a job's status: there was no time for it


class FromJson:
    """What is read from JSON (bench.core.schema) is taken as it stands: no number for a text, no field that is not known."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True)
class Spread(FromJson):
    """Quartiles of repeated measurements in seconds."""

    low: float
    median: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(low, median, high, len(samples))

    def differs(self, other: "Spread") -> bool:
        """The rule for noise: two lanes are different only where their quartiles do not overlap."""
        return self.low > other.high or self.high < other.low


@dataclass(frozen=True)
class Environment(FromJson):
    """Where and with what it was measured. None: could not be read. pretended: the GPU is a stub whose launches do nothing."""

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
        """What has to be equal for two results to stand in one table."""
        gpu = f"pretended {self.gpu}" if self.pretended else self.gpu
        return gpu, self.driver, self.cuda, self.torch, self.triton, self.transformers, self.commit


@dataclass(frozen=True)
class Ceiling(FromJson):
    """The best rate this machine gave in this run: bytes a second ("copy") or operations a second ("bf16 product")."""

    name: str
    per_second: float
    seconds: Spread


@dataclass(frozen=True)
class Timed(FromJson):
    """What every timed thing has. `runs` are the medians of repeated runs, to show how far they scatter."""

    lane: str
    status: str
    reason: str | None
    seconds: Spread | None
    runs: list[float]
    peak_bytes: int | None


@dataclass(frozen=True)
class OpRecord(Timed):
    """One lane of one op. `moved` bytes and `operations` are the stated ones of bench.core.floors, whatever the lane does."""

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
    """One lane of one model: seconds a step (or a forward), over batches that hold `real_tokens` on average.

    flops counts real tokens only (bench.core.flops). phases and parts: seconds of a step, by phase and by kind of kernel.
    losses: the first steps without dropout, from the same weights on the same data in every lane.
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
    """One lane of one step of bench.host.run: `seconds` of the processor until all of a step is issued, `wall` those that pass.

    runs and wall_runs: the medians of the lane's turns, to be compared with the other lanes' in the same turn. launches: of
    one step, by kind and name (bench.host.counts). peak_bytes: with weights, gradients and optimizer state. parts: `runs` of
    each part of a step (bench.host.step.PARTS).
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
class TuneRecord(Timed):
    """One candidate configuration of one entry of kernels/core/configs.py; lane is "present" or "candidate"."""

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
        """The configuration as kernels/core/configs.py writes it."""
        return f"Config({', '.join(f'{name}={value}' for name, value in self.config.items())})"


@dataclass(frozen=True)
class SuiteRecord(FromJson):
    """The correctness tests of the same run; finished is False where time ran out."""

    passed: int
    failed: int
    errors: int
    skipped: int
    seconds: float
    finished: bool
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StageRecord(FromJson):
    """One job of a plan: ok, error (raised, killed, out of memory), or not reached in the time given."""

    name: str
    status: str
    seconds: float
    reason: str | None


@dataclass
class Results(FromJson):
    """One run. dry_run results hold no time; invented ones are samples for tests and never reach a document."""

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
    stages: list[StageRecord] = field(default_factory=list)

    def ceiling(self, name: str) -> float | None:
        return next((ceiling.per_second for ceiling in self.ceilings if ceiling.name == name), None)
