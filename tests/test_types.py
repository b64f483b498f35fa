"""Check with mypy, on a script as a user would write it, that right calls of the library pass and wrong ones do not."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """\
import pilon_compress as pc

config = pc.ConvertConfig(ffn_ratio=0.5, effort="fast")
model, report = pc.compress("gpt2", config=config, calibration=["a text", "another"])
reveal_type(model)
reveal_type(report)
reveal_type(report.ffn.stored_ratio)
reveal_type(pc.load("out"))
pc.save(model, "out")
pc.compress(1, 2, nonsense=True)
pc.ConvertConfig(ffn_ration=0.5)
report.ffn.stored_ration
"""


def test_a_users_script_is_checked(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--config-file", ROOT / "pyproject.toml"]
    done = subprocess.run([*command, tmp_path / "script.py"], cwd=ROOT, capture_output=True, text=True)
    said = re.findall(r"script\.py:(\d+): (note|error): (.*)", done.stdout)
    revealed = {int(line): text for line, kind, text in said if kind == "note"}
    assert "PreTrainedModel" in revealed[5] or "Any" in revealed[5], "transformers itself is not followed"
    assert "pilon_compress.results.conversion.Report" in revealed[6]
    assert "float" in revealed[7]
    assert 8 in revealed
    assert {int(line) for line, kind, _ in said if kind == "error"} == {10, 11, 12}, done.stdout
