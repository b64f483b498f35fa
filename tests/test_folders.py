"""A folder appears whole or not at all, and never in the place of something that must stay."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from pilon_compress.errors import BadInput
from pilon_compress.io.folders import fresh_folder, open_output, partial_folder, put_back, set_aside
from pilon_compress.io.journal import claim
from pilon_compress.io.output_paths import check_file, check_output


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


@pytest.mark.parametrize(
    "name",
    ["", "a\0b", "n" * 250, "/proc/x", "/sys/x", "~no-such-user/x", "bad\udcff", "d/" * 2100 + "x", "m" * 300 + "/x"],
)
def test_a_name_that_no_folder_can_have_is_refused_and_nothing_is_made(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for attempt in (lambda: check_output(name, False), lambda: open_output(name).__enter__()):
        with pytest.raises(BadInput) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_the_home_folder_and_dots_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with fresh_folder("~/a/../x y ") as work:
        (work / "b").write_text("1")
    assert names(tmp_path) == ["x y "]


def run(statement, *, cwd):
    """Run a statement that may use `folders` in a process of its own, which is `started` once it prints a line."""
    text = f"import os, signal, time\nfrom pilon_compress.io import folders\n{statement}"
    return subprocess.Popen(
        [sys.executable, "-c", text], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_second_process_is_refused_until_the_first_is_gone_even_by_a_kill(tmp_path):
    first = run("with folders.open_output('out'):\n    print('in', flush=True)\n    time.sleep(60)", cwd=tmp_path)
    assert first.stdout.readline() == "in\n"
    for path in (tmp_path / "out", tmp_path / "other" / ".." / "out"):
        with pytest.raises(BadInput, match=f"another pilon-compress .process {first.pid}"), open_output(path):
            pass
    first.kill()
    first.communicate()
    with open_output(tmp_path / "out"), open_output(tmp_path / "out"):  # a process may open its own again
        pass
    assert names(tmp_path) == []


def test_another_thread_is_another_writer(tmp_path):
    def second():
        with pytest.raises(BadInput, match="another pilon-compress"), open_output(tmp_path / "out"):
            pass

    with open_output(tmp_path / "out"), ThreadPoolExecutor() as pool:
        pool.submit(second).result()


KILLED = """
import pathlib
left = {point}
def deadly(function):
    def call(*words, **more):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*words, **more)
    return call
for name in ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink", "open"):
    setattr(os, name, deadly(getattr(os, name)))
with folders.fresh_folder("out", overwrite=True) as work:
    (work / "config.json").write_text("new")
    (work / "model.safetensors").write_text("new")
"""


def test_a_kill_anywhere_while_a_model_is_replaced_loses_neither_and_leaves_nothing(tmp_path):
    """From before the first rename to behind the last deletion; the next command with that output puts things right."""
    killed = 0
    for point in range(1, 100, 3):
        folder = tmp_path / str(point)
        model_folder(folder / "out")
        ended = run(KILLED.format(point=point), cwd=folder)
        ended.communicate()
        if ended.returncode == 0:
            break
        killed += 1
        with pytest.raises(BadInput, match="not empty"), open_output(folder / "out"):
            pass
        assert names(folder) == ["out"], point
        assert (folder / "out" / "config.json").read_text() in ("{}", "new")
        with fresh_folder(folder / "out", overwrite=True) as work:
            (work / "config.json").write_text("newer")
        assert names(folder) == ["out"] and names(folder / "out") == ["config.json", "manifest.json"]
    assert killed > 6 and ended.returncode == 0


@pytest.mark.parametrize("own", [True, False])
def test_the_journal_of_a_finished_output_goes_and_no_other(tmp_path, own):
    claim(partial_folder(tmp_path / "out"), "mark")
    with fresh_folder(tmp_path / "out") as work:
        (work / "config.json").write_text("{}")
    if not own:
        claim(partial_folder(tmp_path / "out"), "mark")  # of a new conversion, with the same settings
    with pytest.raises(BadInput, match="not empty"), open_output(tmp_path / "out"):
        pass
    assert names(tmp_path) == (["out"] if own else [".out.partial", "out"])


def test_what_is_set_aside_comes_back(tmp_path):
    out = model_folder(tmp_path / "out")
    set_aside(out)
    (out / "half").mkdir(parents=True)
    put_back(out)
    assert names(tmp_path) == ["out"] and names(out) == ["config.json"]


def test_a_file_to_write_is_checked_before_the_work(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "a.svg", "/proc/a.svg"):
        with pytest.raises(BadInput):
            check_file(path)
    assert check_file(tmp_path / "a.svg") == tmp_path / "a.svg" and names(tmp_path) == []
