"""Tables of banks and matrices, in plans and in models: folded where there are many, with a line per role and a total.

A part is a dictionary as `report.layout_parts` makes it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .output import print_table, say

SCREEN = 24  # rows that a screen holds: more are joined
COLUMNS = (
    "layers",
    "shape",
    "primitives",
    "rank",
    "top-k",
    "numbers",
    "stored",
    "bytes",
    "stored ÷ dense",
    "MACs ÷ dense",
)
OPTIONAL = ("stored", "top-k", "numbers", "bytes", "primitives", "rank", "shape")

Part = Mapping[str, Any]
Label = Callable[[Sequence[Part]], str]


def print_parts(title: str, parts: Sequence[Part], dtype: str, *, names: bool = False, verbose: bool = False) -> None:
    """Print the table of `parts`, labelled by role and layers or by module `names`; `verbose`: one row per part."""
    label: Label = name_label if names else role_label
    columns = ("projection" if names else COLUMNS[0], *COLUMNS[1:])
    groups = [[part] for part in parts]
    if len(groups) > SCREEN and not verbose:
        groups = join_equal(parts)
    folded = len(groups) > SCREEN and not verbose
    rows = [] if folded else [_row(label(group), group, dtype) for group in groups]
    roles = dict.fromkeys(part["role"] for part in parts)
    totals = [_row(f"all {role}", [part for part in parts if part["role"] == role], dtype) for role in roles]
    print_table(title, columns, rows, totals=[*totals, _row("total", parts, dtype)], optional=OPTIONAL)
    if folded:
        say(f"{len(parts)} rows are folded; --verbose shows each, --json all of them.\n")


def join_equal(parts: Sequence[Part]) -> list[list[Part]]:
    """Join neighbouring layers whose parts of a role have equal sizes; by first layer, then in the parts' order."""
    keys = ("d_in", "d_out", "n_primitives", "rank", "top_k", "quantization", "stored", "dense_stored")
    found: list[list[Part]] = []
    last: dict[str, list[Part]] = {}
    for part in parts:
        group = last.get(part["role"])
        if group is not None and all(group[-1].get(key) == part.get(key) for key in keys):
            group.append(part)
        else:
            last[part["role"]] = [part]
            found.append(last[part["role"]])
    return found


def role_label(group: Sequence[Part]) -> str:
    """Return role and layers, as in `up 0–2`."""
    from pilon_compress.report.formatting import layer_list

    return f"{group[0]['role']} {layer_list([layer for part in group for layer in part['layers']])}"


def name_label(group: Sequence[Part]) -> str:
    """Return the module name with the range of its layers, as in `layers.0–29.mlp.up_proj`."""
    from pilon_compress.report.formatting import layer_list

    layers = [layer for part in group for layer in part["layers"]]
    return re.sub(rf"(?<=\.){layers[0]}(?=\.)", layer_list(layers), group[0]["names"][0], count=1)


def _row(label: str, group: Sequence[Part], dtype: str) -> list[str]:
    from pilon_compress.report.formatting import mib, number, short_count, spread

    def total(key: str) -> float:
        return float(sum(part[key] for part in group))

    shapes = [spread(part[side] for part in group) for side in ("d_in", "d_out")]
    kinds = dict.fromkeys(dtype if (one := part["quantization"]) == "none" else one for part in group)
    mixed = label == "total" and len({part["role"] for part in group}) > 1
    return [
        label,
        "" if mixed else "→".join(shapes),
        "" if mixed else spread(part["n_primitives"] for part in group),
        "" if mixed else spread(part["rank"] for part in group),
        "" if mixed else spread(part["top_k"] for part in group),
        next(iter(kinds)) if len(kinds) == 1 else "mixed",
        short_count(total("stored")),
        mib(total("bytes")),
        number(total("stored") / total("dense_stored")) if total("dense_stored") else "",
        number(total("macs") / total("dense_macs")) if total("dense_macs") else "",
    ]
