"""Command line of the benchmarks, `python -m bench`. Each folder defines its commands in command.py.

Commands import modules that import triton inside the function, because a dry run has to select the interpreter first.
"""

import typer

from bench.audit.command import audit
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

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Benchmarks and audits of the kernels."""


for command in (audit, layer, gpu, models, latency, encode, ops, host, tune, accept, report, scaling, train):
    app.command()(command)
app.command("input")(measure_input)


if __name__ == "__main__":
    app()
