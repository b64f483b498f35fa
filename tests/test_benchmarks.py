"""The GPU measurements run from a bare checkout, every arm of them, before anybody takes them to a GPU."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUEUE = (ROOT / "benchmarks/gpu.md").read_text()
LOOP = "import json, sys, train\nfor arm in json.loads(sys.argv[1]): train.main([arm, f'out/{arm}', '--smoke'])"


def test_every_row_of_the_queue_runs_without_an_install(tmp_path):
    rows = re.findall(r"^\|[^|]*\| `(\S+) (out/\S+)[^`]*` \|", QUEUE, re.MULTILINE)
    arms = sorted({arm for arm, _ in rows})
    assert len(rows) >= 8 and len({output for _, output in rows}) == len(rows)
    paths = (ROOT, ROOT / "benchmarks", sysconfig.get_path("purelib"))  # plain paths: no editable install is active
    done = subprocess.run(
        [sys.executable, "-S", "-c", LOOP, json.dumps(arms)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result["arm"] for result in results] == arms
    assert all(result["validation perplexity"] < 512 for result in results)
    assert all((result["FFN stored ÷ dense"] == 1) == (result["arm"] == "dense") for result in results)
