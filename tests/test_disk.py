"""Files and folders that are made beside their place: whole under their name, or as if nothing had happened."""

import signal
import subprocess
import sys

import pytest

from pilon_compress.io import manifest
from pilon_compress.io.checksum import MANIFEST, damage
from pilon_compress.io.disk import atomic_file, atomic_folder, move_into, part_of

KILLED = """
import os, signal, sys
from pathlib import Path
from pilon_compress.io import signals
from pilon_compress.io.disk import atomic_file, atomic_folder
signals.listen()
place, number = Path(sys.argv[1]), int(sys.argv[3])
with (atomic_folder if sys.argv[2] == "folder" else atomic_file)(place) as work:
    (work / "half" if sys.argv[2] == "folder" else work).write_text("half")
    os.kill(os.getpid(), number)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_file(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]
    with atomic_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    place = tmp_path / "here"
    place.mkdir()
    (place / "old").write_text("old")
    with pytest.raises(KeyError), atomic_folder(place) as work:
        (work / "half").write_text("half")
        raise KeyError
    assert names(place) == ["old"] and names(tmp_path) == ["here"]
    with atomic_folder(place, manifest.write) as work:
        (work / "new").write_text("new")
        assert names(place) == ["old"]
    assert names(place) == [MANIFEST, "new"] and names(tmp_path) == ["here"]
    assert damage(place) is None


def test_a_folder_whose_last_touch_fails_is_not_made(tmp_path):
    def refuse(_folder):
        raise OSError("no")

    with pytest.raises(OSError, match="no"), atomic_folder(tmp_path / "here", refuse) as work:
        (work / "new").write_text("new")
    assert names(tmp_path) == []


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_process_that_ends_midway_leaves_nothing_in_the_way(tmp_path, what, number):
    place = tmp_path / "place"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(place), what, str(int(number))], capture_output=True)
    assert ended.returncode in (-number, 128 + number) and not place.exists()
    if number == signal.SIGTERM:
        assert names(tmp_path) == [], "a signal that can be handled cleans up"
    with (atomic_folder if what == "folder" else atomic_file)(place) as work:
        assert what == "file" or not list(work.iterdir())
        (work / "new" if what == "folder" else work).write_text("new")
    assert names(tmp_path) == ["place"]
    assert (place / "new" if what == "folder" else place).read_text() == "new"
    assert not part_of(place).exists()


def test_files_move_into_a_folder_in_use_and_the_telling_one_comes_last(tmp_path, monkeypatch):
    work, folder = tmp_path / "work", tmp_path / "folder"
    for place in (work, folder):
        (place / "inner").mkdir(parents=True)
        for name in ("config.json", "zz.txt", f"inner/{place.name}"):
            (place / name).write_text(place.name)
    (folder / "log.jsonl").write_text("mine")
    moved = []
    replace = type(work).replace
    monkeypatch.setattr(type(work), "replace", lambda path, to: (moved.append(path.name), replace(path, to))[1])
    move_into(work, folder, "config.json")
    assert moved[-1] == "config.json" and set(moved) == {"config.json", "zz.txt", "inner"}
    assert not work.exists() and names(folder) == ["config.json", "inner", "log.jsonl", "zz.txt"]
    assert names(folder / "inner") == ["work"] and (folder / "config.json").read_text() == "work"
