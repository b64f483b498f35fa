"""A folder appears whole or not at all, and never in the place of something that must stay."""

import pytest

from pilon_compress.errors import BadInput
from pilon_compress.io.folders import check_output, fresh_folder


def model_folder(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_folder_appears_at_the_end(tmp_path):
    out = tmp_path / "new" / "out"
    with fresh_folder(out) as work:
        (work / "a").write_text("1")
        assert not out.exists()
    assert names(out) == ["a"] and names(tmp_path / "new") == ["out"]
    with pytest.raises(BadInput, match="not empty"), fresh_folder(out):
        pass


def test_a_failure_leaves_nothing_not_even_parents(tmp_path):
    with pytest.raises(ZeroDivisionError), fresh_folder(tmp_path / "new" / "deep" / "out") as work:
        (work / "a").write_text("1")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_overwriting_replaces_the_whole_and_a_failure_keeps_the_old(tmp_path):
    out = model_folder(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), fresh_folder(out, overwrite=True):
        raise ZeroDivisionError
    assert names(out) == ["config.json"] and names(tmp_path) == ["out"]
    with fresh_folder(out, overwrite=True) as work:
        (work / "b").write_text("2")
    assert names(out) == ["b"] and names(tmp_path) == ["out"]


def test_what_could_not_be_replaced_is_refused_before_any_work(tmp_path, monkeypatch):
    """A link, a mount point, the folder one stands in: the rename at the very end would fail, or pull the rug."""
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there", target_is_directory=True)
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "there")
    here = tmp_path / "there"
    refusals = [("/proc", "mount point"), (tmp_path / "link", "a link"), (".", "you are in"), (here, "you are in")]
    refusals += [(tmp_path / "file", "is a file"), (tmp_path / "file" / "out", "cannot write to")]
    for path, reason in refusals:
        with pytest.raises(BadInput, match=reason):
            check_output(type(tmp_path)(path), overwrite=True)
    check_output(here / "inside", overwrite=False)


def test_the_source_is_never_given_up(tmp_path):
    source = model_folder(tmp_path / "a" / "source")
    (tmp_path / "a" / "config.json").write_text("{}")
    for path in (source, tmp_path / "a"):
        with pytest.raises(BadInput, match="holds the model that is read"):
            check_output(path, True, str(source))
    check_output(model_folder(tmp_path / "other"), True, str(source))
    check_output(source / "pilon", False, str(source))
