"""The folder that `fastbert hub` writes, once per process: the same sources from two folders are loaded only once."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from typer.testing import CliRunner

from fastbert.cli.commands import app


@functools.cache
def build() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fastbert-hub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    result = CliRunner().invoke(app, ["hub", "--out", str(folder)])
    assert result.exit_code == 0 and "torch-universal" in result.output, result.output
    return folder
