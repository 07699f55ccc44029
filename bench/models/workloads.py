"""Defines the end-to-end workloads and lanes: BERT-base and BERT-large under eight heads, in two tables.

A lane is a line in LANES, an optimizer a line in OPTIMIZERS. All lanes have the same random weights (from a config,
without a download), the same batches and the same precision.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BertConfig

import fastbert
from bench.core.flops import MLM_HEADS
from bench.core.lengths import Lengths
from bench.core.peers import adapt, require, without_downloads
from bench.models import flattened
from bench.models.batches import HEADS
from fastbert.cli.tasks import TASKS

CONFIGS: dict[str, dict[str, Any]] = {
    "BERT-base": {},
    "BERT-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "tiny": {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
    },
}
LONG = {"max_position_embeddings": 2048}  # position embeddings beyond BERT's 512 cost memory but no time


FORWARD, STEP = "forward", "step"


@dataclass(frozen=True)
class Lane:
    """How a stock model becomes this lane's model: attention implementation, batches flattened before the call, fastbert and
    its switches, torch.compile and its mode, the library that the lane needs or that changes the model (bench.core.peers),
    and what fastbert replays from CUDA graphs: None, FORWARD or STEP."""

    attention: str = "sdpa"
    flat: bool = False
    fast: bool = False
    compiled: bool = False
    compile_mode: str | None = None
    peer: str | None = None
    optimizer: str = "torch fused"
    unpad: bool | str = "auto"
    mlm_logits: str = "full"
    graphed: str | None = None

    def suits(self, workload: "Workload") -> bool:
        """Whether the lane differs under this workload from the lane that it is named after."""
        training = workload.mode == "train"
        if self.graphed:
            return training == (self.graphed == STEP)
        return (training or self.optimizer == Lane.optimizer) and (
            self.mlm_logits == "full" or (training and workload.head in MLM_HEADS)
        )

    @property
    def marks_steps(self) -> bool:
        """Whether torch.compile replays CUDA graphs, which overwrite the outputs of the previous step."""
        return self.compile_mode in ("reduce-overhead", "max-autotune")

    @property
    def replays(self) -> bool:
        """Whether a call replays CUDA graphs, whose memory is allocated while they are captured."""
        return self.marks_steps or self.graphed is not None


GRAPHED, GRAPHED_STEP = "fastbert, graphed", "fastbert, graphed step"
MAX_AUTOTUNE = "stock + max-autotune"
FLASH_ATTENTION_2, FLATTENED_FLASH = "flash_attention_2", "flattened, flash_attention_2"
PACKED_ENCODERS, LIGER = "packed-encoders", "liger"
LANES = {
    "eager": Lane("eager"),
    "stock": Lane(),
    "stock + compile": Lane(compiled=True),
    "stock + reduce-overhead": Lane(compiled=True, compile_mode="reduce-overhead"),
    MAX_AUTOTUNE: Lane(compiled=True, compile_mode="max-autotune"),
    "flattened": Lane(flattened.NAME, flat=True),
    FLASH_ATTENTION_2: Lane("flash_attention_2", peer="flash_attention_2"),
    FLATTENED_FLASH: Lane("flash_attention_2", flat=True, peer="flash_attention_2"),
    PACKED_ENCODERS: Lane(peer="packed-encoders"),
    LIGER: Lane(peer="liger model"),
    "fastbert": Lane(fast=True),
    "fastbert + compile": Lane(fast=True, compiled=True),
    "fastbert, padded": Lane(fast=True, unpad=False),
    "fastbert, packed": Lane(fast=True, unpad=True),
    "fastbert, packed, no logits": Lane(fast=True, unpad=True, mlm_logits="none"),
    "fastbert + its AdamW": Lane(fast=True, optimizer="fastbert"),
    GRAPHED: Lane(fast=True, graphed=FORWARD),
    GRAPHED_STEP: Lane(fast=True, unpad=True, mlm_logits="none", optimizer="fastbert, capturable", graphed=STEP),
}


@dataclass(frozen=True)
class Workload:
    """One model, head and size. precision: autocast (bf16 over float32 weights), bf16, or fp32."""

    model: str
    head: str
    mode: str
    batch: int
    seqlen: int
    fill: float
    precision: str = "autocast"
    lengths: Lengths = Lengths()

    def config(self) -> BertConfig:
        longer = LONG if self.seqlen > 512 else {}
        return BertConfig(**CONFIGS[self.model] | longer | TASKS[self.head].config)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Workload":
        lengths = data["lengths"]
        return Workload(**data | {"lengths": Lengths(lengths["name"], tuple(lengths["sizes"]))})


def make(workload: Workload, lane: Lane, device: str) -> nn.Module:
    """The lane's model, with the config's dropout and the same weights as every other lane.

    Raises:
        Absent: something that the lane needs is not available here.
    """
    if lane.peer:
        require(lane.peer)
    torch.manual_seed(0)
    with torch.device(device):
        model = TASKS[workload.head].model_class(workload.config())
    model = model.to(device, torch.bfloat16 if workload.precision == "bf16" else torch.float32)
    with without_downloads():
        model.set_attn_implementation(lane.attention)
    adapt(lane.peer, model)
    if lane.fast:
        fastbert.patch(model, unpad=lane.unpad, mlm_logits=lane.mlm_logits)
    if lane.graphed == FORWARD:
        fastbert.graphed(model)
    return flattened.Flattened(model, workload.head) if lane.flat else model


def compiled(model: nn.Module, lane: Lane, dynamic: bool = False) -> nn.Module:
    """The model as the lane calls it, compiled for one shape or for all. Without a GPU torch.compile only traces and generates
    no code."""
    if not lane.compiled:
        return model
    if not torch.cuda.is_available():
        return torch.compile(model, dynamic=dynamic, backend="aot_eager")
    return torch.compile(model, dynamic=dynamic, mode=lane.compile_mode)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch fused": partial(torch.optim.AdamW, fused=True),  # transformers' default, adamw_torch_fused
    "fastbert": fastbert.AdamW,
    "fastbert, capturable": partial(fastbert.AdamW, capturable=True),
}


def make_optimizer(model: nn.Module, lane: Lane) -> torch.optim.Optimizer:
    """The lane's AdamW over all parameters of the model."""
    return OPTIMIZERS[lane.optimizer](model.parameters(), lr=1e-4, weight_decay=0.01)


