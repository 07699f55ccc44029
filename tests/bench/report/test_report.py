"""The report on stored sample results, which are invented and say so."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from bench.core import comparison, schema
from bench.core.records import GIB, Environment, Results, Spread, StageRecord
from bench.report import documents, tables
from bench.report.table import Table
from bench.runner import acceptance

SAMPLE = Path(__file__).parents[1] / "data/invented.json"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def sample():
    return schema.read(SAMPLE)


@pytest.fixture
def measured(sample):
    """The same as if it had been measured, so that the writing of documents can be tried on a scratch file."""
    return dataclasses.replace(sample, invented=False)


def nothing():
    where = {field.name: None for field in dataclasses.fields(Environment)}
    where |= {"clocks": {}, "date": "2000-01-01", "pretended": False}
    return Results(Environment(**where | dict.fromkeys(("python", "torch", "transformers", "fastbert"), "0")))


def test_page_and_pictures(tmp_path):
    done = CliRunner().invoke(app, ["report", str(SAMPLE), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    written = sorted(path.name for path in tmp_path.iterdir())
    pictures = ["latency.png", "losses.png", "memory.png", "roofline.png", "scaling.png", "speed.png"]
    assert written == sorted([*pictures, "report.html", "report.md"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "://" not in page and "<script" not in page, "the page stands alone"
    assert "Invented sample numbers" in page and "Invented GPU, driver 000.00" in page
    assert "2.38x" in page and "no difference" in page
    assert all((tmp_path / name).stat().st_size < 1 << 20 for name in written)


def test_a_lane_that_failed_has_no_time(sample):
    row = next(line for line in tables.models(sample).markdown().splitlines() if "failed its check" in line)
    assert "fastbert + compile" in row and " ms " not in row


def test_losing_is_said_as_plainly_as_winning(sample):
    record = next(r for r in sample.models if r.lane == "eager")
    stock = next(r for r in sample.models if r.lane == "stock" and r.case == record.case)
    assert comparison.ratio(record, stock) == "0.70x (slower)"
    assert comparison.ratio(stock, record) == "1.43x"
    same = dataclasses.replace(stock, seconds=Spread(*(x * 1.005 for x in dataclasses.astuple(stock.seconds)[:3]), 9))
    assert comparison.ratio(same, stock).startswith("no difference")


def test_the_headline_has_a_row_per_workload(sample):
    """The README's row: each lane's time, the ratio to stock, and the memory; a lane that failed has its reason."""
    like = next(r for r in sample.models if r.seconds)

    def lane(name, seconds, gib):
        spread = Spread(seconds, seconds, seconds, 9)
        return dataclasses.replace(like, lane=name, status="ok", reason=None, seconds=spread, peak_bytes=gib * GIB)

    records = [lane("stock", 0.004, 8), lane("fastbert", 0.002, 4), lane("fastbert, graphed", 0.001, 3)]
    records += [lane("stock + compile", 0.0035, 7), lane("stock + reduce-overhead", 0.003, 7)]
    heading, _, row = tables.headline(dataclasses.replace(sample, models=records)).markdown().splitlines()
    assert heading.startswith("| workload | stock | best torch.compile | fastbert | fastbert, graphed | speed-up")
    expected = "4 ms | 3 ms | 2 ms | 1 ms | 2.00x / 4.00x | 8.0 / 4.0 / 3.0 GiB"
    assert row == f"| {tables.workload(like)} | {expected} |"
    failed = dataclasses.replace(records[1], status="failed", seconds=None, peak_bytes=None)
    row = tables.headline(dataclasses.replace(sample, models=[records[0], failed, records[2]])).markdown().splitlines()[-1]
    assert row.endswith("| 4 ms | not measured | failed its check | 1 ms | - / 4.00x | 8.0 / - / 3.0 GiB |")


def test_rates_count_real_tokens(sample):
    record = next(r for r in sample.models if r.lane == "stock" and r.fill == 0.5)
    row = next(line for line in tables.models(sample).markdown().splitlines() if "| stock |" in line)
    assert f"{record.real_tokens / record.seconds.median:,.0f}" in row
    assert f"{record.flops / record.seconds.median / 8e14:.1%}" in row


def test_share_of_the_ceiling(sample):
    timed = [r for r in sample.ops if r.seconds and r.lane == "fastbert"]
    for record in timed:
        assert comparison.share(record, 4e12, 8e14) == pytest.approx(0.85)
        assert comparison.share(record, None, 8e14) is None


def test_an_op_whose_forward_forms_the_gradients_is_shown_by_both_directions_only(sample):
    like = next(r for r in sample.ops if r.seconds and r.lane == "fastbert")
    size = {"op": "linear_cross_entropy", "dtype": "bf16", "hidden": 1024, "batch": 1, "seqlen": 16384}
    records = [dataclasses.replace(like, **size, direction=direction) for direction in ("forward", "backward", "both")]
    for table in (tables.ops, tables.ops_headline):
        text = table(dataclasses.replace(sample, ops=records)).markdown()
        rows = [line for line in text.splitlines() if line.startswith("| linear_cross_entropy")]
        assert len(rows) == 1 and "| both |" in rows[0]
        if table is tables.ops:
            assert "already forms the gradients" in text
    assert "forms the gradients" not in tables.ops(sample).markdown() or any(r.op == size["op"] for r in sample.ops)


def test_losses_are_compared_with_eagers(sample):
    record = next(r for r in sample.models if r.lane == "fastbert" and r.losses)
    moved = dataclasses.replace(record, losses=[*record.losses[:-1], record.losses[-1] * 1.02])
    models = [moved if r is record else r for r in sample.models]
    rows = tables.losses(dataclasses.replace(sample, models=models)).markdown().splitlines()
    apart = [row for row in rows if "2.0e-02 of eager's" in row]
    assert len(apart) == 1 and "| fastbert |" in apart[0]
    assert sum("0.0e+00 of eager's" in row for row in rows) > 4


def test_losses_of_zero_are_compared_too(sample):
    record = next(r for r in sample.models if r.losses)
    models = [dataclasses.replace(record, lane=lane, losses=losses) for lane, losses in (("eager", [0.0]), ("stock", [0.5]))]
    rows = tables.losses(dataclasses.replace(sample, models=models)).markdown()
    assert "0.0e+00 of eager's" in rows and "inf of eager's" in rows


def test_what_was_not_reached_is_one_line(sample):
    missed = [StageRecord(f"job {i}", "not reached", 0.0, "3 s were left") for i in range(7)]
    failed = StageRecord("broken", "error", 2.0, "Traceback\nRuntimeError: no")
    rows = tables.stages(dataclasses.replace(sample, stages=[failed, *missed])).markdown().splitlines()[2:]
    assert rows == ["| broken | error | 2 s | RuntimeError: no |", "| job 0, and 6 more | not reached |  | 3 s were left |"]


def test_one_table_in_both_forms():
    table = Table(("lane", "time"), [("fastbert", "1.5 ms"), ("a|b <i>", "&" * 61)], ["a <note>"])
    assert table.markdown().splitlines() == [
        *("| lane | time |", "| --- | --- |", "| fastbert | 1.5 ms |", f"| a/b &lt;i> | {'&' * 61} |", "a &lt;note>")
    ]
    page = table.html()
    assert '<tr class="ours"><td>fastbert</td><td class=number>1.5 ms</td></tr>' in page
    assert f'<tr><td>a|b &lt;i&gt;</td><td><span class="long">{"&amp;" * 61}</span></td></tr>' in page
    assert page.startswith('<div class="scroll"><table>') and page.endswith("</table></div><p>a &lt;note&gt;</p>")
    assert Table(("lane",)).markdown() == comparison.NOT_MEASURED


@pytest.mark.parametrize("name", tables.TABLES)
def test_without_measurements_every_table_says_so(name):
    assert comparison.NOT_MEASURED in tables.named(name, None)
    assert comparison.NOT_MEASURED in tables.named(name, nothing()), "an empty run has no number either"


def test_pictures_of_nothing(tmp_path):
    from bench.report import files

    written = files.write(nothing(), tmp_path)
    assert len(written) == 8 and comparison.NOT_MEASURED in (tmp_path / "report.html").read_text()


DOCUMENT = """before
<!-- bench:headline -->
old
<!-- /bench:headline -->
between
<!-- bench:ops-headline -->
<!-- /bench:ops-headline -->
"""


def test_marked_tables_are_replaced_and_nothing_else(measured, tmp_path):
    file = tmp_path / "README.md"
    file.write_text(DOCUMENT)
    assert documents.write(file, measured)
    text = file.read_text()
    assert "old" not in text and "Invented GPU" in text
    assert text.startswith("before\n<!-- bench:headline -->\n| workload |") and "\nbetween\n" in text
    assert not documents.write(file, measured), "a second time changes nothing"
    assert documents.write(file, None)
    assert file.read_text().count(comparison.NOT_MEASURED) == 2 and "|" not in file.read_text()


def test_sample_numbers_cannot_reach_a_document(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(DOCUMENT)
    done = CliRunner().invoke(app, ["report", str(SAMPLE), "--out", str(tmp_path), "--write", str(file)])
    assert done.exit_code == 2 and "only measured results" in done.output
    assert file.read_text() == DOCUMENT


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- bench:headline -->\n", "without its partner"),
        ("<!-- bench:headlines -->\n<!-- /bench:headlines -->\n", "no table is called 'headlines'"),
    ],
)
def test_wrong_markers(measured, text, said):
    with pytest.raises(schema.ResultsError, match=said):
        documents.fill(text, measured)


def test_errors_are_one_line(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    done = CliRunner().invoke(app, ["report", str(broken)])
    assert done.exit_code == 2 and len(done.output.strip().splitlines()) == 1 and "not JSON" in done.output


def test_no_document_holds_an_invented_number():
    for name in acceptance.DOCUMENTS:
        assert "INVENTED SAMPLE" not in (ROOT / name).read_text()
