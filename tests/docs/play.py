"""Runs the Python blocks of a page, in order, by the page's play.

A play is a generator with one step per block: it yields the names that the next block runs in (or those and a dictionary of
texts to replace, such as a path), gets back what the block printed, and checks what the block has done. A block without a
step fails, and so does a step without a block.
"""

import contextlib
import importlib
import io
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.docs.blocks import Block, blocks
from tests.ranks import on_ranks

Names = dict[str, Any]
Step = Names | tuple[Names, dict[str, str]]
Play = Generator[Step, str, None]


def module_of(page: str) -> ModuleType:
    """The module with the page's play. It may set RANKS, the number of processes that run the page together."""
    name = f"tests.docs.plays.{Path(page).stem.lower().replace('-', '_')}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        pytest.fail(f"{page} has Python blocks that nothing runs: write {name} with a function play(folder)")


def run(found: list[Block], play: Play) -> None:
    """Run the Python blocks among `found` by the play, and compare the output that follows them."""
    try:
        printed: str | None = None
        for i, block in enumerate(found):
            if block.language != "python":
                continue
            try:
                step = play.send(printed)
            except StopIteration:
                pytest.fail(f"{block}: the play of the page has no step for this block")
            names, replaced = step if isinstance(step, tuple) else (step, {})
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                block.run(names, replaced)
            printed = stdout.getvalue()
            if found[i + 1 : i + 2] and found[i + 1].language == "output":
                assert printed == found[i + 1].text, f"{found[i + 1]}: the block before prints something else"
        with contextlib.suppress(StopIteration):
            play.send(printed)
            pytest.fail(f"{found[0].page}: the play has more steps than the page has blocks")
    finally:
        play.close()


def run_page(page: str, folder: Path) -> None:
    module = module_of(page)
    if ranks := getattr(module, "RANKS", None):
        on_ranks(ranks, run_rank, page, str(folder))
    else:
        run(blocks(page), module.play(folder))


def run_rank(rank: int, page: str, folder: str) -> None:
    run(blocks(page), module_of(page).play(Path(folder), rank))
