"""Inject faults into the command line on tiny models (kills, full disks, damage, races, hostile files).

    python benchmarks/faults.py [--points 24] [--only kill,two,full,flip,hostile] [--kill heal,train]

Writes docs/results/faults.md from the counts in docs/results/faults.json, of which a run replaces its own rows alone.

Each command runs in a fork of this process, so that imports cost nothing. Outputs are compared byte for byte with those
of an undisturbed run, except files that hold times. Verdicts, one column of the table each:

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

import hostile
from forked import CONVERT, SMALL, VERDICTS, Place, Row, contents, events, finish, killed_at, run, settle, start

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

TEXT = "\n\n".join(
    f"Paragraph {i}: the quick brown fox jumps over the lazy dog, again and again number {i * i % 97}, until both rest."
    for i in range(300)
)
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
    """Return `points` integers from 1 to `total` at equal distances."""
    return sorted({1 + round(index * (total - 1) / max(1, points - 1)) for index in range(points)})


def undisturbed(place: Place, command: str) -> dict[str, str]:
    """Return the contents of the command's output without faults."""
    folder = place.case()
    ended = run(command, folder)
    assert ended.code == 0, ended.err
    output = contents(folder / "out")
    shutil.rmtree(folder)
    return output


def again(command: str) -> str:
    """Return the command that continues an interrupted one."""
    return f"{command} --resume" if command.startswith("train") else command


def kills(place: Place, points: int) -> Iterator[Row]:
    """Kill commands before a change of the file system, then run them again (a training with --resume)."""
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
    """Return the number of changes of the file system in an undisturbed run of the command."""
    with tempfile.TemporaryFile() as log:
        number = log.fileno()
        run(command, folder, events(lambda count: os.ftruncate(number, count)))
        return os.fstat(number).st_size


def older(place: Place, name: str) -> Path | None:
    """Return a folder with an earlier output for commands that replace one, else None."""
    if "--overwrite" not in name:
        return None
    folder = place.root / "older"
    if not folder.is_dir():
        folder.mkdir()
        assert run(f"{EXPORT} --dtype bfloat16", folder).code == 0
    return folder


def races(place: Place, points: int) -> Iterator[Row]:
    """Run two processes with one output: one is refused or follows the other, and the output is that of one of them."""
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
    """Run commands with a limit on file sizes, then again without it (a training with --resume)."""
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
    """Flip a random bit of a file, or truncate it, and return what was done."""
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data)) if data else 0
    if not data or chance.random() < 0.2:
        path.write_bytes(data[:place])
        return f"{path.name} cut to {place} bytes"
    data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return f"{path.name}, a bit of byte {place}"


def flips(place: Place, points: int) -> Iterator[Row]:
    """Flip a bit in, or truncate, files of every kind that commands read, and run the commands."""
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


CAMPAIGNS = {"kill": kills, "two": races, "full": full_disks, "flip": flips, "hostile": hostile.campaign}


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
    """Replace the rows of equal names in the JSON file by `rows`, and return all of them."""
    known = {row["name"]: row for row in json.loads(file.read_text("utf-8"))} if file.is_file() else {}
    known |= {row.name: {"name": row.name, "command": row.command, "counts": row.counts} for row in rows}
    file.write_text(json.dumps(list(known.values()), indent=1) + "\n", "utf-8")
    return list(known.values())


def main() -> None:
    """Run the campaigns that the command line names, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=24, help="cases per row, about")
    parser.add_argument("--only", default=",".join(CAMPAIGNS))
    parser.add_argument("--kill", default=",".join(COMMANDS), help="commands of the campaign kill")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "results" / "faults.md")
    options = parser.parse_args()
    for name in set(COMMANDS) - set(options.kill.split(",")):
        del COMMANDS[name]

    import command_line  # tests/command_line.py: modules to import before the forks

    for name in command_line.HEAVY:
        __import__(name)
    began, rows = time.monotonic(), list[Row]()
    with tempfile.TemporaryDirectory() as root:
        place = Place(Path(root), TEXT)
        subprocess.run([sys.executable, "-c", MAKE, str(ROOT / "tests"), root], check=True, capture_output=True)
        made = run(CONVERT.replace("-o out", "-o ../pilon"), place.case())
        assert made.code == 0, made.err
        for name in options.only.split(","):
            for row in CAMPAIGNS[name](place, options.points):
                rows.append(row)
                print(f"{time.monotonic() - began:5.0f} s  {row.name}: {row.tried} {row.counts}", file=sys.stderr)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(table(kept(rows, options.output.with_suffix(".json"))), "utf-8")
    if any(row.counts[verdict] for row in rows for verdict in ("lost", "silent", "broken")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
