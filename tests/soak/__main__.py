"""python -m tests.soak: thousands of steps of a tiny model, in which everything fails that may fail."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=100, help="Steps to take.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Draws the faults and their places.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="An empty folder to keep journal and checkpoint in.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the outcome here.")] = None,
) -> None:
    """Train with faults beside an undisturbed run, and compare every step. Exit code 1 if anything was lost.

    Kernels run in Triton's interpreter: 10,000 steps take some eighteen minutes on two idle cores.
    """
    os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")  # before the first import of triton
    import torch
    from rich.progress import Progress

    from fastbert.testing.interpreter import accelerate
    from tests.soak.run import run

    accelerate()
    torch.set_num_threads(1)
    with Progress() as shown, TemporaryDirectory(prefix="fastbert-soak-") as temporary:
        tasks = {name: shown.add_task(name, total=steps) for name in ("undisturbed", "disturbed")}
        where = folder or Path(temporary)
        outcome = run(steps, where, seed, lambda name, done: shown.update(tasks[name], completed=done))
    if json_ is not None:
        json_.write_text(json.dumps(outcome, indent=2) + "\n")
    for problem in outcome["problems"]:
        print(problem)
    faults = sum(outcome["faults"].values())
    print(f"{outcome['result']}: {steps} steps, {faults} faults, {outcome['processes']} processes, {outcome['seconds']} s")
    raise typer.Exit(bool(outcome["problems"]))


if __name__ == "__main__":  # the fork server's processes import this module
    app()
