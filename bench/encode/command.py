"""The command `python -m bench encode`."""

from typing import Annotated

import typer

from bench.core.options import HOUR, OUT, Budget, DryRun, Json, Out, finite
from bench.runner import session


def encode(
    model: Annotated[list[str], typer.Option(help="BERT-base, MiniLM or XLM-R base, with random weights.")] = ["BERT-base"],
    pooling: Annotated[list[str], typer.Option(help="mean or cls.")] = ["mean"],
    precision: Annotated[list[str], typer.Option(help="bf16, fp16 or fp32: of the weights.")] = ["bf16"],
    batch: Annotated[list[int], typer.Option(help="encode's batch size.")] = [32, 64, 256],
    sentences: Annotated[int, typer.Option(help="Texts of a call.")] = 1024,
    longest: Annotated[int, typer.Option(help="Tokens of the longest text; the mean is an eighth of it.")] = 512,
    queries: Annotated[bool, typer.Option(help="Also time single queries of up to 64 tokens, p50 and p99.")] = True,
    lane: Annotated[list[str], typer.Option(help="Only this lane; all lanes by default.")] = [],
    seconds: Annotated[float, typer.Option(callback=finite, help="Seconds of timed calls per case and lane.")] = 1.0,
    budget: Budget = HOUR,
    out: Out = OUT,
    json: Json = None,
    dry_run: DryRun = False,
) -> None:
    """Time SentenceTransformer.encode on texts of mixed lengths, from texts to embeddings, and on single queries."""
    from bench.runner.selection import encode_jobs

    session.start(dry_run, json)
    jobs = encode_jobs(model, pooling, precision, batch, sentences, longest, queries, lane, seconds, dry_run)
    session.run(jobs, dry_run, budget, out, json=json)
