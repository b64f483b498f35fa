"""A conversion that is killed and started again ends with the file that it would have written undisturbed."""

import signal
import time

import pytest

PROSE = "\n\n".join(
    f"Paragraph {chr(97 + i % 26)}{chr(97 + i // 26)} tells of {'many ' * (i % 5)}things that it names."
    for i in range(80)
)
WORDS = ("--calibration", "text.txt", "--samples", "24", "--sequence-length", "64", "--ffn-ratio", "0.5", "--json")
STREAMED = ("--max-memory", "0.0004")  # GiB: less than twice the tiny model


@pytest.fixture(scope="module")
def start(cli):
    """`start(folder, output, *words)` starts a conversion there."""
    return lambda folder, output, *words: cli.start("convert", "dense", "-o", output, *WORDS, *words, cwd=folder)


@pytest.fixture(scope="module")
def convert(start):
    """Run the command to its end and return its output."""
    return lambda *words: start(*words).end().stdout


def kill_when(process, path):
    """SIGKILL as soon as `path` is there."""
    while not path.exists():
        assert process.poll() is None, process.end()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.end(-signal.SIGKILL)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def plain(convert, tiny, tmp_path_factory):
    """A folder with a dense model, its text, and `whole`: the conversion that nothing disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    tiny.save_tiny("llama", folder / "dense", num_hidden_layers=6, intermediate_size=96)
    (folder / "text.txt").write_text(PROSE)
    convert(folder, "whole", "--eval-data", "none")
    return folder


@pytest.mark.parametrize("words", [(), STREAMED], ids=["whole", "streamed"])
def test_killed_again_and_again_and_resumed_is_never_killed(start, plain, words):
    output = f"killed{len(words)}"
    partial = plain / f".{output}.partial"
    for point in ("moments", "reference/0.0", "layer.4") if words else ("allocation", "layer.4"):
        kill_when(start(plain, output, "--eval-data", "none", *words), partial / f"{point}.safetensors")
    finished = (partial / "layer.1.safetensors").stat().st_mtime_ns
    (partial / "layer.4.safetensors").write_bytes(b"half")  # as a full disk may leave it
    stale = plain / f".{output}.0123abcd.part"
    stale.mkdir()
    process = start(plain, output, "--eval-data", "none", *words)
    while (partial / "layer.1.safetensors").exists():
        assert (partial / "layer.1.safetensors").stat().st_mtime_ns == finished, "computed again"
        time.sleep(0.02)
    process.end()
    assert weights(plain / output) == weights(plain / "whole")
    assert not partial.exists() and not stale.exists()


def test_other_options_start_afresh(start, convert, plain):
    kill_when(
        start(plain, "changed", "--eval-data", "none", "--seed", "7"), plain / ".changed.partial/layer.4.safetensors"
    )
    convert(plain, "changed", "--eval-data", "none", "--seed", "0")
    assert weights(plain / "changed") == weights(plain / "whole")


def test_what_does_not_fit_is_said(start, convert, plain):
    report = convert(plain, "unscored", "--eval-data", "text.txt", *STREAMED)
    assert '"evaluation": null' in report and "both models in memory take" in report
    err = start(plain, "refined", "--refine", "5", *STREAMED).end(2).stderr
    assert err.count("\n") == 1 and "--max-memory" in err
