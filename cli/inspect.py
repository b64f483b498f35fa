"""`pilon-compress inspect`: what is inside a model, and what a conversion would replace. Loads no weights."""

from typing import Annotated, Any

import typer

from .output import print_json, print_table


def inspect(
    model: Annotated[str, typer.Argument(help="Dense or PILON model: hub id, local folder, or package:NAME.")],
    targets: Annotated[list[str] | None, typer.Option(help="Only these modules: name, class or re:REGEX.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Not these modules.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show the projections of a model per layer, with parameters, bytes and MACs per token.

    pilon-compress inspect gpt2
    """
    from pilon_compress.measure.anatomy import anatomy

    result = anatomy(model, targets or [], ignore or [])
    print_json(result) if as_json else print_anatomy(result)


def print_anatomy(result: dict[str, Any]) -> None:
    from pilon_compress.readable import mib, number

    rows = [
        [
            str(entry["name"]),
            str(entry["role"]),
            f"{entry['d_in']}→{entry['d_out']}",
            number(entry["parameters"]),
            mib(entry["bytes"]),
            number(entry["macs"]),
            str(entry["bank"] or ""),
        ]
        for entry in result["projections"]
    ]
    columns = ["projection", "role", "shape", "parameters", "bytes (bf16)", "MACs/token", "bank"]
    print_table(f"{result['model']}  {result['architecture']}", columns, rows)
    if result["form"] == "pilon":
        ffn = result["ffn"]
        print(
            f"PILON: {number(ffn['stored_ratio'])} of the dense FFN parameters, {number(ffn['mac_ratio'])} of its MACs"
        )
    else:
        total, replaced = result["parameters"], result["replaced"]
        print(
            f"{number(replaced)} of {number(total)} parameters ({number(100 * replaced / total)} %) would be replaced, "
            f"{number(result['replaced_macs'])} of {number(result['macs'])} MACs per token"
        )
    for note in result["notes"]:
        print(note)
