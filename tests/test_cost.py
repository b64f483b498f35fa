"""The stages of a conversion: its phases in the order in which they come, so that one line can follow them."""

import pytest

from pilon_compress.config import conversion
from pilon_compress.convert.cost import stages
from pilon_compress.convert.pipeline import convert
from pilon_compress.convert.prepare import prepare
from pilon_compress.io import progress


@pytest.mark.parametrize(
    ("family", "fields"),
    [("llama", {}), ("bert", {"refine": {"steps": 3}}), ("llama", {"budget": {"share": "auto"}})],
)
def test_every_phase_of_a_conversion_moves_the_position_to_its_end(tiny, tmp_path, monkeypatch, family, fields):
    tiny.save_tiny(family, tmp_path / "dense")
    prose = "Paragraph {} is long enough to be one, and it says nothing that anybody would want to read, twice or once."
    (tmp_path / "t.txt").write_text("\n\n".join(prose.format(i) for i in range(90)))
    calibration = {"data": str(tmp_path / "t.txt"), "samples": 8, "sequence_length": 32, "batch_size": 4}
    asked = {"model": str(tmp_path / "dense"), "calibration": calibration, **fields}
    settings = conversion.build(asked, ["budget.ffn_ratio=0.6"])
    begun, positions = [], []
    begin = progress.Line.begin

    def follow(line, phase):
        outer = not line.phases
        begin(line, phase)
        if outer:
            begun.append(phase.description)
            assert phase.description.startswith(line.weights[line.stage][0]), "a stage has the phase's name"
        positions.append(line.position)

    monkeypatch.setattr(progress.Line, "begin", follow)
    with progress.stages(stages(prepare(settings)), quiet=True) as line:
        convert(settings, tmp_path / "out")
        assert line.position == pytest.approx(line.total)
    assert positions == sorted(positions) and "converting layers" in begun
