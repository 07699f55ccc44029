"""Command line of the benchmarks, `python -m bench`. Each folder defines its commands in command.py.

Commands import modules that import triton inside the function, because a dry run has to select the interpreter first.
"""

import typer

from bench.audit.command import audit
from bench.core.options import EXIT_CODES, leave_stdout_to, run
from bench.encode.command import encode
from bench.host.command import host, layer
from bench.models.command import latency, models
from bench.ops.command import ops
from bench.report.command import report
from bench.runner.command import accept, gpu
from bench.scaling.command import scaling
from bench.stream.command import measure_input
from bench.train.command import train
from bench.tune.command import tune

# No completion: a shell completes names of programs, and this is a module.
app = typer.Typer(add_completion=False, rich_markup_mode=None, epilog=EXIT_CODES)


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """Benchmarks and audits of the kernels."""
    leave_stdout_to(None)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for command in (audit, layer, gpu, models, latency, encode, ops, host, tune, accept, report, scaling, train):
    app.command(epilog=EXIT_CODES)(command)
app.command("input", epilog=EXIT_CODES)(measure_input)


if __name__ == "__main__":
    run(app)
