"""python -m bench: measurements of the kernels from the command line. A folder's commands stand in its command.py.

What imports triton is imported inside the commands: a dry run first chooses its interpreter.
"""

import typer

from bench.audit.command import audit
from bench.host.command import host, layer
from bench.models.command import models
from bench.ops.command import ops
from bench.report.command import report
from bench.runner.command import accept, gpu
from bench.train.command import train
from bench.tune.command import tune

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Measurements of the kernels."""


for command in (audit, layer, gpu, models, ops, host, tune, accept, report, train):
    app.command()(command)


if __name__ == "__main__":
    app()
