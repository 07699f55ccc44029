"""The commands `python -m bench models` and `python -m bench latency`."""

from pathlib import Path
from typing import Annotated

import typer

from bench.core.options import HOUR, OUT, Budget, DryRun, Json, Out, finite
from bench.runner import session


def models(
    model: Annotated[list[str], typer.Option(help="BERT-base or BERT-large.")] = ["BERT-base"],
    head: Annotated[list[str], typer.Option(help="A task of `fastbert verify`: mlm, classification, ...")] = ["mlm"],
    mode: Annotated[list[str], typer.Option(help="train or infer.")] = ["train"],
    batch: Annotated[list[int], typer.Option(help="Sequences.")] = [32],
    seqlen: Annotated[list[int], typer.Option(help="Padded sequence length.")] = [512],
    fill: Annotated[list[float], typer.Option(help="Share of real tokens.")] = [0.5, 1.0],
    lane: Annotated[list[str], typer.Option(help="Only this lane; all lanes by default.")] = [],
    lengths: Annotated[Path | None, typer.Option(help="A file with one length per line, instead of the distribution.")] = None,
    data: Annotated[Path | None, typer.Option(help="A text with one sequence per line, for its lengths in tokens.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="The model whose tokenizer reads --data.")] = None,
    budget: Budget = HOUR,
    out: Out = OUT,
    json: Json = None,
    dry_run: DryRun = False,
) -> None:
    """Time training steps and inference of whole models, lane by lane."""
    from bench.runner.selection import model_jobs

    jobs = model_jobs(
        model, head, mode, batch, seqlen, fill, lane, lengths=lengths, data=data, tokenizer=tokenizer, dry_run=dry_run
    )
    session.start(dry_run, json)
    session.run(jobs, dry_run, budget, out, json=json)


def latency(
    model: Annotated[str, typer.Option(help="BERT-base or BERT-large.")] = "BERT-base",
    head: Annotated[str, typer.Option(help="A task of `fastbert verify`.")] = "classification",
    batch: Annotated[list[int], typer.Option(help="Rows of a request.")] = [1, 2, 4, 8, 16, 32, 64],
    seqlen: Annotated[list[int], typer.Option(help="Tokens of each row; one stream of requests for each.")] = [
        *(128, 16, 32, 64, 256, 512)
    ],
    longest: Annotated[int, typer.Option(help="A stream of mixed lengths with up to so many tokens; 0: none.")] = 512,
    lane: Annotated[list[str], typer.Option(help="Only this lane; all lanes by default.")] = [],
    seconds: Annotated[float, typer.Option(callback=finite, help="Seconds of timed requests per stream and lane.")] = 1.0,
    budget: Budget = HOUR,
    out: Out = OUT,
    json: Json = None,
    dry_run: DryRun = False,
) -> None:
    """Time requests until the host has read the answer, p50 and p99, in streams of one shape and of mixed lengths."""
    from bench.runner.selection import latency_jobs

    jobs = latency_jobs(model, head, batch, seqlen, longest, lane, seconds, dry_run)
    session.start(dry_run, json)
    session.run(jobs, dry_run, budget, out, json=json)
