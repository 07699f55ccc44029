"""The tool that runs tests over releases: tables, counts and overlays, on invented releases; and the page's tables."""

import json
from importlib import metadata

import pytest

from fastbert import forwards
from tests.releases import digests, matrix, overlay, table

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one" /><testcase classname="tests.a" name="two"><failure>no</failure></testcase>
<testcase classname="" name="tests.b"><error>no</error></testcase><testcase classname="tests.a" name="3"><skipped /></testcase>
</testsuite></testsuites>"""
RAN = {"torch": "2.13.0", "python": "3.11.7", "numpy": "2.4.6", "tokenizers": "0.23.3"}
GOOD = RAN | {"transformers": "5.9.0", "triton": "3.7.1", "passed": 5, "failed": 0, "skipped": 1, "failing": [], "seconds": 9}
BAD = GOOD | {"transformers": "5.10.4", "failed": 2, "failing": ["a", "b"]}
BROKEN = {"transformers": "5.10.4", "triton": "3.10.0", "error": "ImportError: no"}


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "releases.json"
    for record in (BROKEN, BAD | {"passed": 1}, GOOD, BAD):
        matrix.save(path, record, {"a": record["transformers"]})
    return path


def test_a_pair_run_again_takes_its_own_place(results):
    known = matrix.read(results)
    assert known == {"pairs": [GOOD, BAD, BROKEN], "digests": {"5.10.4": {"a": "5.10.4"}, "5.9.0": {"a": "5.9.0"}}}
    assert [matrix.passed(record) for record in known["pairs"]] == [True, False, False]
    assert not matrix.passed(GOOD | {"passed": 0}), "no test is no proof"
    assert [matrix.describe(record).splitlines()[0] for record in (BAD, BROKEN)] == [
        "transformers 5.10.4, triton 3.7.1: 5 passed, 2 failed, 1 skipped in 9 s",
        "transformers 5.10.4, triton 3.10.0: ImportError: no",
    ]


def test_tests_are_counted():
    failing = ["tests.a::two", "tests.b"]
    assert matrix.counts(REPORT) == {"passed": 1, "failed": 2, "skipped": 1, "failing": failing}


def test_the_table_of_releases(results):
    text = table.fill("a\n<!-- releases -->\nold\n<!-- /releases -->\nb\n", matrix.read(results))
    assert text.splitlines() == [
        "a",
        "<!-- releases -->",
        "| transformers | triton 3.7.1 | triton 3.10.0 |",
        "| --- | --- | --- |",
        "| 5.9.0 | 5 passed | not run |",
        "| 5.10.4 | 2 of 7 failed | does not start: ImportError: no |",
        "",
        "Model tests in Triton's interpreter; torch 2.13.0, Python 3.11.7.",
        "<!-- /releases -->",
        "b",
    ]
    with pytest.raises(ValueError, match="found them 0 times"):
        table.fill("a", matrix.read(results))


def test_the_page_has_the_table_of_the_results():
    page = table.PAGE.read_text()
    assert page == table.fill(page, matrix.read(matrix.RESULTS))


def test_the_page_has_the_table_of_the_registry():
    page = table.PAGE.read_text()
    assert page == table.fill_families(page)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.render_families().splitlines()}
    heads = "CausalLM, MaskedLM, MultipleChoice, QuestionAnswering, SequenceClassification, TokenClassification"
    packing, losses = "MultipleChoice, SequenceClassification", "CausalLM, MaskedLM"
    assert rows["RoBERTa"] == f"| RoBERTa | `RobertaModel` | {heads} | {packing} | {losses} |"
    with pytest.raises(ValueError, match="expected <!-- families --> and <!-- /families --> once, found them 0 times"):
        table.fill_families("a")


def test_the_chosen_tests_are_there():
    assert [name for name in matrix.TESTS if not (matrix.ROOT / name).is_file()] == []


def test_digests_keep_the_oldest_release(tmp_path):
    known = digests.added({}, {"B": "b1", "A": "a1"}, "5.10.0")
    known = digests.added(known, {"B": "b1", "A": "a2"}, "5.9.0")
    digests.write(known, tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text() == (
        '{\n "A": {\n  "a2": "5.9.0",\n  "a1": "5.10.0"\n },\n "B": {\n  "b1": "5.9.0"\n }\n}\n'
    )


def test_the_installed_release_adds_nothing(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(digests.TABLE.read_text())
    assert digests.update(path) == [] and path.read_text() == digests.TABLE.read_text()
    assert json.loads(path.read_text()) == forwards.table()


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A stand-in for pip: every requirement except those in `missing` becomes a folder with the distribution's metadata."""

    def install(command, **_):
        requirement, target = command[-1], command[command.index("--target") + 1]
        installed.append(requirement)
        return Done(requirement, target, missing, needs)

    installed, missing, needs = [], set(), []
    monkeypatch.setattr(overlay.subprocess, "run", install)
    return installed, missing, needs


