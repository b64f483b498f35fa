"""Check the settings that a conversion derives before it reads a weight: the amount of calibration text."""

import pytest

from pilon_compress.config import conversion
from pilon_compress.convert.prepare import prepare


@pytest.fixture
def samples(tiny, tmp_path):
    """Calibration sequences of a tiny model with so many inner neurons, by effort: from its config alone."""

    def samples(family, inner, **asked):
        config = tiny.tiny_model(family).config
        setattr(config, "n_inner" if family == "gpt2" else "intermediate_size", inner)
        config.architectures = [type(tiny.tiny_model(family)).__name__]
        config.save_pretrained(tmp_path / "model")
        return prepare(conversion.build({"model": str(tmp_path / "model"), **asked})).calibration

    return samples


def test_a_wider_language_model_is_calibrated_on_more_text(samples):
    narrow, wide = samples("gpt2", 128), samples("gpt2", 12288)
    assert narrow.samples == 32 and wide.sequence_length == narrow.sequence_length
    assert 8 * 12288 <= wide.samples * wide.sequence_length < 9 * 12288


def test_effort_buys_calibration_text(samples):
    by_effort = [samples("gpt2", 12288, effort=effort).samples for effort in ("fast", "balanced", "best")]
    assert by_effort[0] < by_effort[1] < by_effort[2]
    assert [samples("bert", 12288, effort=e).samples for e in ("fast", "balanced", "best")] == [256, 800, 1600]


def test_what_is_asked_for_wins(samples):
    asked = {"samples": 5, "sequence_length": 16, "batch_size": 4}
    found = samples("gpt2", 12288, calibration=asked)
    assert (found.samples, found.sequence_length, found.batch_size) == (5, 16, 4)
