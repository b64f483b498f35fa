"""Kill, fill, flip, race and deceive the command line on tiny models made on the spot; write docs/results/faults.md.

    python benchmarks/faults.py [--points 24] [--only kill,two,full,flip,hostile] [--kill heal,train]

Counts are kept in docs/results/faults.json, of which the page is made: a run of some rows replaces those alone.

Each command runs in a fork of this process, which has the imports already. Outputs are compared byte for byte with
those of an undisturbed run, but for files that hold times. Per row of the table:

    same      the undisturbed result, in the end           refused    exit code 2 and one line
    lost      another result, no result, or leftovers      silent     another result with exit code 0
    broken    a traceback, another exit code, more than one line where one is due, or no end within a minute
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forked import VERDICTS, Ended, Place, Row, contents, events, finish, killed_at, leftovers, run, settle, start

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

TEXT = "\n\n".join(
    f"Paragraph {i}: the quick brown fox jumps over the lazy dog, again and again number {i * i % 97}, until both rest."
    for i in range(300)
)
SHORT = "--calibration ../text.txt --samples 16 --sequence-length 32 --batch-size 8 --eval-data none"
CONVERT = f"convert ../dense -o out --ffn-ratio 0.6 {SHORT}"
SMALL = "--sequence-length 32 --batch-size 4 --tokens 1024 --data ../text.txt --device cpu"
TRAIN = f"train --recipe smoke -o out {SMALL}"
HEAL = f"train --heal ../pilon --teacher ../dense --cache-teacher 8 -o out {SMALL}"
EXPORT = "export ../pilon --to dense -o out"
MAKE = "import sys; sys.path.insert(0, sys.argv[1]); import tiny; tiny.save_tiny('gpt2', sys.argv[2] + '/dense')"
COMMANDS = {
    "convert": CONVERT,
    "convert --refine": f"{CONVERT} --refine 4",
    "train": TRAIN,
    "heal": HEAL,
    "export": EXPORT,
    "export --overwrite": f"{EXPORT} --overwrite",
}


def spread(total: int, points: int) -> list[int]:
    return sorted({1 + round(index * (total - 1) / max(1, points - 1)) for index in range(points)})


def undisturbed(place: Place, command: str) -> dict[str, str]:
    """The contents of the command's output when nothing happens to it."""
    folder = place.case()
    ended = run(command, folder)
    assert ended.code == 0, ended.err
    found = contents(folder / "out")
    shutil.rmtree(folder)
    return found


def again(command: str) -> str:
    """The command that goes on where this one was cut off."""
    return f"{command} --resume" if command.startswith("train") else command


def kills(place: Place, points: int) -> Iterator[Row]:
    """SIGKILL before a change of the file system, then the same command (a training with --resume)."""
    for name, command in COMMANDS.items():
        row, wanted = Row(f"SIGKILL, {name}", command), undisturbed(place, command)
        counting = place.case(older(place, name))
        total = changes(command, counting)
        shutil.rmtree(counting)
        for point in spread(total, points):
            folder = place.case(older(place, name))
            first = run(command, folder, killed_at(point))
            last = run(again(command), folder)
            settle(row, folder, last, [wanted], f"event {point} of {total}, first {first.code}")
        yield row


def changes(command: str, folder: Path) -> int:
    """How often an undisturbed run of the command changes the file system."""
    with tempfile.TemporaryFile() as log:
        number = log.fileno()
        run(command, folder, events(lambda count: os.ftruncate(number, count)))
        return os.fstat(number).st_size


def older(place: Place, name: str) -> Path | None:
    """A folder with an earlier output, for commands that replace one."""
    if "--overwrite" not in name:
        return None
    folder = place.root / "older"
    if not folder.is_dir():
        folder.mkdir()
        assert run(f"{EXPORT} --dtype bfloat16", folder).code == 0
    return folder


