"""Finished cells survive a crash at any moment, and are not mistaken for those of another comparison."""

import pytest

from pilon_compress.io.result_log import ResultLog

FIRST = {"method": "svd", "quality": {"cosine": 0.1 + 0.2, "data": "Übung\n"}}
SECOND = {"method": "asvd", "quality": {"cosine": 1e-300}}


@pytest.fixture
def output(tmp_path):
    """Return the output path of a comparison with two finished cells."""
    cells = ResultLog(tmp_path / "deep" / "out", "same")
    cells.keep("svd 0.6", FIRST)
    cells.keep("asvd 0.6", SECOND)
    return tmp_path / "deep" / "out"


def test_the_same_comparison_finds_its_cells_to_the_last_digit(output):
    assert ResultLog(output, "same").found == {"svd 0.6": FIRST, "asvd 0.6": SECOND}
    assert not output.exists(), "they are kept beside the output, which must stay new"


@pytest.mark.parametrize("lost", [1, 2, 20])
def test_a_line_that_was_cut_short_is_measured_again(output, lost):
    file = ResultLog(output, "same").file
    file.write_bytes(file.read_bytes()[:-lost])
    cells = ResultLog(output, "same")
    assert cells.found["svd 0.6"] == FIRST
    assert cells.found.get("asvd 0.6") in (None, SECOND), "whole or not at all"
    cells.keep("nystrom 0.6", SECOND)
    again = ResultLog(output, "same").found
    assert again == {**cells.found, "nystrom 0.6": SECOND}, "what follows the cut is not lost with it"


def test_what_a_full_disk_or_a_power_cut_leaves_is_no_cell(output):
    file = ResultLog(output, "same").file
    for rubbish in (b"\0" * 40, b"\xff\xfe", b"7\n", b'{"key": "svd 0.4"}\n', b"[]\n"):
        whole = file.read_bytes()
        file.write_bytes(whole + rubbish)
        assert ResultLog(output, "same").found == {"svd 0.6": FIRST, "asvd 0.6": SECOND}, rubbish
        assert file.read_bytes() == whole, rubbish


def test_another_comparison_starts_afresh(output):
    other = ResultLog(output, "changed")
    assert other.found == {}
    other.keep("svd 0.6", SECOND)
    assert ResultLog(output, "changed").found == {"svd 0.6": SECOND}
    assert ResultLog(output, "same").found == {}, "and the first one does not get the other's cells"


def test_cells_whose_fingerprint_was_not_written_are_dropped(output):
    ResultLog(output, "same").mark.unlink()
    assert ResultLog(output, "same").found == {}


def test_outputs_side_by_side_do_not_share_cells(output):
    assert ResultLog(output.with_name("out2"), "same").found == {}
    assert len(ResultLog(output, "same").found) == 2


def test_removing_leaves_nothing(output):
    ResultLog(output, "same").remove()
    assert list(output.parent.iterdir()) == []
