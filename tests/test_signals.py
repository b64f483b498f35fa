"""A signal ends the command with one line and its exit code, whatever Python is doing, and leaves nothing half done."""

import os
import signal
import subprocess
import sys

import pytest

START = "import os, signal, time\nfrom pathlib import Path\nfrom pilon_compress.io import signals\nsignals.listen()\n"


def run(text, **more):
    return subprocess.run([sys.executable, "-c", START + text], capture_output=True, text=True, timeout=60, **more)


@pytest.mark.parametrize(
    ("name", "line"),
    [("SIGTERM", "terminated"), ("SIGINT", "interrupted"), ("SIGHUP", "terminated: the terminal is gone")],
)
def test_one_line_and_the_exit_code(name, line):
    done = run(f"os.kill(os.getpid(), signal.{name})\ntime.sleep(60)")
    assert done.returncode == 128 + getattr(signal, name) and done.stderr == line + "\n"


def test_it_is_not_lost_in_a_destructor():
    text = "class Dying:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGTERM)\n        len('a')\n"
    done = run(text + "one = Dying()\ndel one\nprint('went on')")
    assert done.returncode == 143 and done.stdout == "" and done.stderr == "terminated\n"


def test_it_waits_for_the_end_of_a_guarded_stretch(tmp_path):
    text = "with signals.guarded():\n    os.kill(os.getpid(), signal.SIGTERM)\n    Path('whole').touch()\n"
    assert run(text + "Path('beyond').touch()", cwd=tmp_path).returncode == 143
    assert os.listdir(tmp_path) == ["whole"]


def test_cleanups_run_innermost_first():
    text = "with signals.cleanup(lambda: print('outer')), signals.cleanup(lambda: print('inner')):\n"
    done = run(text + "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)")
    assert done.stdout.split() == ["inner", "outer"]


def test_a_second_signal_ends_a_cleanup_that_hangs():
    text = "def hang():\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n"
    done = run(text + "with signals.cleanup(hang):\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)")
    assert done.returncode == 143


def test_a_loop_that_watches_ends_by_itself_and_at_once_by_a_second_signal():
    text = "with signals.watched() as asked:\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    text += "    print(asked.code, flush=True)\n"
    done = run(text)
    assert done.returncode == 0 and done.stdout == "143\n"
    done = run(text + "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)")
    assert done.returncode == 130 and done.stderr == "interrupted\n"


def test_a_signal_that_was_ignored_stays_so():
    """Ignore SIGHUP, like `nohup`."""
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    text = ignoring + START + "os.kill(os.getpid(), signal.SIGHUP)\nprint('went on')"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "went on\n"


def command(*words, **streams):
    return subprocess.Popen([sys.executable, "-m", "pilon_compress.cli", *words], **streams)


def test_output_that_nobody_reads_ends_the_command_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    done = command("recipes", "show", "quickstart", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.communicate()[1] == b"" and done.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_an_error_and_behind_stderr_is_not():
    with open("/dev/full", "w") as full:
        done = command("recipes", "list", stdout=full, stderr=subprocess.PIPE)
        words = done.communicate()[1]
        assert done.returncode == 2 and words.count(b"\n") == 1 and b"no space left" in words
        done = command("recipes", "list", stdout=subprocess.PIPE, stderr=full)
        assert done.communicate()[0] and done.returncode == 0
