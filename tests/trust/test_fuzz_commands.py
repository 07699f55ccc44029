"""Every command line against arguments at random: exit code 0, 1, 2 or 3, one line for wrong input, nothing else touched.

The commands run as they are, down to the place where they have checked what was given; what takes time is left out.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import huggingface_hub
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from bench import __main__ as bench
from bench.core import options
from fastbert.cli import commands as fastbert
from tests.bench.report.test_report import SAMPLE
from tests.trust.command_lines import arguments, commands, make_files, writes
from tests.trust.hostile import called

CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.large_base_example]
PROFILE = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": CHECKS}
NO_GPU = 3
NOTICE = "no NVIDIA GPU here"


def stop(*_: object, **__: object) -> NoReturn:
    """In place of work: all arguments have been accepted."""
    raise SystemExit(0)


def nothing(*_: object, **__: object) -> list[object]:
    return []


@pytest.fixture
def without_work(monkeypatch, tmp_path):
    """A folder to run in, with files for the arguments, in which commands accept and refuse arguments and do nothing else."""
    import bench.audit.no_gpu
    import bench.audit.run
    import bench.core.environment
    import bench.host.layer_traffic
    import bench.host.run
    import bench.report.figures
    import bench.report.files
    import bench.runner.gpu
    import bench.runner.isolate
    import bench.scaling.tables
    import bench.stream.measure
    import bench.train.command
    import fastbert.cli.doctor
    import fastbert.cli.source
    from bench.core import schema

    environment = schema.read(SAMPLE).environment
    for owner, name, instead in (
        (fastbert.cli.source.Source, "load", stop),
        (fastbert.cli.doctor, "examine", stop),
        (bench.audit.run, "run", nothing),
        (bench.audit.run, "write", nothing),
        (bench.audit.no_gpu, "explain", lambda console: NO_GPU),
        (bench.core.environment, "read", lambda commit=None: environment),
        (bench.host.layer_traffic, "of_layer", stop),
        (bench.host.run, "run", nothing),
        (bench.report.figures, "draw", nothing),
        (bench.report.files, "write", nothing),
        (bench.report.files, "write_page", nothing),
        (bench.runner.gpu, "run", lambda plan, results, budget, out, *_, **__: schema.write(results, out / "results.json")),
        (bench.runner.isolate, "SERVER", SimpleNamespace(begin=nothing)),
        (bench.scaling.tables, "built", stop),
        (bench.stream.measure, "measure", stop),
        (bench.train.command, "_run", stop),
    ):
        monkeypatch.setattr(owner, name, instead)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # a word may be the name of a model there
    make_files(tmp_path, SAMPLE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(entry, command, given, folder):
    before = dict(os.environ)
    with writes() as written:
        try:
            code, _, errors = called(entry, *command, *given)
        finally:
            os.environ.clear()
            os.environ.update(before)
    lines = [line for line in errors.splitlines() if not line.startswith(NOTICE)]
    allowed = (0, 1, 2) if entry is fastbert.main or torch.cuda.is_available() else (0, 1, 2, NO_GPU)
    assert code in allowed, (code, errors)
    if code == 2:
        assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable(), errors
    assert [path for path in written if not Path(path).is_relative_to(folder)] == []


def run_bench():
    options.run(bench.app)


APPS = {"fastbert": (fastbert.main, fastbert.app), "bench": (run_bench, bench.app)}
COMMANDS = [(app, name) for app, (_, found) in APPS.items() for name in commands(found)]


def check_command(app, name, examples, folder):
    entry, found = APPS[app]

    @settings(**PROFILE, max_examples=examples)
    @example([])
    @given(arguments(commands(found)[name]))
    def one(given):
        check(entry, [name], given, folder)

    one()


@pytest.mark.parametrize(("app", "name"), COMMANDS)
def test_a_command(app, name, without_work):
    check_command(app, name, 15, without_work)


@pytest.mark.long
@pytest.mark.parametrize(("app", "name"), COMMANDS)
def test_a_command_long(app, name, without_work):
    check_command(app, name, 1500, without_work)
