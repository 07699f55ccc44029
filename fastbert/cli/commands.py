"""The command line: verify, report, doctor, env and hub. A user error prints one line and exits with code 2."""

from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastbert.cli.environment import environment
from fastbert.cli.interpreter import use_interpreter_without_gpu
from fastbert.cli.output import EXIT_CODES, JsonOption, check_json, console_for, err, progress, run, write_json
from fastbert.errors import InputError

# transformers and the kernels are imported inside the commands: `verify` may have to switch on Triton's interpreter
# first, and triton reads that switch only at its first import.

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, epilog=EXIT_CODES)

TaskName = StrEnum(
    "TaskName",
    {
        name: name.replace("_", "-")
        for name in ("base", "pretraining", "clm", "mlm", "nsp", "classification", "multiple_choice", "ner", "qa")
    },
)
DtypeName = StrEnum("DtypeName", ["fp64", "fp32", "fp16", "bf16"])


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="Directory or hub name of a BERT model (default: a small trained BERT).",
        autocompletion=lambda incomplete: folders(incomplete),
    ),
]
TextOption = Annotated[Path | None, typer.Option(help="UTF-8 text file, one text per line (default: a sample).")]
TaskOption = Annotated[list[TaskName] | None, typer.Option(help="Run only this task; may be repeated (default: all).")]


def folders(incomplete: str) -> list[str]:
    """The folders that a path may be completed to; a model is one, if it is not a name on the hub."""
    typed = Path(incomplete)
    parent = typed if incomplete.endswith("/") or not incomplete else typed.parent
    try:
        found = sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []
    return [str(path) for path in found if str(path).startswith(incomplete.removeprefix("./"))]


@app.callback(invoke_without_command=True)
def fastbert(context: typer.Context) -> None:
    """Check that fastbert computes what stock BERT does, and see what runs on its kernels."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _use_interpreter() -> None:
    use_interpreter_without_gpu(lambda line: err.print(line, soft_wrap=True))


@app.command(epilog=EXIT_CODES)
def verify(
    model: ModelArgument = None,
    text: TextOption = None,
    task: TaskOption = None,
    dtype: Annotated[DtypeName, typer.Option(help="The model's dtype.")] = DtypeName.fp32,
    train: Annotated[bool, typer.Option(help="Training or evaluation mode; dropout is off in both.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Verify on real text that the patched model computes what eager does; exit code 0 if all results are equal."""
    check_json(json_file)
    _use_interpreter()
    from fastbert.cli.verify import verify_tasks

    names = [str(name) for name in task] if task else None
    if not verify_tasks(model, text, names, str(dtype), train, json_file):
        raise typer.Exit(1)


@app.command(epilog=EXIT_CODES)
def report(
    model: ModelArgument = None,
    task: Annotated[TaskName | None, typer.Option(help="Load the model for this task.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Patch a model, run one batch of the sample text through it, and report which modules ran on a kernel."""
    check_json(json_file)
    with progress("importing transformers", json_file) as begin:
        import torch

        import fastbert
        from fastbert.cli.source import Source

        begin("loading the model")
        source = Source.open(model, None)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = str(task) if task else source.task_of_architecture()
        loaded, batch = source.load(name, torch.float32, device, batch_size=2, max_length=24)
        begin("running one batch")
        fastbert.patch(loaded)
        loaded(**batch)
    result = fastbert.report(loaded)
    console_for(json_file).print(result)
    write_json(result.to_dicts(), json_file)


@app.command(epilog=EXIT_CODES)
def doctor(json_file: JsonOption = None) -> None:
    """Check this machine, run a tiny model as a test, and say whether patched models run on the kernels here."""
    check_json(json_file)
    with suppress(InputError):  # what the interpreter lacks is one of the checks
        _use_interpreter()
    with progress("looking at the machine", json_file) as begin:
        from fastbert.cli.doctor import examine

        diagnosis = examine(begin)
    console_for(json_file).print(diagnosis)
    write_json(diagnosis.to_dict(), json_file)
    if not diagnosis.ok:
        raise typer.Exit(1)


@app.command(epilog=EXIT_CODES)
def env(json_file: JsonOption = None) -> None:
    """Print what a bug report needs: versions, GPUs and environment variables."""
    check_json(json_file)
    facts = environment()
    out = console_for(json_file)
    for name, value in facts.items():
        out.print(f"{name + ':':<24}{value}", highlight=False, markup=False, soft_wrap=True)
    write_json(facts, json_file)


@app.command(epilog=EXIT_CODES)
def hub(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder to write to; created if needed.", show_default=False)],
    json_file: JsonOption = None,
) -> None:
    """Write a folder that Hugging Face's `kernels` package loads: layers by name, and FlashAttention's functions."""
    check_json(json_file)
    from fastbert.hub.build import write_build

    written = write_build(out_dir)
    console_for(json_file).print(f"wrote {written}", highlight=False, markup=False, soft_wrap=True)
    write_json({"written": str(written)}, json_file)


def main() -> None:
    """Run the command line."""
    run(app)
