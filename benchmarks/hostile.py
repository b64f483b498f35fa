"""Hostile downloads: recipes, modules.json and config.json that must be refused in one line, without side effects."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from forked import CONVERT, SMALL, Ended, Place, Row, leftovers, run


def campaign(place: Place, points: int) -> Iterator[Row]:
    """Yield a row for each kind of hostile file; the number of cases does not depend on `points`."""
    yield recipes(place)
    yield modules(place)
    yield configs(place)


def recipes(place: Place) -> Row:
    """Check, evaluate and heal with recipes that are bombs of aliases, nesting, length or keys, or circular."""
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
    return row


def modules(place: Place) -> Row:
    """Convert models whose modules.json names paths outside the model, or is malformed."""
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
    return row


def configs(place: Place) -> Row:
    """Inspect and evaluate models whose config.json has impossible sizes, types or layouts."""
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
    return row


def write_config(folder: Path, **changes: object) -> None:
    """Change entries of the config.json in `folder`."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def judge(row: Row, folder: Path, ended: Ended, detail: str) -> None:
    """Add the verdict: a refusal must be one line, and write nothing outside the output."""
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