def headline() -> Iterator[Workload]:
    """The three main workloads, most important first: pre-training, fine-tuning as in tutorials, single-request inference."""
    yield Workload("BERT-base", "mlm", "train", 32, 512, 0.5)
    yield Workload("BERT-base", "classification", "train", 32, 128, 0.5)
    yield Workload("BERT-base", "classification", "infer", 1, 128, 1.0, "bf16")


def wider() -> Iterator[Workload]:
    """The workloads that complete the first table: BERT-large, no padding, large batches."""
    for fill in (0.5, 1.0):
        yield Workload("BERT-large", "mlm", "train", 32, 512, fill)
    yield Workload("BERT-base", "mlm", "train", 32, 512, 1.0)
    for model in ("BERT-base", "BERT-large"):
        yield Workload(model, "classification", "infer", 128, 128, 0.5, "bf16")
    yield Workload("BERT-large", "classification", "infer", 1, 128, 1.0, "bf16")


def grid(
    names: tuple[str, ...] = ("BERT-base", "BERT-large"),
    heads: tuple[str, ...] = HEADS,
    modes: tuple[str, ...] = ("train", "infer"),
    batches: tuple[int, ...] = (32,),
    seqlens: tuple[int, ...] = (128, 512),
    fills: tuple[float, ...] = (0.5, 1.0),
) -> Iterator[Workload]:
    """All combinations; inference in bf16, training under autocast."""
    for model in names:
        for head in heads:
            for mode in modes:
                for batch in batches:
                    for seqlen in seqlens:
                        for fill in fills:
                            precision = "bf16" if mode == "infer" else "autocast"
                            yield Workload(model, head, mode, batch, seqlen, fill, precision)


MIXED_FILL = 0.25


def requests(
    model: str = "BERT-base",
    head: str = "classification",
    batches: tuple[int, ...] = (1, 8, 32),
    seqlens: tuple[int, ...] = (128, 16, 512),
    longest: int | None = 512,
) -> Iterator[Workload]:
    """Streams of requests for the latency, in bf16: full rows, then mixed lengths up to `longest` tokens (None: without)."""
    for seqlen in seqlens:
        for batch in batches:
            yield Workload(model, head, "infer", batch, seqlen, 1.0, "bf16")
    for batch in batches if longest else ():
        yield Workload(model, head, "infer", batch, longest, MIXED_FILL, "bf16")


def of_the_page() -> list[Workload]:
    """The streams of the table in docs/benchmarks.md: one and eight rows of 128 tokens, one row of mixed lengths."""
    return [*requests(batches=(1, 8), seqlens=(128,), longest=None), *requests(batches=(1,), seqlens=())]


def scaling() -> Iterator[Workload]:
    """BERT-base over S and fill at 16,384 tokens per batch, for the scaling plots."""
    for seqlen in (128, 512, 2048, 64, 256, 1024):
        for fill in (0.5, 1.0):
            yield Workload("BERT-base", "mlm", "train", 16384 // seqlen, seqlen, fill)
    for fill in (0.25, 0.75):
        yield Workload("BERT-base", "mlm", "train", 32, 512, fill)


def tiny(workload: Workload) -> Workload:
    """The same head, mode and fill at a size for the interpreter. In float32: the interpreter computes bfloat16 wrongly."""
    return replace(workload, model="tiny", batch=4, seqlen=16, precision="fp32")
