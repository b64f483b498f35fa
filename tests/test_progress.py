"""Progress: one line for a whole command, live or now and then, which no stderr can break."""

import io
import logging
import os
import re
import subprocess
import sys
import time

import pytest

from pilon_compress.io import messages, progress, progress_line


@pytest.fixture(autouse=True)
def switched_on():
    """Switch progress on, like the command line."""
    with progress.visible(True):
        yield


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Broken(io.StringIO):
    """A stderr that is full, closed, or a terminal that is gone."""

    def __init__(self, error, tty=False):
        super().__init__()
        self.error, self.tty = error, tty

    def isatty(self):
        return self.tty

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when `clock.sleep` is called."""

    class Clock:
        now = 0.0

        def sleep(self, seconds):
            self.now += seconds

    made = Clock()
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: made.now)
    return made


def run(sizes, clock, seconds):
    """Run loops named and sized as `sizes` in which every item takes `seconds`; yield after every item."""
    for name, size in sizes:
        for _ in progress.track(range(size), name):
            clock.sleep(seconds)
            yield


def test_track_gives_the_items_and_is_silent_for_a_short_loop_without_terminal(capfd):
    assert list(progress.track([3, 4], "a")) == [3, 4]
    assert list(progress.track(iter("ab"), "a", total=2)) == ["a", "b"]
    assert list(progress.track([], "a")) == []
    assert capfd.readouterr() == ("", "")


def test_one_position_for_a_whole_command(clock):
    positions, left = [], []
    with progress.stages([("calibrating", 10), ("sizing", 30), ("converting", 60)]) as line:
        assert "0%" in line.describe() and "ETA -:--" in line.describe()
        for _ in run([("calibrating, forward", 5), ("sizing layers", 6), ("converting layers", 6)], clock, 1):
            positions.append(line.position)
            left.append(line.remaining)
            if len(positions) == 6:
                assert "sizing layers 0/6" in line.describe(), "the count is that of items that are done"
    assert positions == sorted(positions) and positions[4] == 8 and positions[5] == 10 and positions[10] == 35
    assert line.position == 100 and line.remaining == 0


@pytest.mark.parametrize("unit", [1, 1e12])
def test_eta_follows_the_speed_that_is_measured(clock, unit):
    """The unit of the weights does not matter."""
    with progress.stages([("a", 30 * unit), ("b", 60 * unit)]) as line:
        left = [line.remaining for _ in run([("a", 10)], clock, 20)]
        assert left[1:] == pytest.approx([(30 / i - 1) * 20 * (i + 1) for i in range(1, 10)])
        assert line.remaining == pytest.approx(400)
        for _ in run([("b", 10)], clock, 2):
            pass
        assert line.remaining == 0


def test_stages_may_be_left_out_repeated_and_joined_by_others(clock):
    with progress.stages([("a", 10), ("b", 10), ("c", 10), ("c", 10), ("saving", 10)]) as line:
        seen = [line.position for _ in run([("b", 2), ("unforeseen", 3), ("c", 2), ("c", 2)], clock, 1)]
        assert seen == [10, 15, 20, 20, 20, 20, 25, 30, 35], "a counts as done, the unforeseen moves nothing"
        line.enter("saving")
        assert line.position == 40 and "saving" in line.describe()


def test_a_loop_within_a_loop_moves_its_item_and_a_command_within_a_command_nothing_else(clock):
    with progress.stages([("layers", 100)]) as line:
        seen = []
        for _ in progress.track(range(2), "layers"):
            with progress.stages([("inner", 5)]) as inner:
                assert inner is line
                for _ in run([("inner", 5)], clock, 1):
                    seen.append(round(line.position))
                    assert "layers" in line.describe() and "inner" in line.describe()
        assert seen == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90] and line.position == 100


def test_checks_are_called_before_every_item_and_may_end_the_loop(monkeypatch):
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress, "CHECKS", [check])
    done = []
    with pytest.raises(KeyboardInterrupt):
        done.extend(progress.track(range(9), "a"))
    assert len(calls) == 3 and progress._current == []
    with pytest.raises(KeyboardInterrupt), progress.stages([("a", 1)]):
        calls.clear()
        for item in progress.track(range(9), "a"):
            done.append(item)
    assert done[-2:] == [0, 1] and progress._current == []


def test_plain_lines_come_now_and_then_even_while_one_item_takes_long(monkeypatch, capfd):
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    with progress.stages([("a", 1), ("b", 1)]):
        for _ in progress.track(range(4), "a"):
            time.sleep(0.15)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) > 4
    assert re.fullmatch(r"0%  a 0/4  0:00 elapsed, ETA -:--", lines[0]), lines[0]
    assert any("a 3/4" in line for line in lines)
    with progress.stages([("a", 1)], quiet=True):
        list(progress.track(range(4), "a"))
    for _ in progress.track(iter(range(3)), "without a length"):
        time.sleep(0.1)
    assert "%" not in capfd.readouterr().err.splitlines()[-1]
    monkeypatch.setenv("RANK", "1")
    for _ in progress.track(range(2), "another process"):
        time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_a_terminal_has_one_line_for_all_phases(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with progress.stages([("a", 1), ("b", 3)]) as line:
        for name in "ab":
            for _ in progress.track(range(3), f"{name} [layers]"):
                line.bar.refresh()
        progress.say("a [note] that stays")
    shown = screen.getvalue()
    assert "a [layers] 1/3" in shown and "b [layers] 2/3" in shown and "ETA" in shown
    assert "a [note] that stays\n" in shown
    longest = max(frame.count("elapsed") for frame in shown.split("\r"))
    assert longest == 1, "never two lines at once"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("I/O operation on closed file")])
def test_a_stderr_that_takes_nothing_ends_nothing(monkeypatch, error):
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    for stream in (Broken(error), Broken(error, tty=True), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.stages([("a", 1)]) as line:
            for _ in progress.track(range(3), "a"):
                time.sleep(0.02)
                progress.say("a line")
                if line.bar is not None:
                    line.bar.refresh()
        assert line.position == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_a_process_whose_stderr_is_full_or_closed_ends_well(redirection):
    code = (
        "import time; from pilon_compress.io import messages, progress\n"
        "progress.INTERVAL = 0.01; progress.switch_on(); messages.show(progress.say); messages.note('lost')\n"
        "for i in progress.track(range(3), 'a'): time.sleep(0.02)\n"
        "print('done')"
    )
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, code], capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_notes_are_said_once_and_wait_where_an_error_may_follow(monkeypatch, capfd):
    monkeypatch.setattr(messages, "_noted", set())
    shown = messages.show(progress.say)
    messages.note("first")
    messages.note("first")
    assert capfd.readouterr().err == "first\n"
    shown = messages.show(progress.say, hold=True)
    messages.note("second")
    assert capfd.readouterr().err == ""
    messages.release_notes()
    messages.note("third")
    assert capfd.readouterr().err == "second\nthird\n"
    logging.getLogger("pilon_compress").removeHandler(shown)


def test_nothing_is_shown_until_it_is_switched_on(monkeypatch, capfd):
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    with progress.visible(False), progress.stages([("a", 1)]) as line:
        for _ in progress.track(range(3), "a"):
            time.sleep(0.05)
    assert line.position == 1 and capfd.readouterr() == ("", "")


def test_notes_reach_the_user_of_a_command(cli, tiny, tmp_path):
    tiny.save_tiny("llama", tmp_path / "dense")
    rows = '{"text": null}\n' + "".join(f'{{"text": "Text {i} of an ordinary kind."}}\n' for i in range(50))
    (tmp_path / "t.jsonl").write_text(rows)
    done = cli("eval", "dense", "--data", "t.jsonl", "--samples", 2, "--window", 32, "--json", cwd=tmp_path)
    assert done.stderr == "t.jsonl: 1 of 51 rows hold no text in column 'text' and were skipped\n"
    refused = cli("eval", "dense", "--data", "t.jsonl", "--window", 999, cwd=tmp_path, code=2)
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