def races(place: Place, points: int) -> Iterator[Row]:
    """Two processes, one output: one is refused, or comes when the other is done; the output is that of one of them."""
    pairs = {
        "convert twice": (CONVERT, CONVERT),
        "convert, another seed": (CONVERT, f"{CONVERT} --seed 1"),
        "convert --overwrite, another seed": (f"{CONVERT} --overwrite", f"{CONVERT} --seed 1 --overwrite"),
        "train twice": (TRAIN, TRAIN),
        "train --resume twice": (f"{TRAIN} --resume", f"{TRAIN} --resume"),
        "export twice": (EXPORT, EXPORT),
        "export --overwrite twice": (f"{EXPORT} --overwrite", f"{EXPORT} --overwrite"),
    }
    for name, pair in pairs.items():
        row = Row(f"two processes, {name}", " & ".join(dict.fromkeys(pair)))
        wanted = [undisturbed(place, command.replace(" --resume", "")) for command in dict.fromkeys(pair)]
        for delay in (0, 0.1, 0.3, 0.8, 1.5, 3)[: max(2, points // 4)]:
            folder = place.case()
            first = start(pair[0], folder)
            time.sleep(delay)
            second = start(pair[1], folder)
            ends = [finish(*first), finish(*second)]
            worst = next((end for end in ends if end.broken), ends[0] if ends[0].code == 0 else ends[1])
            settle(row, folder, worst, wanted, f"{delay} s apart, exits {[end.code for end in ends]}")
        yield row


def full_disks(place: Place, points: int) -> Iterator[Row]:
    """No file may grow beyond a limit; then the same command without one (a training with --resume)."""
    for name in ("convert", "train", "heal", "export", "export --overwrite"):
        command = COMMANDS[name]
        row, wanted = Row(f"full disk, {name}", command), undisturbed(place, command)
        for limit in (1500, 3000, 10_000, 20_000, 40_000, 80_000, 160_000, 300_000)[: max(3, points // 3)]:
            folder = place.case(older(place, name))
            first = run(command, folder, lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
            if first.broken:
                row.add("broken", f"limit {limit}: {first.broken}")
                shutil.rmtree(folder)
                continue
            last = run(again(command) if first.code else "recipes list", folder)
            settle(row, folder, last, [wanted], f"limit {limit}, first {first.code}: {first.err[-150:]}")
        yield row


def flip(path: Path, chance: random.Random) -> str:
    """Flip a random bit, or cut the file short; what was done."""
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data)) if data else 0
    if not data or chance.random() < 0.2:
        path.write_bytes(data[:place])
        return f"{path.name} cut to {place} bytes"
    data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return f"{path.name}, a bit of byte {place}"


def flips(place: Place, points: int) -> Iterator[Row]:
    """A flipped bit or a truncation, in files of every kind that commands read."""
    chance, wanted = random.Random(0), undisturbed(place, EXPORT)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json"):
        row = Row(f"damage, {name} of a converted model", EXPORT)
        for _ in range(points):
            folder = place.case()
            shutil.copytree(place.root / "pilon", folder / "pilon")
            detail = flip(folder / "pilon" / name, chance)
            last = run(EXPORT.replace("../", ""), folder)
            settle(row, folder, last, [wanted], detail, refusable=True)
        yield row
    begun = {
        "journal": (CONVERT, ".out.partial/*", 0.8),
        "training checkpoint": (TRAIN, "out/checkpoints/*/*", 0.8),
        "token cache": (TRAIN, "cache/*/*", 1.0),
        "teacher cache": (HEAL, "cache/teacher-*/*", 1.0),
    }
    for name, (command, pattern, share) in begun.items():
        row, wanted = Row(f"damage, {name}", again(command)), undisturbed(place, command)
        ready = place.case()
        total = changes(command, ready)
        shutil.rmtree(ready)
        ready.mkdir()
        run(command, ready, killed_at(round(share * total)) if share < 1 else lambda: None)
        if share == 1:
            shutil.rmtree(ready / "out")
        for _ in range(points):
            folder = place.case(ready)
            files = sorted(path for path in folder.glob(pattern) if path.is_file())
            detail = flip(chance.choice(files), chance)
            last = run(again(command) if share < 1 else command, folder)
            settle(row, folder, last, [wanted], detail, refusable=name == "training checkpoint")
        yield row


def hostile(place: Place, points: int) -> Iterator[Row]:
    """Downloaded folders and recipes that mean harm: one line and exit code 2, nothing outside the output touched."""
    bomb = ["a0: &a0 [x,x,x,x,x,x,x,x,x]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
    texts = {"aliases": "\n".join([*bomb, "model: *a8"]), "depth": "[" * 100_000, "length": "#" * 50_000_000}
    texts |= {"keys": "\n".join(f"k{i}: 1" for i in range(100_000)), "circle": "a: &a [*a]"}
    row = Row("hostile recipe", "recipes check r.yaml; eval and train --heal of a folder with it")
    for name, text in texts.items():
        for command in ("recipes check r.yaml", "eval pilon --data ../text.txt", f"train --heal pilon -o out {SMALL}"):
            folder = place.case()
            shutil.copytree(place.root / "pilon", folder / "pilon")
            for path in (folder / "r.yaml", folder / "pilon" / "recipe.yaml"):
                path.write_text(text)
            judge(row, folder, run(command, folder), name)
    yield row
    row = Row("hostile modules.json", CONVERT)
    paths = ("../payload", "/etc", "1_Pooling/../../payload", "link", "..\\payload")
    texts = {str(path): json.dumps([{"path": path}]) for path in paths}
    texts |= {text[:9]: text for text in ("{", "3", '[{"x": 1}]', '[{"path": 5}]', "[" * 100_000, "null")}
    for name, text in texts.items():
        folder = place.case()
        shutil.copytree(place.root / "dense", folder / "dense")
        (folder / "payload").mkdir()
        (folder / "payload" / "settings.json").write_text("precious")
        (folder / "dense" / "link").symlink_to("../payload")
        (folder / "dense" / "modules.json").write_text(text)
        judge(row, folder, run(CONVERT.replace("../dense", "dense"), folder), name)
    yield row
    row = Row("hostile config.json", "inspect dense; inspect pilon")
    big = ("num_hidden_layers", 10**6), ("hidden_size", 10**9), ("intermediate_size", 2**62), ("vocab_size", -1)
    odd = ("num_attention_heads", 0), ("hidden_size", 0), ("architectures", [1]), ("dtype", [1]), ("vocab_size", "x")
    for key, value in (*big, *odd):
        folder = place.case()
        shutil.copytree(place.root / "dense", folder / "dense")
        write_config(folder / "dense", **{key: value})
        judge(row, folder, run("inspect dense", folder), f"{key}={value}")
    for value in ({}, [], None, 3, "x", {"banks": {}, "projections": {}}):
        folder = place.case()
        shutil.copytree(place.root / "pilon", folder / "pilon")
        write_config(folder / "pilon", quantization_config={"quant_method": "pilon", "layout": value})
        judge(row, folder, run("eval pilon --data ../text.txt", folder), f"layout {value}")
    yield row


def write_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def judge(row: Row, folder: Path, ended: Ended, detail: str) -> None:
    """Refused in one line, with nothing written but inside the output, or the outcome is a fault."""
    precious = folder / "payload" / "settings.json"
    if precious.exists() and precious.read_text() != "precious":
        row.add("lost", f"{detail}: wrote outside")
    elif ended.broken or len(ended.lines) != 1:
        row.add("broken", f"{detail}: {ended.broken or ended.err[-300:]}")
    elif leftovers(folder) or (folder / "out").exists():
        row.add("lost", f"{detail}: leaves {leftovers(folder)}")
    else:
        row.add("refused" if ended.code == 2 else "silent", detail)
    shutil.rmtree(folder)


CAMPAIGNS = {"kill": kills, "two": races, "full": full_disks, "flip": flips, "hostile": hostile}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the page: one row per fault and command, of `rows` as the JSON file holds them."""
    lines = [
        "# Faults: killed, filled, flipped, raced, deceived",
        "",
        "Made by `python benchmarks/faults.py`, a quarter of an hour, on tiny models; its docstring says what the "
        "columns count.",
        "",
        f"| fault | tried | {' | '.join(VERDICTS)} | command |",
        f"|---|{'---|' * (len(VERDICTS) + 2)}",
    ]
    for row in rows:
        counts = " | ".join(str(row["counts"][verdict]) for verdict in VERDICTS)
        lines.append(f"| {row['name']} | {sum(row['counts'].values())} | {counts} | `{row['command']}` |")
    sums = [sum(row["counts"][verdict] for row in rows) for verdict in VERDICTS]
    return "\n".join([*lines, f"| **all** | {sum(sums)} | {' | '.join(map(str, sums))} | |", ""])


def kept(rows: list[Row], file: Path) -> list[dict[str, Any]]:
    """Put `rows` in the place of those of the same names in the JSON file, and return all of them."""
    known = {row["name"]: row for row in json.loads(file.read_text("utf-8"))} if file.is_file() else {}
    known |= {row.name: {"name": row.name, "command": row.command, "counts": row.counts} for row in rows}
    file.write_text(json.dumps(list(known.values()), indent=1) + "\n", "utf-8")
    return list(known.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=24, help="cases per row, about")
    parser.add_argument("--only", default=",".join(CAMPAIGNS))
    parser.add_argument("--kill", default=",".join(COMMANDS), help="of the campaign kill, these commands alone")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "results" / "faults.md")
    asked = parser.parse_args()
    for name in set(COMMANDS) - set(asked.kill.split(",")):
        del COMMANDS[name]

    import command_line  # tests/command_line.py: what a fork should have already

    for name in command_line.HEAVY:
        __import__(name)
    began, rows = time.monotonic(), list[Row]()
    with tempfile.TemporaryDirectory() as root:
        place = Place(Path(root), TEXT)
        subprocess.run([sys.executable, "-c", MAKE, str(ROOT / "tests"), root], check=True, capture_output=True)
        made = run(CONVERT.replace("-o out", "-o ../pilon"), place.case())
        assert made.code == 0, made.err
        for name in asked.only.split(","):
            for row in CAMPAIGNS[name](place, asked.points):
                rows.append(row)
                print(f"{time.monotonic() - began:5.0f} s  {row.name}: {row.tried} {row.counts}", file=sys.stderr)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(table(kept(rows, asked.output.with_suffix(".json"))), "utf-8")
    if any(row.counts[verdict] for row in rows for verdict in ("lost", "silent", "broken")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
