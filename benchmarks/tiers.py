"""Measure tiered banks: peak memory and time against the resident model, in inference and in training, and quality.

    python benchmarks/tiers.py [--shares 0.5 0.25 0.1] [--smoke] [--parts inference limit training quality]

Models are made here, of random weights: memory and time do not depend on their values. Every run is a process of its
own; peak memory is what the kernel saw of it (VmHWM) less what it had before the model was loaded. Rows go to
docs/results/tiers.json.

    inference   read 128 tokens, decode 16, of bfloat16 files in float32
    limit       the same in a control group with less memory than the banks have (as root)
    training    five steps of AdamW
    quality     the recipe `smoke`, banks shared: all primitives, a share of them hot, and banks half as large
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "tiers.json"
BARE = 200  # megabytes of a process that has loaded nothing, beside pages of libraries that others count
INFERENCE = """
import json, sys, time
import torch
from pilon_compress.models import checkpoint

def seen(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

folder, share = sys.argv[1], float(sys.argv[2])
torch.set_num_threads(1)
checkpoint.load_config(folder)
before = seen("VmHWM")
model = checkpoint.load_model(folder, "float32", n_hot=share if share < 1 else None)
ids = torch.randint(6, 200, (1, 128), generator=torch.Generator().manual_seed(0))
times = []
with torch.inference_mode():
    for turn in range(4):
        started = time.perf_counter()
        logits = model(ids).logits
        read = time.perf_counter() - started
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=17, min_new_tokens=17, do_sample=False)
        times.append((read, (time.perf_counter() - started - read) / 16))
read, decode = (sorted(column)[1] for column in zip(*times))
print(json.dumps({"mb": seen("VmHWM") - before, "read": read, "decode": decode, "sum": float(logits.double().sum())}))
"""

TRAINING = """
import json, sys, time
from pathlib import Path
import torch
from pilon_compress.config.model import FfnConfig, HostConfig
from pilon_compress.config.tiers import TrainingTier
from pilon_compress.config.training_sections import Optimizer
from pilon_compress.models import base_architectures, checkpoint, layouts
from pilon_compress.models.families import find_sites
from pilon_compress.optimize.optimizers import make_optimizers
from pilon_compress.train.promotion import Promotion, begin_tiers

def seen(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

folder, share, width = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
before, anonymous = seen("VmRSS"), seen("RssAnon")
host = HostConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=8, vocab_size=512)
config = base_architectures.config_for(host, 64, 0)
asked = FfnConfig(share="always", ffn_ratio=0.5, mac_ratio=1.0)
layout = layouts.layout_for(find_sites(checkpoint.empty_model(config)), asked)
model = base_architectures.build_with(config, layout, 0).train()
banks = sum(p.numel() * 4 for name, p in model.named_parameters() if "pilon_banks" in name)
if share < 1:
    begin_tiers(model, share, folder / "tables")
