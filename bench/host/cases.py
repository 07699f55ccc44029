"""Defines the steps and lanes that `python -m bench host` measures, in two tables, most important first."""

from dataclasses import dataclass, replace

from bench.core.lengths import Lengths
from bench.encode import cases as encoding
from bench.encode.cases import EncodeCase
from bench.host.tables import ENCODE as NAMED
from bench.models import workloads
from bench.models.workloads import Workload


@dataclass(frozen=True)
class HostLane:
    """A lane of bench.models.workloads. `lengths_given`: fastbert gets the row lengths (`fastbert.lengths`); a lane of graphs
    gets them with the batch, as from a LengthsCollator."""

    model: workloads.Lane
    lengths_given: bool = False


def _ours(lengths_given: bool = False, **switches: bool | str) -> HostLane:
    return HostLane(workloads.Lane(fast=True, optimizer="fastbert", **switches), lengths_given)


STOCK, COMPILED = "stock", "stock + compile"
PLAIN, PADDED, PACKED = "fastbert", "fastbert, padded", "fastbert, packed"
PADDED_NO_LOGITS, PACKED_NO_LOGITS = "fastbert, padded, no logits", "fastbert, packed, no logits"
GRAPHED, GRAPHED_STEP = workloads.GRAPHED, workloads.GRAPHED_STEP

LANES = {
    STOCK: HostLane(workloads.Lane()),
    COMPILED: HostLane(workloads.Lane(compiled=True)),
    PLAIN: _ours(),  # patch() with its defaults
    PADDED: _ours(unpad=False),
    PACKED: _ours(lengths_given=True),
    PADDED_NO_LOGITS: _ours(unpad=False, mlm_logits="none"),
    PACKED_NO_LOGITS: _ours(lengths_given=True, mlm_logits="none"),
    GRAPHED: HostLane(workloads.LANES[GRAPHED]),
    GRAPHED_STEP: HostLane(workloads.LANES[GRAPHED_STEP]),
}


@dataclass(frozen=True)
class HostCase:
    """A step of BERT-base: a forward for "infer", otherwise forward, backward and AdamW. bf16 weights unless `autocast`."""

    name: str
    head: str
    mode: str
    batch: int
    seqlen: int
    padded: bool
    lanes: tuple[str, ...]
    autocast: bool = False
    model: str = "BERT-base"

    def workload(self) -> Workload:
        precision = "autocast" if self.autocast else "fp32" if self.model == "tiny" else "bf16"
        lengths = quarter_to_whole(self.batch, self.seqlen) if self.padded else Lengths()
        return Workload(self.model, self.head, self.mode, self.batch, self.seqlen, 1.0, precision, lengths)

    def lane(self, name: str) -> workloads.Lane:
        """What the lane of this name does to the model."""
        return LANES[name].model

    def tiny(self) -> "HostCase":
        """The same step at a size for the interpreter. In float32, because the interpreter computes bfloat16 wrongly."""
        return replace(self, model="tiny", batch=min(self.batch, 4), seqlen=16, autocast=False)


@dataclass(frozen=True)
class EncodeHostCase:
    """A call of SentenceTransformer.encode on texts of mixed lengths; lanes are those of bench.encode."""

    name: str
    encoding: EncodeCase
    lanes: tuple[str, ...]
    mode: str = "encode"

    def lane(self, name: str) -> workloads.Lane:
        """What the lane of this name does to the model."""
        return encoding.LANES[name].model

    def tiny(self) -> "EncodeHostCase":
        """The same call at a size for the interpreter."""
        return replace(self, encoding=encoding.tiny(self.encoding))


def quarter_to_whole(batch: int, seqlen: int) -> Lengths:
    """Row lengths spaced evenly from a quarter of `seqlen` to all of it: five eighths of the positions are tokens."""
    least = seqlen // 4
    sizes = tuple(least + (seqlen - least) * i // max(batch - 1, 1) for i in range(batch))
    return Lengths("a quarter to the whole", sizes)


CLASSIFIER = (STOCK, PADDED, PACKED)
INFERENCE_1 = HostCase("BertModel B=1 S=128 inference", "base", "infer", 1, 128, False, (STOCK, PADDED, GRAPHED))
INFERENCE_32 = HostCase("SeqCls B=32 S=128 inference", "classification", "infer", 32, 128, True, (*CLASSIFIER, GRAPHED))
INFERENCE_8 = replace(INFERENCE_32, name="SeqCls B=8 S=128 inference", batch=8, lanes=(STOCK, PACKED, GRAPHED))
TRAINING = HostCase("SeqCls B=32 S=128 training", "classification", "train", 32, 128, True, (*CLASSIFIER, GRAPHED_STEP))
TRAINING_AUTOCAST = replace(TRAINING, name=f"{TRAINING.name}, autocast", autocast=True)
MLM_LANES = (STOCK, PLAIN, PADDED_NO_LOGITS, PACKED_NO_LOGITS, GRAPHED_STEP)
MLM = HostCase("MLM B=64 S=512 training", "mlm", "train", 64, 512, True, MLM_LANES)
MLM_FULL_ROWS = replace(MLM, name=f"{MLM.name}, no padding", padded=False, lanes=(STOCK, PLAIN, PADDED_NO_LOGITS))
MLM_AUTOCAST = replace(MLM, name=f"{MLM.name}, autocast", autocast=True, lanes=(STOCK, PLAIN, PACKED_NO_LOGITS))

FLATTENED, BY_TOKENS = encoding.FLATTENED, encoding.BY_TOKENS


def _encode(model: str, pooling: str, batch: int) -> EncodeHostCase:
    (case,) = encoding.cases((model,), (pooling,), batches=(batch,), sentences=256, queries=False)
    name = f"{NAMED}256 texts, {model}, {pooling} pooling, batches of {batch}"
    return EncodeHostCase(name, case, (STOCK, FLATTENED, PLAIN, BY_TOKENS))


ENCODE = _encode("BERT-base", "mean", 32)
ENCODE_CLS = _encode("BERT-base", "cls", 32)
ENCODE_MINILM = _encode("MiniLM", "mean", 64)
_QUERY = EncodeCase("BERT-base", "mean", "bf16", 1, 1, encoding.QUERY_LONGEST, encoding.QUERY_FILL)
ENCODE_QUERY = EncodeHostCase(f"{NAMED}one query, BERT-base, mean pooling", _QUERY, (STOCK, FLATTENED, PLAIN, GRAPHED))

_ORDER: tuple[HostCase | EncodeHostCase, ...] = (
    *(TRAINING, INFERENCE_1, INFERENCE_32, MLM, TRAINING_AUTOCAST, ENCODE, INFERENCE_8, MLM_FULL_ROWS, MLM_AUTOCAST),
    *(ENCODE_CLS, ENCODE_MINILM, ENCODE_QUERY),
)
CASES = {case.name: case for case in _ORDER}
