"""Results files: what is written is what is read; what is broken, contradictory or mixed is one clear line."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.core import schema
from bench.core.records import Spread

SAMPLE = Path(__file__).parents[1] / "data/invented.json"


@pytest.fixture
def data():
    return json.loads(SAMPLE.read_text())


def saved(folder, data, name="results.json"):
    path = folder / name
    path.write_text(json.dumps(data))
    return path


def test_round_trip(tmp_path):
    results = schema.read(SAMPLE)
    schema.write(results, tmp_path / "again.json")
    assert schema.read(tmp_path / "again.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["again.json"]


def test_what_is_written_again_is_the_same_file(tmp_path):
    kept = Path(__file__).parents[3] / "bench/results/host.json"
    schema.write(schema.read(kept), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == kept.read_bytes()


def set_at(data, path, value):
    *outer, last = path
    for key in outer:
        data = data[key]
    if value is KeyError:
        del data[last]
    else:
        data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("schema",), 99, "has schema 99"),
        (("schema",), KeyError, "not a results file"),
        (("environment",), KeyError, r"results\.environment: Field required$"),
        (("environment", "torch"), 2, r"environment\.torch: Input should be a valid string, got 2$"),
        (("surprise",), 1, r"results\.surprise: Unexpected keyword argument, got 1$"),
        (("models", 0, "batch"), "32", r'models\[0\]\.batch: Input should be a valid integer, got "32"$'),
        (("models", 0, "seconds"), None, "status 'ok' without a time"),
        (("models", 0, "status"), "failed", "status 'failed' with a time"),
        (("models", 0, "status"), "great", "is none of"),
        (("models", 0, "seconds", "low"), 99.0, "not in order"),
        (("models", 0, "flops"), float("nan"), r"models\[0\]\.flops: Input should be a finite number, got NaN$"),
        (("ops", 0, "lane"), KeyError, r"ops\[0\]\.lane: Field required$"),
        (("dry_run",), True, "a time in a dry run"),
        (("ceilings",), {}, r"ceilings: Input should be a valid array, got \{\}$"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, data, path, value, said):
    set_at(data, path, value)
    file = saved(tmp_path, data)
    with pytest.raises(schema.ResultsError, match=said) as error:
        schema.read(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"records": []}'])
def test_what_is_no_results_file(tmp_path, content):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(schema.ResultsError):
        schema.read(file)


def test_files_of_two_machines_are_not_mixed(tmp_path, data):
    other = copy.deepcopy(data)
    other["environment"]["gpu"] = "Another GPU"
    with pytest.raises(schema.ResultsError, match="Another GPU.*one at a time"):
        schema.read_all([saved(tmp_path, data, "a.json"), saved(tmp_path, other, "b.json")])


def test_measured_and_invented_are_not_mixed(tmp_path, data):
    other = copy.deepcopy(data) | {"invented": False}
    with pytest.raises(schema.ResultsError, match="only one of them was measured"):
        schema.read_all([saved(tmp_path, data, "a.json"), saved(tmp_path, other, "b.json")])


def test_what_was_measured_again_counts_once(tmp_path, data):
    other = copy.deepcopy(data)
    other["models"] = other["models"][:1]
    other["models"][0]["seconds"] = {"low": 1.0, "median": 2.0, "high": 3.0, "rounds": 9}
    merged = schema.read_all([saved(tmp_path, data, "a.json"), saved(tmp_path, other, "b.json")])
    assert len(merged.models) == len(data["models"])
    assert merged.models[0].seconds == Spread(1.0, 2.0, 3.0, 9)


def test_a_case_measured_again_in_one_run_counts_once():
    """Also where the second time found it wrong: then there is no time."""
    results = schema.read(SAMPLE)
    first = next(record for record in results.models if record.seconds)
    failed = replace(first, status="failed", reason="loss: error 1", seconds=None)
    schema.add(results, [failed])
    assert [r for r in results.models if (r.case, r.lane) == (first.case, first.lane)] == [failed]


def test_a_record_that_contradicts_itself_does_not_reach_the_file(tmp_path):
    results = schema.read(SAMPLE)
    good, other = results.models[:2]
    timeless = replace(good, seconds=Spread(0.0, 0.0, 0.0, 9))
    with pytest.raises(ValueError, match="not in order"):
        schema.add(results, [timeless, replace(other, reason="kept")])
    assert good in results.models and timeless not in results.models and results.models[-1].reason == "kept"
    schema.write(results, tmp_path / "results.json")
    assert schema.read(tmp_path / "results.json") == results


def test_a_line_cut_off_by_a_kill_is_left_out():
    record = schema.read(SAMPLE).models[0]
    line = schema.to_line(record)
    assert schema.from_lines([line, line[:40]]) == [record]


def test_lanes_differ_only_where_quartiles_do_not_overlap():
    one = Spread(1.0, 1.1, 1.2, 50)
    assert not one.differs(replace(one, low=1.15, median=1.3, high=1.4))
    assert not one.differs(replace(one, low=1.2, median=1.3, high=1.4))
    assert one.differs(replace(one, low=1.21, median=1.3, high=1.4))
    assert one.differs(replace(one, low=0.5, median=0.6, high=0.9))
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(2.0, 3.0, 4.0, 5)


def test_measuring_needs_no_pydantic():
    """A machine with a GPU may have what transformers needs and no more: there results are written, not read."""
    code = """
import sys
sys.modules["pydantic"] = None
from bench.core import schema
from bench.core.lengths import Lengths
from bench.models.workloads import Workload
from bench.runner import command, gpu, isolate, plan, selection, suite, worker
workload = Workload("BERT-base", "mlm", "train", 2, 8, 0.5, lengths=Lengths("given", (3, 4)))
assert Workload.from_json(workload.to_json()) == workload
assert schema.from_lines([schema.to_line(workload)]) == [workload]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SAMPLE.parents[3])
