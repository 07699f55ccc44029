"""Which entries of configs.FUSED a run earns: products with epilogues that are no slower at every size from some rows on."""

import io

import pytest
from rich.console import Console

from bench.core.records import OpRecord, Spread
from bench.ops.feed_forward_lanes import AFTER, EPILOGUES, earned, earned_table, verdicts
from fastbert.kernels.feed_forward.products import GRADIENT, PRODUCT


def record(lane, microseconds, rows, direction="forward", hidden=768, status="ok", dtype="bf16", spread=0.02):
    times = [microseconds * 1e-6 * factor for factor in (1 - spread, 1, 1 + spread)]
    return OpRecord(
        *(lane, status, None, Spread(*times, 9) if status == "ok" else None, [], None),
        *("feed_forward", direction, dtype, hidden, 1, rows, 1.0, 0.0, 1, 1),
    )


def pair(epilogues, after, rows, **options):
    return [record(EPILOGUES, epilogues, rows, **options), record(AFTER, after, rows, **options)]


def test_from_the_rows_on_where_it_is_no_slower():
    records = [*pair(90, 100, 1024), *pair(120, 100, 2048), *pair(101, 100, 4096), *pair(80, 100, 16384)]
    assert [no_slower for *_, no_slower in verdicts(records)] == [True, False, True, True]
    assert earned(records) == {PRODUCT: {(768, 3072): 4096}, GRADIENT: {}}


def test_directions_and_sizes_are_decided_by_themselves():
    records = pair(90, 100, 4096, direction="backward", hidden=1024) + pair(120, 100, 4096)
    assert earned(records) == {PRODUCT: {}, GRADIENT: {(1024, 4096): 4096}}


def test_both_types_have_to_be_no_slower():
    assert earned(pair(90, 100, 4096) + pair(120, 100, 4096, dtype="fp16"))[PRODUCT] == {}


@pytest.mark.parametrize("options", [{"status": "failed"}, {"dtype": "fp32"}, {"direction": "both"}], ids=str)
def test_nothing_is_earned_otherwise(options):
    """By what failed its check, by float32, and by a time of both directions."""
    assert not verdicts(pair(50, 100, 4096, **options))


def test_the_table_prints_what_is_to_be_committed():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(earned_table(pair(80, 100, 4096), "sm_90"))
    text = console.export_text()
    assert 'FUSED["feed_forward_product"]["sm_90"] = {2: {(768, 3072): 4096}}' in text and "1.25x" in text
    console.print(earned_table(pair(150, 100, 4096), "sm_90"))
    assert "No entry is earned" in console.export_text()
