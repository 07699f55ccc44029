"""Settings and records of `python -m bench train`, as plain dataclasses."""

from dataclasses import dataclass, field

from bench.core.records import Environment, FromJson, Spread

SCHEMA = 2
LANES = ("stock", "fastbert")
DTYPES = ("bf16", "fp16", "fp32")
TRUNCATIONS = ("head", "tail", "head+tail", "split")
WINDOWS = ("overlap", "head", "tail", "head+tail")
POOLINGS = ("mean", "max", "first", "token-mean")


@dataclass(frozen=True)
class Settings(FromJson):
    """The settings of a run. Runs with equal settings start from the same weights and see the same rows in the same order.

    `batch`: sequences of all ranks together, so settings say nothing of ranks. `dropout` None: the model's own. `max_length`
    0: the 95th percentile. `truncation` "": the task's default. `columns` "": known names, or the order of the columns.
    `windows` "": none; with them `stride` None is a quarter of a window, `pooling` "" the mean, and `max_windows` 0 no limit.
    `stream`: `data` names shards, which so many `readers` share.
    """

    task: str
    data: str
    model: str
    steps: int
    eval_data: str | None = None
    eval_share: float = 0.1
    batch: int = 16
    accumulation: int = 1
    lr: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    dropout: float | None = None
    dtype: str = "fp32"
    max_length: int = 0
    truncation: str = ""
    columns: str = ""
    windows: str = ""
    stride: int | None = None
    pooling: str = ""
    max_windows: int = 0
    eval_steps: int = 0
    save_steps: int = 0
    patience: int = 0
    seed: int = 0
    whole_words: bool = False
    stream: bool = False
    readers: int = 0

    @property
    def cut(self) -> str:
        """How a text over the limit is cut. A question's context is always cut into windows."""
        if self.task == "qa":
            return "windows"
        return self.truncation or ("split" if self.task in ("mlm", "clm") else "head")


@dataclass(frozen=True)
class DataRecord(FromJson):
    """Facts about the data. Lengths are in tokens, including special ones; `cut` is the share of sequences over the limit.

    With windows the sequences of a part are their windows, and `windows` says how they are made and pooled. A stream has no
    known end: `stream` says what is read, and of training nothing else is known.
    """

    train_rows: int
    eval_rows: int
    train_sequences: int
    eval_sequences: int
    limit: int
    limit_from: str
    longest: int
    cut: float
    unknown: float
    labels: list[str] = field(default_factory=list)
    windows: str = ""
    stream: str = ""


@dataclass(frozen=True)
class Evaluation(FromJson):
    """The evaluation loss after a step."""

    step: int
    loss: float


@dataclass(frozen=True)
class LaneRecord(FromJson):
    """One lane. losses[i] is the loss of step i + 1; checksums[i] is that of the batches of step resumed_at + i + 1.

    tokens: real ones, of all ranks. imbalance: the most tokens of a rank over the mean of the ranks, averaged over batches.
    seconds: of a step of the slowest rank, from its first batch's forward to the end of the optimizer's step; None if nothing
    was timed. tokens_per_second: real tokens of the timed steps over their time. peak_bytes: peak memory of a step, of the
    rank with the most. launches: of fastbert's kernels, on the rank with the fewest. None in losses stands for a number that
    is not finite.
    """

    lane: str
    attention: str
    optimizer: str
    losses: list[float | None]
    evaluations: list[Evaluation]
    final_eval_loss: float
    metrics: dict[str, float]
    tokens: int
    launches: int
    resumed_at: int
    stopped_early: bool
    checksums: list[int]
    ranks: int = 1
    imbalance: float = 1.0
    seconds: Spread | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Comparison(FromJson):
    """The greatest difference of fastbert's losses from stock's, its step, and whether it was checked.

    Without dropout the first `judged_steps` must agree within `tolerance` x max(1, loss). `problems` says what failed.
    """

    greatest: float
    greatest_step: int
    dropout: float
    tolerance: float | None
    judged_steps: int
    problems: list[str] = field(default_factory=list)


@dataclass
class TrainResults(FromJson):
    """All records of one run."""

    environment: Environment
    settings: Settings
    data: DataRecord
    lanes: list[LaneRecord]
    comparison: Comparison | None
    schema: int = SCHEMA
