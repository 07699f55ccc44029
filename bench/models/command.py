"""The command `python -m bench models`."""

from pathlib import Path
from typing import Annotated

import typer

from bench.core.options import HOUR, OUT, Budget, DryRun, Out
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
    dry_run: DryRun = False,
) -> None:
    """Time training steps and inference of whole models, lane by lane."""
    from bench.runner.selection import model_jobs

    jobs = model_jobs(
        model, head, mode, batch, seqlen, fill, lane, lengths=lengths, data=data, tokenizer=tokenizer, dry_run=dry_run
    )
    session.start(dry_run)
    session.run(jobs, dry_run, budget, out)