class Done:
    stdout, stderr = "", "a word\nERROR: no such release\n"

    def __init__(self, requirement, target, missing, needs):
        self.returncode = int(requirement in missing)
        folder = overlay.Path(target) / "x-1.dist-info"
        folder.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", "Name: x", "Version: 1", *(f"Requires-Dist: {need}" for need in needs)]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")


def test_what_a_release_refuses_is_put_in_front_too(pip, tmp_path):
    installed, _, needs = pip
    needs += ["tokenizers<0.1", f"torch=={metadata.version('torch')}", "never-installed<1", 'rich<0.1; extra == "serving"']
    assert [path.name for path in overlay.of_transformers("5.0.0", tmp_path)] == ["transformers==5.0.0", "tokenizers_0.1"]
    assert installed == ["transformers==5.0.0", "tokenizers<0.1"]
    overlay.of_transformers("5.0.0", tmp_path)
    assert len(installed) == 2, "the second time all of it is there"


@pytest.mark.parametrize("importable", [True, False])
def test_optional_packages_come_along_where_they_can(pip, tmp_path, monkeypatch, importable):
    """transformers imports every release of kernels that it accepts, and some that it does not."""
    _, missing, needs = pip
    needs += ['kernels<0.1; extra == "kernels"']
    monkeypatch.setattr(overlay, "imports", lambda name, folder: importable)
    names = [path.name for path in overlay.of_transformers("5.0.0", tmp_path)]
    assert names == ["transformers==5.0.0", *["kernels_0.1"] * importable]
    missing.add("kernels<0.2")
    needs[:] = ['kernels<0.2; extra == "kernels"']
    assert [path.name for path in overlay.of_transformers("5.1.0", tmp_path)] == ["transformers==5.1.0"]


def test_a_release_that_is_not_out(pip, tmp_path):
    _, missing, _ = pip
    missing.add("transformers==5.98.0")
    record, found = matrix.one("5.98.0", "3.7.1", tmp_path, [], 1)
    assert record == {"transformers": "5.98.0", "triton": "3.7.1", "error": "transformers==5.98.0: ERROR: no such release"}
    assert found == {} and not any(path.name.startswith("transformers") for path in tmp_path.iterdir())


def test_an_older_numpy_for_an_older_triton(pip, tmp_path):
    assert [path.name for path in overlay.of_triton("3.7.1", tmp_path)] == ["triton==3.7.1"]
    names = [path.name for path in overlay.of_triton("3.6.0", tmp_path)]
    newest = tuple(map(int, metadata.version("numpy").split(".")[:2]))
    assert names == ["triton==3.6.0", *(["numpy_2.4"] if newest >= (2, 4) else [])]


def test_pairs_are_sorted_as_releases():
    assert list(overlay.pairs(["5.10.0", "5.9.0"], ["3.7.1"])) == [("5.9.0", "3.7.1"), ("5.10.0", "3.7.1")]
