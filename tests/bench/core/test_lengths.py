"""The fill axis: lengths with the mean that was asked for, and the user's own."""

import pytest

from bench.core import lengths
from bench.core.lengths import Lengths


@pytest.mark.parametrize("fill", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize(("batch", "seqlen"), [(32, 512), (8, 2048), (128, 128)])
def test_mean_is_the_fill(batch, seqlen, fill):
    drawn = Lengths().of_batch(batch, seqlen, fill)
    assert len(drawn) == batch and min(drawn) >= 1 and max(drawn) <= seqlen
    assert sum(drawn) / (batch * seqlen) == pytest.approx(fill, abs=1 / seqlen)
    assert len(set(drawn)) > batch // 4, "all of one length is no distribution"


def test_full_rows_are_full():
    assert Lengths().of_batch(3, 64, 1.0) == [64] * 3


def test_lengths_of_a_file(tmp_path):
    file = tmp_path / "lengths.txt"
    file.write_text("10\n\n600\n20\n30\n")
    read = lengths.from_file(file)
    assert read.of_batch(4, 512, 0.5) == [10, 20, 30, 512]
    assert read.fill_of(4, 512, 0.5) == 572 / 2048


@pytest.mark.parametrize(
    ("content", "said"), [("", "is empty"), ("12\nx\n", "line 2: expected a number"), ("0\n", "line 1: expected")]
)
def test_a_bad_file_is_one_line(tmp_path, content, said):
    file = tmp_path / "lengths.txt"
    file.write_text(content)
    with pytest.raises(lengths.LengthsError, match=said) as error:
        lengths.from_file(file)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(lengths.LengthsError, match="cannot read"):
        lengths.from_file(tmp_path / "none")


def test_lengths_of_a_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one two three\none two three four five six\n")
    short, long = lengths.from_text(file, None).sizes
    assert (short, long) == (5, 8)  # with [CLS] and [SEP]
