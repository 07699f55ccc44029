"""python -m tests.mutation: plants faults in copies of the tree, one at a time, and checks that a test notices each.

Exit code 1: a fault that no test noticed, a fault that cannot be planted, or tests that fail without a fault.
"""

import os

# Everything runs in Triton's interpreter on the CPU, even with a GPU: several processes run at once.
os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.mutation import trees
from tests.mutation.fault import ROOT, Fault
from tests.mutation.faults import FAULTS

console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def main(
    short: Annotated[bool, typer.Option("--short", help="Only the two nastiest faults of each op, as .ci/run does.")] = False,
    only: Annotated[str, typer.Option(help="Only faults whose file, op or description this regular expression finds.")] = "",
    list_: Annotated[bool, typer.Option("--list", help="Print the faults and plant none.")] = False,
    jobs: Annotated[int, typer.Option(min=0, help="Test processes at a time; 0: one a core.")] = 0,
) -> None:
    """Plant each fault in a copy of the tree and run the tests that should notice it. Exit 1 unless every fault is noticed."""
    faults = [fault for fault in FAULTS if (fault.short or not short) and re.search(only, f"{fault.op} {fault.name}", re.I)]
    if not faults:
        raise typer.BadParameter(f"no fault matches {only!r}")
    if list_:
        console.print(_listed(faults))
        return
    if problems := trees.problems(faults):
        for problem in problems:
            console.print(Text(problem, "red"))
        raise typer.Exit(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastbert-mutation-") as folder:
        session = Session(faults, Path(folder))
        session.run(jobs or os.cpu_count() or 1)
    killed = len(session.killed)
    console.print(f"{killed} of {len(faults)} faults killed in {time.monotonic() - started:.0f} s: {killed / len(faults):.0%}")
    raise typer.Exit(0 if killed == len(faults) else 1)


@dataclass
class Session:
    faults: list[Fault]
    folder: Path
    broken: set[str] = field(default_factory=set)  # tests that fail without a fault
    killed: list[Fault] = field(default_factory=list)

    def run(self, at_once: int) -> None:
        # Imports that every fork needs. They are here so that --list is quick.
        import hypothesis  # noqa: F401
        import torch.fx.experimental.symbolic_shapes  # noqa: F401
        import transformers.models.bert.modeling_bert  # noqa: F401
        import triton.runtime.interpreter  # noqa: F401

        from tests.mutation import run

        self.base = trees.copy(ROOT, self.folder / "base")
        run.run(self._without_faults(), at_once)
        run.run(self._with_faults(), at_once)

    def _without_faults(self) -> Iterator:
        from tests.mutation.run import Job, Outcome, by_file

        groups = by_file([fault.tests for fault in self.faults])
        for number, tests in enumerate(groups, 1):

            def done(outcome: Outcome, tree: Path, tests: tuple[str, ...] = tests, number: int = number) -> None:
                missing = outcome.not_passed(tests)
                self.broken.update(missing)
                word = f"{missing[0]} did not pass" if missing else f"{len(outcome.seen.passed)} passed without a fault"
                self._say(number, len(groups), word, not missing, tests[0].partition("::")[0], outcome.cpu_seconds)
                if missing:
                    console.print(Text(outcome.output[-3000:]))
                trees.keep_compiled(tree, self.base)
                shutil.rmtree(tree)

            yield Job(self._copy, tests, done)

    def _with_faults(self) -> Iterator:
        from tests.mutation.run import Job, Outcome

        for number, fault in enumerate(self.faults, 1):
            if not self.broken.isdisjoint(fault.tests):
                self._say(number, len(self.faults), "not planted, for its tests do not pass without it", False, fault.name, 0.0)
                continue

            def prepare(fault: Fault = fault) -> Path:
                tree = self._copy()
                trees.plant(fault, tree)
                return tree

            def done(outcome: Outcome, tree: Path, fault: Fault = fault, number: int = number) -> None:
                killer = outcome.killer
                if killer:
                    self.killed.append(fault)
                word = "killed" if killer else "survived" if outcome.code == 0 else f"exit code {outcome.code}"
                what = f"{fault.name}\n            by {killer}" if killer else fault.name
                self._say(number, len(self.faults), word, bool(killer), what, outcome.cpu_seconds)
                if not killer and outcome.code != 0:
                    console.print(Text(outcome.output[-3000:]))
                shutil.rmtree(tree)

            yield Job(prepare, fault.tests, done)

    def _copy(self) -> Path:
        return trees.copy(self.base, Path(tempfile.mkdtemp(dir=self.folder)) / "tree")

    def _say(self, number: int, of: int, word: str, good: bool, what: str, seconds: float) -> None:
        console.print(Text.assemble(f"{number:3}/{of} ", (f"{word} ", "green" if good else "red"), f"{what} {seconds:.1f} s"))


def _listed(faults: list[Fault]) -> Table:
    table = Table("file", "fault", "op", "short", "tests")
    for fault in faults:
        table.add_row(*map(Text, (fault.file, fault.says, fault.op, "yes" if fault.short else "", " ".join(fault.tests))))
    return table


if __name__ == "__main__":
    typer.run(main)
