"""Makes a stream from the options of a command."""

from collections.abc import Sequence
from typing import Any

from bench.stream.masking import Masking
from bench.stream.reader import BLOCK, READERS, Stream
from bench.stream.shards import Shard, find
from bench.stream.tokens import Encoder
from fastbert.errors import InputError

MOST = 1 << 26  # tokens of a batch over all ranks: half a gigabyte of ids


def open_stream(
    data: Sequence[str] | Sequence[Shard],
    tokenizer: Any,
    task: str,
    max_length: int,
    batch: int,
    readers: int = READERS,
    seed: int = 0,
    whole_words: bool = False,
    block: int = BLOCK,
) -> Stream:
    """The stream of batches of `batch` x `max_length` tokens, over all ranks.

    Raises:
        InputError: there is no such data, the tokenizer cannot mask, or a reader would have less than a row in a batch.
    """
    if batch * max_length > MOST:
        raise InputError(f"--batch: expected at most {MOST} tokens over all ranks, got {batch} rows of {max_length}")
    if batch < readers:
        raise InputError(f"--readers: expected at most the {batch} rows of a batch over all ranks, got {readers}")
    return Stream(
        tuple(shard for each in data for shard in (find([each]) if isinstance(each, str) else [each])),
        Encoder(tokenizer, whole_words),
        Masking(tokenizer, whole_words),
        task,
        max_length,
        batch * max_length // readers,
        readers,
        seed,
        block,
    )
