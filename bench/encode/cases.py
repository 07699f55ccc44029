"""Defines what `python -m bench encode` measures, in two tables: calls of SentenceTransformer.encode, and lanes."""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.core.lengths import Lengths
from bench.encode import flash
from bench.encode.texts import FEWEST, VOCABULARY
from bench.models import workloads
from bench.models.workloads import FORWARD, GRAPHED, Lane

BERT, XLM_ROBERTA = "bert", "xlm-roberta"
TINY = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# Sizes by name: model type of transformers, and its config where it differs from the type's default.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT-base": (BERT, {}),  # BGE-base, GTE-base, E5-base
    "MiniLM": (BERT, {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}),  # all-MiniLM-L6
    "XLM-R base": (  # multilingual-e5-base, bge-m3's little sister
        XLM_ROBERTA,
        {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "tiny": (BERT, TINY | {"max_position_embeddings": 32}),
    "tiny XLM-R": (XLM_ROBERTA, TINY | {"max_position_embeddings": 34, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
}
TINY_MODELS = ("tiny", "tiny XLM-R")
POOLINGS = ("mean", "cls")
PRECISIONS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class EncodeCase:
    """One call of encode, over `sentences` texts of mixed lengths up to `longest` tokens with the mean fill x longest; for one
    sentence, a stream of single queries. `batch` is encode's batch size."""

    model: str
    pooling: str
    precision: str
    batch: int
    sentences: int
    longest: int
    fill: float

    @property
    def single(self) -> bool:
        return self.sentences == 1

    def lengths(self, count: int) -> list[int]:
        """Of `count` texts, in tokens."""
        return [max(length, FEWEST) for length in Lengths().of_batch(count, self.longest, self.fill)]

    def shuffled(self, seed: int = 0) -> list[int]:
        """The lengths of one call's texts, in a random order."""
        mixed = self.lengths(self.sentences)
        random.Random(seed).shuffle(mixed)
        return mixed

    def positions_per_token(self, by_length: bool = True) -> float:
        """Positions of the padded batches for each token: of texts sorted by length, as encode sorts them, or as they come."""
        ordered = sorted(self.lengths(self.sentences), reverse=True) if by_length else self.shuffled()
        batches = [ordered[i : i + self.batch] for i in range(0, len(ordered), self.batch)]
        return sum(max(rows) * len(rows) for rows in batches) / sum(ordered)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class EncodeLane:
    """How a stock model becomes the lane's (bench.models.workloads), and whether its batches are made by a number of tokens
    (bench.encode.encoders.by_tokens) instead of by encode."""

    model: Lane
    by_tokens: bool = False

    @property
    def ours(self) -> bool:
        """Whether a kernel of fastbert has to be launched."""
        return self.model.fast or self.model.attention == OURS_BY_NAME


OURS_BY_NAME = "fastbert_flash"  # attn_implementation=..., for which sentence-transformers flattens too
STOCK, FLATTENED, FASTBERT, BY_TOKENS = "stock", "flattened", "fastbert", "fastbert, by tokens"
BY_NAME = "fastbert, attention by name"
EAGER = EncodeLane(Lane("eager"))
LANES = {
    STOCK: EncodeLane(Lane()),
    FLATTENED: EncodeLane(Lane(flash.NAME)),
    workloads.FLATTENED_FLASH: EncodeLane(Lane("flash_attention_2", peer="flash_attention_2")),
    FASTBERT: EncodeLane(Lane(fast=True)),
    BY_TOKENS: EncodeLane(Lane(fast=True), by_tokens=True),
    BY_NAME: EncodeLane(Lane(OURS_BY_NAME)),
    GRAPHED: EncodeLane(Lane(fast=True, graphed=FORWARD)),
    workloads.PACKED_ENCODERS: EncodeLane(Lane(peer="packed-encoders")),
}
FIRST_LANES = (STOCK, FLATTENED, FASTBERT, BY_TOKENS)
OTHER_LANES = tuple(lane for lane in LANES if lane not in FIRST_LANES)
QUERY_LANES = tuple(lane for lane in LANES if lane != BY_TOKENS)


def lanes_of(case: EncodeCase) -> tuple[str, ...]:
    """A single query makes no batches; FlashAttention takes 16 bits, except in a dry run."""
    lanes = QUERY_LANES if case.single else tuple(LANES)
    if case.precision != "fp32" or case.model in TINY_MODELS:
        return lanes
    return tuple(lane for lane in lanes if lane not in (FLATTENED, workloads.FLATTENED_FLASH))


SENTENCES, LONGEST, FILL = 1024, 512, 0.125  # 64 tokens on average
QUERY_LONGEST, QUERY_FILL = 64, 0.25  # 16 tokens on average


def cases(
    models: tuple[str, ...] = ("BERT-base",),
    poolings: tuple[str, ...] = ("mean",),
    precisions: tuple[str, ...] = ("bf16",),
    batches: tuple[int, ...] = (32, 64, 256),
    sentences: int = SENTENCES,
    longest: int = LONGEST,
    queries: bool = True,
) -> Iterator[EncodeCase]:
    """All combinations; after the batch sizes of each, its single queries."""
    for model in models:
        for pooling in poolings:
            for precision in precisions:
                for batch in batches:
                    yield EncodeCase(model, pooling, precision, batch, sentences, longest, FILL)
                if queries:
                    yield EncodeCase(model, pooling, precision, 1, 1, min(QUERY_LONGEST, longest), QUERY_FILL)


def tiny(case: EncodeCase) -> EncodeCase:
    """The same call at a size for the interpreter. In float32: the interpreter computes bfloat16 wrongly."""
    few = case.sentences if case.single else 6
    model = TINY_MODELS[MODELS[case.model][0] == XLM_ROBERTA]
    return replace(case, model=model, precision="fp32", batch=min(case.batch, 4), sentences=few, longest=24, fill=0.4)