optimizers = make_optimizers(model, Optimizer())
tier = TrainingTier(n_hot=min(share, 0.5), every=2)
promotions = [] if share == 1 else [Promotion(model, optimizers, tier, folder / "states")]
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
times, own = [], 0.0
for step in range(5):
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(step))
    started = time.perf_counter()
    model(ids, labels=ids).loss.backward()
    own = max(own, seen("RssAnon"))
    for promotion in promotions:
        promotion.before(step, 0.0)
        with promotion.around():
            for optimizer in optimizers:
                optimizer.step()
    for optimizer in () if promotions else optimizers:
        optimizer.step()
    own = max(own, seen("RssAnon"))
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    times.append(time.perf_counter() - started)
found = {"mb": seen("VmHWM") - before, "anonymous_mb": own - anonymous, "seconds": sorted(times)[2]}
print(json.dumps({**found, "banks_mb": round(banks / 2**20, 1)}))
"""


def large(folder: Path, smoke: bool) -> int:
    """Save a Llama of 8 layers whose banks are most of it, two layers to a bank; return the banks' bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pilon_compress.export.save import save_model
    from pilon_compress.models.base_architectures import train_tokenizer
    from pilon_compress.models.families import find_sites
    from pilon_compress.nn.init import initialise
    from pilon_compress.nn.install import install
    from pilon_compress.nn.layout import Layout
    from pilon_compress.nn.specs import BankSpec, ProjectionSpec

    width, count = (64, 16) if smoke else (512, 256)
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **shape))
    sites = find_sites(model)
    banks = {f"band{site.layer // 2}.{site.role}": BankSpec(site.d_in, site.d_out, count, 16) for site in sites}
    users = {site.name: ProjectionSpec(f"band{site.layer // 2}.{site.role}", count // 8, site.bias) for site in sites}
    install(model, Layout(banks, users))
    initialise(model, 0.02, torch.Generator().manual_seed(0))
    for place, layer in enumerate(part for part in model.modules() if hasattr(part, "selected")):
        generator = torch.Generator().manual_seed(place)
        layer.selected.copy_(torch.randperm(count, generator=generator)[: count // 8])
    text = [f"line {number} of a text for a tokenizer" for number in range(200)]
    save_model(model, train_tokenizer(text, 300), folder, torch.bfloat16)
    return sum(4 * (spec.d_in + spec.d_out) * spec.rank * spec.n_primitives for spec in banks.values())


def run(folder: Path, share: float, group: Path | None = None) -> dict[str, Any]:
    """Run a model in a process of its own, in a control group; {"failed": how} where its memory is too small."""
    words = [sys.executable, "-c", INFERENCE, str(folder), str(share)]
    if group is not None:
        words = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *words]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def memory_group(megabytes: float) -> Path:
    """Make a control group (version 1 or 2) of that much memory, page cache included. Exits where it may not."""
    for root, key in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")):
        group = root / f"tiers-{os.getpid()}"
        try:
            group.mkdir()
            (group / key).write_text(str(round(megabytes * 2**20)))
        except OSError:
            continue
        return group
    sys.exit("a control group of limited memory cannot be made here: run as root, or leave out the part `limit`")


def in_turns(asked: argparse.Namespace, once: Callable[[float], dict[str, Any]]) -> dict[float, list[dict[str, Any]]]:
    """Return what `once` gives for every share, in as many rounds as are asked for; the resident model comes first."""
    found: dict[float, list[dict[str, Any]]] = {share: [] for share in (1.0, *asked.shares)}
    for _ in range(asked.rounds):
        for share, runs in found.items():
            runs.append(once(share))
    return found


def compared(found: dict[float, list[dict[str, Any]]], own: Sequence[str], over: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each share: medians of `own`; median, lowest and highest of `over` ÷ the resident model."""
    rows = []
    for share, runs in found.items():
        spread = {}
        for part in over:
            ratios = [one[part] / resident[part] for one, resident in zip(runs, found[1.0], strict=True)]
            spread[part] = [round(float(value), 3) for value in (median(ratios), min(ratios), max(ratios))]
        medians = {part: round(median(one[part] for one in runs), 1) for part in own}
        rows.append({"n_hot": share, **medians, "over_resident": spread})
    return rows


def inference(folder: Path, bank_bytes: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Rows of every share, in turns with the resident model."""
    found = in_turns(asked, lambda share: run(folder, share))
    assert len({one["sum"] for runs in found.values() for one in runs}) == 1, "logits differ"
    return {"banks_mb": round(bank_bytes / 2**20, 1), "rows": compared(found, ["mb"], ["mb", "read", "decode"])}


def limit(folder: Path, bank_bytes: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Run resident and in tiers with less memory than the banks have, and what the process has without a model."""
    banks_mb = bank_bytes / 2**20
    most = BARE + (40 if asked.smoke else 0.6 * banks_mb)
    rows = []
    for share in (1.0, min(asked.shares)):
        group = memory_group(most)
        rows.append({"n_hot": share, **run(folder, share, group)})
        group.rmdir()
    return {"limit_mb": round(most), "banks_mb": round(banks_mb, 1), "rows": rows}


def training(folder: Path, _: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Peak memory and seconds of steps of AdamW, resident and in tiers."""

    def once(share: float) -> dict[str, Any]:
        scratch, width = folder.parent / f"tables{share}", "64" if asked.smoke else "1024"
        words = [sys.executable, "-c", TRAINING, str(scratch), str(share), width]
        told: dict[str, Any] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        return told

    found = in_turns(asked, once)
    return {"banks_mb": found[1.0][0]["banks_mb"], "rows": compared(found, ["mb", "anonymous_mb"], ["mb", "seconds"])}


def measured(words: list[str]) -> dict[str, Any]:
    """Run a command of ours; return what it prints of itself, and the most memory that it had at a time.

    anonymous_mb is memory of its own; resident_mb has the pages of files, too, which the system can take back.
    """
    process = subprocess.Popen([sys.executable, "-m", "pilon_compress.cli", *words], stdout=subprocess.PIPE)
    most = {"RssAnon": 0.0, "VmRSS": 0.0}
    while process.poll() is None:
        time.sleep(0.02)
        try:
            lines = [line.split() for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()]
        except OSError:
            break
        for key, value, *_ in (line for line in lines if len(line) > 1):
            if (name := key.rstrip(":")) in most:
                most[name] = max(most[name], int(value) / 1024)
    assert process.stdout is not None
    told = process.stdout.read()
    if process.wait():
        sys.exit(" ".join(words))
    found = {name: json.loads(told).get(name) for name in ("val_perplexity", "seconds", "parameters", "tiers")}
    return {**found, "anonymous_mb": round(most["RssAnon"], 1), "resident_mb": round(most["VmRSS"], 1)}


def quality(folder: Path, _: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Validation perplexity of `smoke` with all primitives, with a share of them hot, and of banks half as large."""
    common = ["train", "--recipe", "smoke", "--share", "always", "--tokens", "8192" if asked.smoke else "262144"]
    arms: dict[str, list[str]] = {"all learn": ["--ffn-ratio", "0.5", "--mac-ratio", "1"]}
    arms |= {f"n_hot {share}": [*arms["all learn"], "--tier", f"n_hot={share}"] for share in asked.shares}
    arms |= {"a bank of half of them": ["--ffn-ratio", "0.25", "--mac-ratio", "0.5"]}
    rows = []
    for number, (name, words) in enumerate(arms.items()):
        out = folder.parent / f"quality{number}"
        rows.append({"arm": name, **measured([*common, *words, "-o", str(out), "--json"])})
    return {"rows": rows}


MEASURES = {"inference": inference, "limit": limit, "training": training, "quality": quality}


def main() -> None:
    """Measure the parts that are asked for, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.25, 0.1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() and not asked.smoke else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        bank_bytes = large(folder, asked.smoke) if set(asked.parts) & {"inference", "limit"} else 0
        for part in asked.parts:
            known[part] = MEASURES[part](folder, bank_bytes, asked)
            print(json.dumps({part: known[part]}), flush=True)
            if not asked.smoke:
                RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
