"""The command line: verify, report, env and hub. A user error prints one line and exits with code 2."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastbert.cli.environment import environment
from fastbert.cli.interpreter import use_interpreter_without_gpu
from fastbert.errors import InputError

# transformers and the kernels are imported inside the commands: `verify` may have to switch on Triton's interpreter
# first, and triton reads that switch only at its first import.

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
# Piped output has no terminal width; 160 columns are wide enough that no table wraps.
out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True)

TaskName = StrEnum(
    "TaskName",
    {
        name: name.replace("_", "-")
        for name in ("base", "pretraining", "clm", "mlm", "nsp", "classification", "multiple_choice", "ner", "qa")
    },
)
DtypeName = StrEnum("DtypeName", ["fp64", "fp32", "fp16", "bf16"])


ModelArgument = Annotated[
    str | None, typer.Argument(help="Directory or hub name of a BERT model (default: a small trained BERT).")
]
TextOption = Annotated[Path | None, typer.Option(help="UTF-8 text file, one text per line (default: a sample).")]
TaskOption = Annotated[list[TaskName] | None, typer.Option(help="Run only this task; may be repeated (default: all).")]


@app.command()
def verify(
    model: ModelArgument = None,
    text: TextOption = None,
    task: TaskOption = None,
    dtype: Annotated[DtypeName, typer.Option(help="The model's dtype.")] = DtypeName.fp32,
    train: Annotated[bool, typer.Option(help="Training or evaluation mode; dropout is off in both.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
) -> None:
    """Verify on real text that the patched model computes what eager does; exit code 0 if all results are equal."""
    use_interpreter_without_gpu(lambda line: err.print(line, soft_wrap=True))
    from fastbert.cli.verify import verify_tasks

    names = [str(name) for name in task] if task else None
    if not verify_tasks(out, err, model, text, names, str(dtype), train, json_file):
        raise typer.Exit(1)


@app.command()
def report(
    model: ModelArgument = None,
    task: Annotated[TaskName | None, typer.Option(help="Load the model for this task.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Patch a model, run one batch of the sample text through it, and report which modules ran on a kernel."""
    import torch

    import fastbert
    from fastbert.cli.source import Source

    source = Source.open(model, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = str(task) if task else source.task_of_architecture()
    loaded, batch = source.load(name, torch.float32, device, batch_size=2, max_length=24)
    fastbert.patch(loaded)
    loaded(**batch)
    result = fastbert.report(loaded)
    out.print(result)
    if json_file:
        json_file.write_text(json.dumps(result.to_dicts(), indent=1) + "\n")


@app.command()
def env() -> None:
    """Print what a bug report needs: versions, GPUs and environment variables."""
    for name, value in environment().items():
        out.print(f"{name + ':':<24}{value}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def hub(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write to; created if needed.", show_default=False)],
) -> None:
    """Write a folder that Hugging Face's `kernels` package loads: layers by name, and FlashAttention's functions."""
    from fastbert.hub.build import write_build

    out.print(f"wrote {write_build(out_dir)}", highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except InputError as error:
        err.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
