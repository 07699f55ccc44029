"""docs/scaling.md: its tables are what the command prints, and its words fit them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from typer.main import get_command
from typer.testing import CliRunner

from bench.__main__ import app
from bench.core.flops import mfu
from bench.core.hardware import BF16_OPERATIONS_PER_SECOND
from bench.core.records import Results
from bench.core.schema import read
from bench.report.documents import MARKED
from bench.scaling import command, tables, volumes
from bench.scaling.assumptions import RECORDS, Assumptions
from bench.scaling.parts import bert
from bench.scaling.simulate import COMPRESSED, DDP, FSDP, HSDP, Batch, step
from bench.scaling.tables import LAMB, MOST_TOKENS, Question, split

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "scaling.md").read_text()


@pytest.fixture(scope="module")
def found():
    return tables.built(Question())


@pytest.fixture(scope="module")
def printed(found):
    return {name: table.markdown() for name, table in found.items()}


@pytest.fixture(scope="module")
def large():
    return bert("BERT-large")


def run(*arguments: str):
    return CliRunner().invoke(app, ["scaling", *arguments])


def test_launchers_take_the_options_of_the_page():
    """By their own parsers. What follows the script's or module's name is its own."""
    parsers = {"torchrun": get_args_parser(), "accelerate launch": launch_command_parser()}
    launched = [line for line in PAGE.splitlines() if line.startswith(tuple(parsers))]
    assert len(launched) == 6
    for line in launched:
        name = next(name for name in parsers if line.startswith(name))
        parsed = parsers[name].parse_args(line.removeprefix(name).split())
        assert parsed.training_script == ("bench" if " -m " in line else "train.py")
    ours = " ".join(line.partition(" bench train ")[2] for line in launched)
    options = {option for parameter in get_command(app).commands["train"].params for option in parameter.opts}
    assert {"--stream", "--batch"} < {word for word in ours.split() if word.startswith("--")} < options
    assert "--max-restarts" in parsers["torchrun"].format_help()


def test_the_page_has_the_tables_of_the_command(printed):
    found = {match["name"]: match[0].split("\n", 1)[1].rsplit("\n", 1)[0] for match in MARKED.finditer(PAGE)}
    assert found == printed, "python -m bench scaling --update"


def test_update_writes_what_it_prints(found, printed, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(re.sub(r"(<!-- bench:\S+ -->\n).*?(?=<!-- /bench)", r"\1", PAGE, flags=re.S))
    monkeypatch.setattr(command, "PAGE", page)
    monkeypatch.setattr(tables, "built", lambda question: found)
    result = run("--update")
    assert result.exit_code == 0 and "written" in result.output and page.read_text() == PAGE
    assert all(f"{name}\n\n{table}\n" in result.output for name, table in printed.items())
    assert "unchanged" in run("--update").output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "huge"), "--model: expected base or large, got 'huge'"),
        (("--gpus", "8", "--gpus", "12"), "--gpus: expected 1 to 8, or a multiple of 8 up to 65536, got 12"),
        (("--rows", "0"), "expected --rows from 1 to 65536 and --busy in (0, 1], got 0 and 0.5"),
        (("--busy", "1.5"), "got 32 and 1.5"),
        (("--rows", "16", "--update"), "--update: the page has the tables of the default options"),
    ],
)
def test_options_that_cannot_be(arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2 and said in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def test_other_options():
    found = run("--model", "base", "--gpus", "4", "--rows", "2")
    assert found.exit_code == 0 and "BERT-base with its pre-training head has 110,106,428 parameters" in found.output
    assert "| 4 | 2 x 512 | DDP |" in found.output


def test_measured_assumptions_are_those_of_the_records():
    results: Results = read(ROOT / "bench" / "results" / RECORDS)
    (adamw,) = [r for r in results.ops if r.op == "adamw" and r.hidden == 1024 and r.lane == "fastbert"]
    assert Assumptions().optimizer_rate == pytest.approx(adamw.moved / adamw.seconds.median, rel=1e-3)
    steps = {r.lane: r for r in results.models if (r.model, r.head, r.mode) == ("BERT-base", "mlm", "train") and r.seconds}
    shares = [
        mfu(steps[lane].flops, steps[lane].seconds.median, BF16_OPERATIONS_PER_SECOND)
        for lane in ("fastbert", "fastbert, graphed step")
    ]
    assert shares == pytest.approx([0.25, 0.55], abs=0.005)
    assert shares[0] < Assumptions().busy < shares[1]


def test_a_global_batch_is_shared_whole():
    for total, seqlen in LAMB:
        for gpus in tables.GPUS:
            batch = split(total, seqlen, gpus)
            assert batch.rows * batch.accumulation * gpus == total and batch.rows * batch.seqlen <= MOST_TOKENS
    assert split(100, 128, 8) is None


def test_what_the_page_says_of_8_and_64(large):
    for gpus in (8, 64):
        for seqlen in (512, 128):
            for engine in (DDP, COMPRESSED, FSDP, HSDP):
                assert 0.85 < step(large, engine, gpus, Batch(32, seqlen)).overlap < 0.95
    late = sum(one.size for one in volumes.ddp(large, 8) if one.part == "embeddings")
    assert 0.09 < late / (4 * large.numel) < 0.11
    assert 16 * large.numel / 1e9 == pytest.approx(5.4, abs=0.05)


def test_what_the_page_says_of_1024(large):
    for engine in (DDP, HSDP):
        assert 0.85 < step(large, engine, 1024, Batch(32, 512)).overlap < 0.95
    short = Batch(32, 128)
    assert len(volumes.ddp(large, 1024)) == 39 and step(large, DDP, 1024, short).limit == "latency"
    for better in (COMPRESSED, replace(DDP, bucket_cap_mb=100)):
        assert step(large, better, 1024, short).efficiency > step(large, DDP, 1024, short).efficiency + 0.02
    assert len(volumes.fsdp(large, 1024)) == 74
    fast = replace(Assumptions(), inside_rate=1e15, between_rate=1e15)
    for machine in (Assumptions(), fast):
        assert step(large, FSDP, 1024, Batch(32, 512), machine).limit == "latency"
    few = step(large, DDP, 1024, Batch(4, 512))
    assert few.communication > few.compute * 2 / 3, "the reduction is longer than the backward"


def test_what_the_page_says_of_other_assumptions(printed):
    """Rows of the table of changes: what, changed, and the efficiencies of DDP, DDP with larger buckets, two FSDP2, HSDP."""
    rows = [row.strip("| ").split(" | ") for row in printed["scaling-changes"].splitlines()[2:]]
    shares = {(what, changed): [int(cell.rstrip("%")) for cell in cells] for what, changed, *cells in rows}
    for (what, changed), (ddp, _, fsdp, _, hsdp) in shares.items():
        assert hsdp > 3 * fsdp if what == "32 x 128" else hsdp > fsdp, changed
        assert hsdp >= ddp, changed
    close = {changed for (what, changed), cells in shares.items() if what == "32 x 512" and cells[4] - cells[2] < 10}
    assert close == {"busy 0.25", "all latencies halved"}


def test_what_the_page_says_of_hundreds(large):
    assert step(large, FSDP, 512, Batch(32, 512)).limit == step(large, FSDP, 128, Batch(32, 128)).limit == "latency"
    assert step(large, FSDP, 256, Batch(32, 512)).limit == step(large, FSDP, 64, Batch(32, 128)).limit == "compute"
