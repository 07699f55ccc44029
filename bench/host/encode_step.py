"""Builds one lane of a call of SentenceTransformer.encode, as bench.host.step builds a step of a model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

from bench.core.pretended import true_reads_of_features
from bench.encode import encoders, flash, texts
from bench.encode.cases import LANES
from bench.host.cases import EncodeHostCase

PARTS = TOKENIZER, MODEL = "tokenizer", "model"


class EncodeStep:
    """`step()` encodes the texts of the case once, without waiting for the embeddings. Call it under `surroundings()`.

    `step(issued)` calls `issued(part)` after each part of each batch: its tokens, padded or flattened, then the model's call.
    """

    def __init__(self, case: EncodeHostCase, lane: str, device: str) -> None:
        self.lane = LANES[lane]
        encoding = case.encoding
        self.texts = texts.texts(encoding.shuffled(), 0)
        with flash.available():
            self.embedder: Any = encoders.make(encoding, self.lane, device)
        self.model, self.whole = self.embedder[0].model, None
        self.encode = encoders.encoder(self.embedder, encoding, self.lane)

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """Make torch's flash kernel known, and supply what the host reads back on a pretended GPU."""
        with flash.available(), true_reads_of_features(*encoders.made_on_the_host(self.embedder)):
            yield

    def __call__(self, issued: Callable[[str], object] = lambda part: None) -> None:
        made: list[bool] = []

        def marking(make: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
            if made:
                issued(MODEL)
            features = make(*arguments, **keywords)
            issued(TOKENIZER)
            made.append(True)
            return features

        with ExitStack() as stack:
            for owner, name in encoders.made_on_the_host(self.embedder):
                stack.enter_context(mock.patch.object(owner, name, partial(marking, getattr(owner, name))))
            self.encode(self.texts)
        issued(MODEL)
